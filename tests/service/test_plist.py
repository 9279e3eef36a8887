"""The property list: the template, filling it in, what is wrong with one, what is stale."""

from __future__ import annotations

import importlib.util
import plistlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest

from emberd.core.settings import Settings
from emberd.service.plist import differences, fill, problems, starts_at_login
from emberd.service.wanted import WantedService, stop_limit_s

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = ROOT / "launchd" / "io.github.emberd.plist"
SCHEMA = ROOT / "tests" / "launchctl_standin" / "schema.py"
WANTED = WantedService(
    label="io.github.emberd.small",
    program=("/opt/venv/bin/python", "-P", "-m", "emberd", "--config", "/Users/me/a b & <c>.toml", "run"),
    host="127.0.0.1",
    port=5002,
    log="/Users/me/Library/Logs/emberd/io.github.emberd.small.log",
    stop_limit_s=95,
    starts_at_login=True,
    environment={"XDG_STATE_HOME": "/Users/me/state"},
)


def template() -> dict[str, Any]:
    content: dict[str, Any] = plistlib.loads(TEMPLATE.read_bytes())
    return content


def schema() -> Any:
    """Return the schema of the stand-in, written from the manual by other hands."""
    found = importlib.util.spec_from_file_location("launchd_schema", SCHEMA)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["launchd_schema"] = module
    found.loader.exec_module(module)
    return module


def test_every_key_of_the_template_has_a_comment():
    [document] = minidom.parseString(TEMPLATE.read_bytes()).getElementsByTagName("plist")  # noqa: S318  # our own file
    [table] = [node for node in document.childNodes if node.nodeName == "dict"]
    nodes = [node for node in table.childNodes if node.nodeName != "#text"]
    keys = [number for number, node in enumerate(nodes) if node.nodeName == "key"]
    assert len(keys) == len(template())
    for number in keys:
        assert nodes[number - 1].nodeName == "#comment", nodes[number].firstChild.data


def test_the_template_is_right_as_it_stands_and_says_the_defaults():
    job = template()
    assert problems(job) == ()
    assert job["ExitTimeOut"] == stop_limit_s(Settings().lifecycle)
    listeners = job["Sockets"]["Listeners"]
    assert listeners == fill(job, replace(WANTED, port=Settings().endpoint.port))["Sockets"]["Listeners"]
    assert [each["SockNodeName"] for each in listeners] == ["127.0.0.1", "::1"]
    assert job["ProcessType"] == "Interactive"
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert "MemoryLock" not in job["SoftResourceLimits"]
    assert not {"Nice", "LowPriorityIO", "EnableTransactions", "SessionCreate"} & set(job)


@pytest.mark.parametrize("starts_at_login", [True, False])
def test_what_we_write_is_what_the_manual_allows(starts_at_login: bool):
    job = fill(template(), replace(WANTED, starts_at_login=starts_at_login))
    assert problems(job) == ()
    assert schema().errors(job) == []
    assert schema().warnings(job) == []
    assert plistlib.loads(plistlib.dumps(job)) == job


def test_filling_in_sets_label_program_port_times_and_paths():
    job = fill(template(), WANTED)
    assert job["Label"] == "io.github.emberd.small"
    assert job["ProgramArguments"] == list(WANTED.program)
    assert job["ExitTimeOut"] == 95
    assert [each["SockServiceName"] for each in job["Sockets"]["Listeners"]] == ["5002", "5002"]
    assert job["StandardErrorPath"] == job["StandardOutPath"] == WANTED.log
    assert job["EnvironmentVariables"]["EMBERD_SERVICE"] == "io.github.emberd.small"
    assert job["EnvironmentVariables"]["XDG_STATE_HOME"] == "/Users/me/state"
    assert job["EnvironmentVariables"]["PATH"] == template()["EnvironmentVariables"]["PATH"]
    assert starts_at_login(job)


def test_a_job_on_demand_has_nothing_that_starts_it_at_login():
    job = fill(template(), replace(WANTED, starts_at_login=False))
    assert job["RunAtLoad"] is False
    assert "KeepAlive" not in job, "it implies RunAtLoad"
    assert not starts_at_login(job)


@pytest.mark.parametrize(("host", "family"), [("192.168.1.7", "IPv4"), ("::1", "IPv6"), ("studio.local", None)])
def test_the_family_of_the_socket_is_that_of_the_address(host: str, family: str | None):
    job = fill(template(), replace(WANTED, host=host))
    assert job["Sockets"]["Listeners"].get("SockFamily") == family


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_means_both_families_and_one_on_a_computer_without_ipv6(host: str):
    job = fill(template(), replace(WANTED, host=host))
    assert [each["SockFamily"] for each in job["Sockets"]["Listeners"]] == ["IPv4", "IPv6"]
    alone = fill(template(), replace(WANTED, host=host, has_ipv6=False))
    assert alone["Sockets"]["Listeners"]["SockNodeName"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Lable": "x"}, "Lable is not a key"),
        ({"Nice": 5}, "Nice is not a key"),
        ({"Label": ""}, "Label is missing"),
        ({"ExitTimeOut": "65"}, "ExitTimeOut is str"),
        ({"ExitTimeOut": True}, "ExitTimeOut is bool"),
        ({"ExitTimeOut": 0}, "for ever"),
        ({"ThrottleInterval": 5.0}, "ThrottleInterval is float"),
        ({"RunAtLoad": 1}, "RunAtLoad is int"),
        ({"ProgramArguments": []}, "ProgramArguments is missing"),
        ({"ProgramArguments": ["python3"]}, "absolute path"),
        ({"ProgramArguments": ["/usr/bin/python3", 5]}, "something else than strings"),
        ({"EnvironmentVariables": {"PORT": 5001}}, "EnvironmentVariables.PORT"),
        ({"KeepAlive": {"SuccesfulExit": False}}, "KeepAlive.SuccesfulExit"),
        ({"KeepAlive": {"SuccessfulExit": 0}}, "KeepAlive.SuccessfulExit"),
        ({"ProcessType": "interactive"}, "ProcessType is interactive"),
        ({"LimitLoadToSessionType": ["Aqua", "background"]}, "has background"),
        ({"Sockets": {"Listeners": {"SockServiceName": 5001}}}, "Sockets.Listeners.SockServiceName"),
        ({"Sockets": {"Listeners": {"SockName": "x"}}}, "Sockets.Listeners.SockName"),
        ({"Sockets": {"Listeners": 5001}}, "no dictionary"),
        ({"SoftResourceLimits": {"NumberOfFile": 1}}, "SoftResourceLimits.NumberOfFile"),
        ({"StandardErrorPath": "~/x.log"}, "StandardErrorPath is not an absolute"),
    ],
)
def test_what_launchd_would_refuse_or_misread_is_named(change: dict[str, Any], words: str):
    found = problems({**fill(template(), WANTED), **change})
    assert any(words in problem for problem in found), found


def test_a_stale_list_names_the_keys_that_differ():
    new = fill(template(), WANTED)
    assert differences(new, new) == ()
    old = {key: value for key, value in new.items() if key != "Umask"} | {"ExitTimeOut": 5, "Nice": 1}
    assert differences(old, new) == ("ExitTimeOut", "Nice", "Umask")
