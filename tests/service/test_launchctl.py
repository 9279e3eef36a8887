"""Exit codes of launchctl, and what it prints."""

from __future__ import annotations

import pytest

from emberd.service.launchctl import Outcome, is_disabled, is_headless, is_throttled, judge, read_print

PRINTED = """gui/501/io.github.emberd = {
\tactive count = 1
\tpath = /Users/me/Library/LaunchAgents/io.github.emberd.plist
\ttype = LaunchAgent
\tstate = running

\tprogram = /usr/bin/python3
\targuments = {
\t\t/usr/bin/python3
\t\tstate = not this one
\t}

\tenvironment = {
\t\tPATH => /usr/bin
\t}

\tminimum runtime = 5
\texit timeout = 65
\truns = 3
\tpid = 4242
\timmediate reason = inefficient
\tforks = 0
\tlast exit code = 78: EX_CONFIG

\tspawn type = interactive (4)
\tsockets = {
\t\t"Listeners" = {
\t\t\tpid = 1
\t\t}
\t}
}
"""


@pytest.mark.parametrize(
    ("code", "words", "outcome"),
    [
        (0, "", Outcome.DONE),
        (3, "Boot-out failed: 3: No such process", Outcome.NOT_LOADED),
        (113, "", Outcome.NOT_LOADED),
        (5, "Bootstrap failed: 5: Input/output error", Outcome.BUSY),
        (36, "", Outcome.BUSY),
        (37, "", Outcome.BUSY),
        (119, "", Outcome.DISABLED),
        (112, "", Outcome.NO_DOMAIN),
        (125, "", Outcome.NO_DOMAIN),
        (1, "Bootstrap failed: 125: Domain does not support specified action", Outcome.NO_DOMAIN),
        (1, "Not privileged to set domain", Outcome.REFUSED),
        (64, "Usage: launchctl ...", Outcome.REFUSED),
        (-9, "", Outcome.REFUSED),
    ],
)
def test_each_exit_code_of_launchctl_asks_for_something(code: int, words: str, outcome: Outcome):
    assert judge(code, words) is outcome


def test_a_printed_job_is_read_without_its_inner_blocks():
    job = read_print(PRINTED)
    assert (job.state, job.pid, job.last_exit) == ("running", 4242, "78: EX_CONFIG")
    assert job.path == "/Users/me/Library/LaunchAgents/io.github.emberd.plist"
    assert is_throttled(job.process_type) is False


def test_what_is_not_printed_is_unknown():
    job = read_print("gui/501/x = {\n\tlast exit code = (never exited)\n}\n")
    assert (job.state, job.pid, job.last_exit, is_throttled(job.process_type)) == (None, None, None, None)
    assert read_print("\tlast terminating signal = Killed: 9\n").last_exit == "signal Killed: 9"
    assert is_throttled("daemon (3)") is True


def test_a_switch_in_the_overrides_is_read_in_both_spellings():
    for word in ("disabled", "true"):
        assert (
            is_disabled(f'disabled services = {{\n\t"io.github.emberd" => {word}\n}}', "io.github.emberd") is True
        )
    assert is_disabled('\t"io.github.emberd" => enabled', "io.github.emberd") is False
    assert is_disabled('\t"io.github.emberd.small" => disabled', "io.github.emberd") is None


@pytest.mark.parametrize(
    ("ssh", "console", "sudo", "other", "headless"),
    [
        (False, False, False, False, False),
        (True, True, False, False, False),
        (True, False, False, False, True),
        (False, True, True, False, True),
        (False, True, False, True, True),
    ],
)
def test_the_users_domain_is_chosen_where_there_is_no_login_at_the_screen(
    ssh: bool, console: bool, sudo: bool, other: bool, headless: bool
):
    chosen = is_headless(has_ssh=ssh, owns_console=console, is_sudo=sudo, has_other_uid=other)
    assert chosen is headless
