"""How a job's log is followed where its machine keeps it elsewhere, or cuts the connection: with a program in the place of ssh."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mistralctl.errors import Exit, UserError
from mistralctl.runtime import following, sky, ssh
from mistralctl.runtime.following import NO_LOG, Following
from mistralctl.runtime.ssh import Address


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.05)
    ssh.remember("mine", Address("127.0.0.1", 9, "nobody", "/dev/null"))
    return tmp_path / "serve.log"


def in_place_of_ssh(folder: Path, script: str) -> None:
    program = folder / "ssh"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)


def test_a_machine_that_keeps_its_log_elsewhere_is_asked_through_skypilot(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_ssh(log.parent, f"exit {NO_LOG}")
    asked = []

    def tail(cluster: str, job: int, lines: sky.Lines) -> None:
        asked.append((cluster, job))
        lines.write("one\ntwo\n")

    monkeypatch.setattr(sky, "tail", tail)
    heard: list[str] = []
    followed = Following("mine", "mctl-mine", 7, log, heard.append)
    assert followed.wait(10, lambda: "two" in "".join(heard), lambda: False)
    assert asked == [("mctl-mine", 7)]
    assert log.read_text() == "one\ntwo\n"


def test_why_skypilot_cannot_tell_either_is_what_up_ends_with(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_ssh(log.parent, f"exit {NO_LOG}")

    def tail(*_: object) -> None:
        raise UserError("SkyPilot's API server does not answer", Exit.CLOUD)

    monkeypatch.setattr(sky, "tail", tail)
    followed = Following("mine", "mctl-mine", 7, log, lambda line: None)
    with pytest.raises(UserError, match="API server does not answer"):
        followed.wait(10, lambda: False, lambda: False)


def test_after_a_cut_it_goes_on_with_the_line_that_was_cut_and_no_line_comes_twice(log: Path) -> None:
    in_place_of_ssh(
        log.parent,
        'first=$(grep -o -- "-n +[0-9]*" <<< "$*" | grep -o "[0-9]*$"); printf "%s\\n" one two three four | tail -n "+$first" | head -c 7\n'
        "exit 255",
    )
    heard: list[str] = []
    followed = Following("mine", "mctl-mine", 7, log, heard.append)
    assert followed.wait(10, lambda: "four" in "".join(heard), lambda: False)
    followed.close()
    assert log.read_text() == "one\ntwo\nthree\nfour\n"
