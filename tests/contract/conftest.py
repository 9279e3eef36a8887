from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contract.targets import REAL_BUILDS_VARIABLE, Server, Target, real_builds, standin
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _targets() -> list[object]:
    found: list[object] = [pytest.param(each, id=each.name) for each in map(standin, ("1.76", "1.104", "1.115.1"))]
    real = real_builds()
    found += [pytest.param(each, id=each.name) for each in real]
    if not real:
        reason = f"{REAL_BUILDS_VARIABLE} names no real build"
        found.append(pytest.param(None, id="koboldcpp", marks=pytest.mark.skip(reason=reason)))
    return found


@pytest.fixture(scope="session", params=_targets())
def target(request: pytest.FixtureRequest) -> Target:
    """A KoboldCPP, real or played."""
    found: Target = request.param
    return found


@pytest.fixture
def new_target(target: Target) -> Target:
    """A KoboldCPP that has what came after 1.76."""
    if target.is_old:
        pytest.skip("not in this version")
    return target


@pytest.fixture(params=[pytest.param(each, id=each.name) for each in (standin("1.115.1"), *real_builds())])
def batching_target(request: pytest.FixtureRequest) -> Target:
    """A KoboldCPP that can work on several requests at once."""
    found: Target = request.param
    if not found.is_batching:
        pytest.skip("not in this version")
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 24 MiB: fast to load, slow enough that a long prompt takes a while."""
    return write_gguf(tmp_path_factory.mktemp("model") / "noise-24.gguf", target_bytes=24 << 20).path


@pytest.fixture(scope="session")
def model_with_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that keeps a state in place of a KV cache."""
    return write_gguf(tmp_path_factory.mktemp("model") / "state.gguf", architecture="mamba", embedding=256).path


@pytest.fixture(scope="session")
def server(target: Target, model: Path) -> Iterator[Server]:
    """A server that many tests share; each leaves it idle."""
    with target.serving(model) as serving:
        yield serving
