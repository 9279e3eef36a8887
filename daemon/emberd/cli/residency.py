"""`emberd residency`: how much of a file is in memory, as a whole and by layer."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.talk import as_json, ask_daemon, file_words, residency_words, show
from emberd.core import residency
from emberd.core.errors import EmberdError, ModelError
from emberd.core.gguf import split_names
from emberd.core.status import FileStatus, ResidencyStatus, from_plain, to_plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emberd.core.gguf import TensorSpan
    from emberd.host.toucher import Toucher

_BAR_WIDTH = 40


@click.command("residency")
@click.argument("file", required=False, metavar="[FILE]")
@click.option("--layers", "by_layer", is_flag=True, help="Show a bar for each layer of a GGUF.")
@click.option("--tensors", "by_tensor", is_flag=True, help="Show every tensor of a GGUF.")
@click.option("--sample", "is_sampled", is_flag=True, help="Look at a sample of the pages only: a millisecond.")
@as_json
@click.pass_obj
def command(
    config: str | None,
    file: str | None,
    by_layer: bool,  # noqa: FBT001  # click's flag
    by_tensor: bool,  # noqa: FBT001  # same
    is_sampled: bool,  # noqa: FBT001  # same
    is_json: bool,  # noqa: FBT001  # same
) -> None:
    """Show how much of FILE, or else of all files that the running engine maps, is in memory.

    Works on any file, with or without a daemon; without one, FILE is by default the settings' model. All parts of a
    split model count together.
    """
    if is_sampled and (by_layer or by_tensor):
        raise click.UsageError("--sample looks at too few pages to tell layers apart.")
    paths = model_files(config, file)
    content = asyncio.run(_measure(paths, with_tensors=by_layer or by_tensor, is_sampled=is_sampled))
    if not by_tensor:
        content.pop("tensors", None)
    if file is None:
        status = _status(config)
        content["engine"] = status.get("residency")
        content["engine_files"] = status.get("files", [])
    show(content, is_json, _print)


def model_files(config: str | None, file: str | None) -> list[Path]:
    """Return the file, what the running engine maps, or the settings' model; the parts of a split one, too.

    Raises:
        ModelError: no file is named, or it is missing.
        ConfigError: the settings are wrong.
    """
    if file is None:
        from emberd.host import config_file  # noqa: PLC0415  # not needed with a file

        settings, _ = config_file.load(config)
        mapped = [Path(each["path"]) for each in _status(config).get("files", ()) if each["held"] == "mapped"]
        if mapped:
            return mapped
        if not settings.model.path:
            raise ModelError("no file is named, and the settings name no model", "Name a file, or set model.path.")
        file = settings.model.path
    path = Path(file).expanduser().absolute()
    if not path.exists():
        raise ModelError(f"no such file: {path}")
    return [path.with_name(name) for name in split_names(path.name)]


@contextlib.asynccontextmanager
async def toucher_on(paths: Sequence[Path]) -> Any:
    """Yield a toucher on these files, and end it; its failures become errors for a person.

    Raises:
        ModelError: a file cannot be read.
        EmberdError: the toucher died.
    """
    from emberd.host import ThisHost  # noqa: PLC0415  # psutil only when it is used
    from emberd.host.toucher import Toucher, ToucherLost, ToucherRefused  # noqa: PLC0415

    toucher = Toucher(ThisHost().paging)
    toucher.use(paths)
    try:
        yield toucher
    except ToucherRefused as refusal:
        if refusal.kind == "not_owner":
            raise
        raise ModelError(str(refusal), "Is it a file that you may read?") from refusal
    except ToucherLost as loss:
        raise EmberdError(str(loss), "Try again.") from loss
    finally:
        await toucher.close()


async def _measure(paths: Sequence[Path], *, with_tensors: bool, is_sampled: bool) -> dict[str, Any]:
    from emberd.host.toucher import ToucherRefused  # noqa: PLC0415

    content: dict[str, Any] = {"files": [str(path) for path in paths], "is_exact": not is_sampled}
    spans = [_spans(path) for path in paths] if with_tensors else []
    try:
        async with toucher_on(paths) as toucher:
            if is_sampled:
                whole = residency.from_pages(await toucher.sample(residency.SAMPLED_PAGES))
                return {**content, **_plain(whole)}
            return {**content, **await _count(toucher, spans)}
    except ToucherRefused as refusal:
        return {**content, **_plain(residency.unknown(residency.Unknown.NOT_OWNER, str(refusal)))}


async def _count(toucher: Toucher, spans: Sequence[Sequence[TensorSpan]]) -> dict[str, Any]:
    source, page_bytes, files = await toucher.count()
    total = sum(pages for _, pages in files)
    count = residency.PageCount(sum(resident for resident, _ in files), total, total, page_bytes, source)
    content = _plain(residency.from_pages(count))
    if spans:
        flat = [span for part in spans for span in part]
        asked = [(number, span.offset, span.length) for number, part in enumerate(spans) for span in part]
        _, _, pages = await toucher.count(asked)
        tensors = residency.by_tensor(flat, pages)
        content["layers"] = [_part(part) for part in residency.by_layer(tensors)]
        content["tensors"] = [_part(part) for part in tensors]
    return content


def _plain(seen: residency.Residency) -> dict[str, Any]:
    from emberd.services.residency_meter import describe  # noqa: PLC0415

    plain = to_plain(describe(seen))
    del plain["age_s"]  # it was just read
    return plain


def _spans(path: Path) -> tuple[TensorSpan, ...]:
    from emberd.host.model_file import read_spans  # noqa: PLC0415

    return read_spans(path)


def _part(part: residency.Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "share": part.share,
        "total_bytes": part.total_bytes,
        "resident_pages": part.resident_pages,
        "pages": part.pages,
    }


def _status(config: str | None) -> dict[str, Any]:
    """Return the daemon's status, empty without a daemon."""
    with contextlib.suppress(EmberdError):
        return ask_daemon(config, "status")
    return {}


def _print(content: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415  # heavy, and not needed for --json
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(highlight=False)
    for file in content["files"]:
        console.print(file, style="dim", soft_wrap=True, markup=False)
    whole = from_plain(ResidencyStatus, content)
    console.print(f"resident: {residency_words(whole)}", markup=False, soft_wrap=True)
    for each in content.get("engine_files", ()):
        console.print(f"  {file_words(from_plain(FileStatus, each))}", style="dim", soft_wrap=True, markup=False)
    engine = from_plain(ResidencyStatus, content.get("engine") or {})
    if engine.source == residency.Source.PROCESS.value:
        console.print(
            f"the running engine: {residency_words(engine)}; {engine.message}", markup=False, soft_wrap=True
        )
    parts = content.get("tensors") or content.get("layers")
    if not parts:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    for part in parts:
        bar = ProgressBar(total=1, completed=part["share"], width=_BAR_WIDTH)
        table.add_row(part["name"], bar, f"{part['share']:.1%}", f"{part['total_bytes'] / (1 << 20):.1f} MiB")
    console.print(table)
