"""What a killed API server of SkyPilot leaves is found, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mistralctl.runtime import api_server

SERVER = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


def started(**environ: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A program that leads a session and has a child, and that child."""
    leader = subprocess.Popen(
        [sys.executable, "-c", SERVER], start_new_session=True, env=os.environ | environ, stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout
    return leader, psutil.Process(int(leader.stdout.readline()))


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, psutil.Process]]:
    """The children of four servers: killed, alive, of another home folder, and of a program that is no server."""
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"killed": {"IS_SKYPILOT_SERVER": "true"}, "alive": {"IS_SKYPILOT_SERVER": "true"},
             "another home": {"IS_SKYPILOT_SERVER": "true", "HOME": "/another"}, "no server": {}}  # fmt: skip
    every = {name: started(**environ) for name, environ in given.items()}
    for name, (leader, _) in every.items():
        if name != "alive":
            leader.kill()
            leader.wait()
    yield {name: child for name, (_, child) in every.items()}
    for leader, child in every.values():
        leader.kill()
        if child.is_running():  # it has the leader's output, whose end is waited for
            child.kill()
        leader.communicate()


def test_only_a_killed_servers_processes_are_ended_and_only_if_none_answers(left: dict[str, psutil.Process]) -> None:
    assert api_server.orphans() == [left["killed"]]
    with socket.create_server(("127.0.0.1", 0)) as another:
        api_server.clear_the_way(f"http://127.0.0.1:{another.getsockname()[1]}")
        assert api_server.orphans() == [left["killed"]]
        closed = f"http://127.0.0.1:{another.getsockname()[1]}"
    api_server.clear_the_way(closed)
    deadline = time.monotonic() + 5
    while left["killed"].is_running() and left["killed"].status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert api_server.orphans() == []
    assert all(left[name].is_running() for name in ("alive", "another home", "no server"))


def test_the_servers_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert api_server.last_words() == ""
    (tmp_path / ".sky" / "api_server").mkdir(parents=True)
    (tmp_path / ".sky" / "api_server" / "server.log").write_text("INFO one\nRuntimeError: port 50011 is already in use\n\n")
    assert api_server.last_words() == "RuntimeError: port 50011 is already in use"
