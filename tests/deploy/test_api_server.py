"""What a killed API server of SkyPilot leaves is found, and nothing else."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mistralctl import endpoint
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
        api_server.clear_the_way(f"http://127.0.0.1:{another.getsockname()[1]}", [])
        assert api_server.orphans() == [left["killed"]]
        closed = f"http://127.0.0.1:{another.getsockname()[1]}"
    api_server.clear_the_way(closed, [])
    deadline = time.monotonic() + 300
    while left["killed"].is_running() and left["killed"].status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert api_server.orphans() == []
    assert all(left[name].is_running() for name in ("alive", "another home", "no server"))


@pytest.mark.linux
def test_a_stranger_in_a_killed_servers_session_is_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its executors write a title over their environment; a program that the user started in the same session has neither."""
    monkeypatch.setenv("HOME", str(tmp_path))
    titled = "import setproctitle, time; setproctitle.setproctitle('SkyPilot:executor:long:1'); time.sleep(100)"
    script = f"""IS_SKYPILOT_SERVER=true sleep 100 & echo $!; {sys.executable} -c "{titled}" & echo $!; sleep 100 & echo $!"""
    environ = {key: value for key, value in os.environ.items() if key != api_server.MARK}
    with subprocess.Popen(
        ["bash", "-c", script], start_new_session=True, env=environ, stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdout is not None
        marked, executor, stranger = (psutil.Process(int(leader.stdout.readline())) for _ in range(3))
        leader.wait()
        try:
            deadline = time.monotonic() + 300
            while executor.cmdline()[:1] != ["SkyPilot:executor:long:1"] and time.monotonic() < deadline:
                time.sleep(0.05)
            assert {one.pid for one in api_server.orphans()} == {marked.pid, executor.pid}
        finally:
            for one in (marked, executor, stranger):
                one.kill()


def free_ports(count: int) -> list[int]:
    """Ports that are free, and stay so until they are used: connections take theirs from 32768 on."""
    found: set[int] = set()
    while len(found) < count:
        if endpoint.is_free(port := 22000 + secrets.randbelow(10000)):
            found.add(port)
    return list(found)


class Clock:
    """Time that passes only while it is slept."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


def test_a_port_that_a_connection_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(api_server, "time", clock)
    closed, finished, bound, listened = free_ports(4)
    url = f"http://127.0.0.1:{closed}"
    with socket.create_server(("127.0.0.1", listened)), socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), source_address=("127.0.0.1", finished))
        peer, _ = server.accept()
        client.close()  # who closes first is left with the port, which is nobody's then
        peer.close()
        api_server.clear_the_way(url, [closed, listened])  # who listens there will not be waited away
        assert clock.now == 0
        api_server.clear_the_way(url, [closed, finished])
        assert clock.now == pytest.approx(api_server.HELD_SECONDS, abs=1)
    holder = socket.socket()
    holder.bind(("127.0.0.1", bound))
    clock.now, clock.on_sleep = 0, holder.close
    api_server.clear_the_way(url, [bound])
    assert 0 < clock.now < 5


def test_why_the_server_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert api_server.why_not() == "it does not say why (log: ~/.sky/api_server/server.log)"
    log = tmp_path / ".sky" / "api_server" / "server.log"
    log.parent.mkdir(parents=True)
    log.write_text("INFO one\nModuleNotFoundError: No module named 'x'\n\n")
    assert api_server.why_not() == "ModuleNotFoundError: No module named 'x' (log: ~/.sky/api_server/server.log)"
    [free] = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        log.write_text(f"RuntimeError: Port {port} is not available\n")
        me = psutil.Process()
        assert api_server.why_not().startswith(
            f"port {port} is held by {me.name()} (process {me.pid}); end that, or export SKYPILOT_API"
        )
    log.write_text(f"RuntimeError: SkyPilot API server fails to start as port {free} is already in use by another process.\n")
    assert api_server.why_not().startswith(f"port {free} is held by another program; ")
