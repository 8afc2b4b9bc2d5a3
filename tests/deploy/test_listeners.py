"""A key goes to the deployment's own server or tunnel, and to no program that took its port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistral_contract import ports
from mistralctl import connection, endpoint, listeners, processes, readiness, state
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record

# Notes what it is sent, and answers everything as a server of ours would.
SERVER = """
import http.server, os, socket, sys
if sys.argv[2:]:
    socket.getfqdn("127.0.0.1")  # loads what another user may not read
    os.setuid(int(sys.argv[2]))
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def setup(self):
        super().setup()
        taken = self.rfile
        class Noting:
            def readline(self, size=-1):
                line = taken.readline(size)
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
                return line
            def __getattr__(self, name):
                return getattr(taken, name)
        self.rfile = Noting()
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_POST = do_GET
    def log_message(self, *words): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
Serve = Callable[..., tuple[int, Path, subprocess.Popen[str]]]


@pytest.fixture
def ours(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRALCTL_HOME", str(home / ".mistralctl"))
    return home / ".mistralctl"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start the server; its port, the file of what it was sent, its process."""
    every: list[subprocess.Popen[str]] = []

    def start(*, environ: dict[str, str] | None = None, user: int | None = None) -> tuple[int, Path, subprocess.Popen[str]]:
        taken = tmp_path / f"taken{len(every)}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MISTRALCTL_")}
        command = [sys.executable, "-c", SERVER, "0", *([] if user is None else [str(user)])]
        with taken.open("wb") as file:
            one = subprocess.Popen(command, env=kept | (environ or {}), stdout=subprocess.PIPE, stderr=file, text=True)
        every.append(one)
        assert one.stdout is not None
        return int(one.stdout.readline()), taken, one

    yield start
    for one in every:
        one.kill()
        one.communicate()


def up(ours: Path, port: int, **changes: Any) -> Record:
    """The record of a deployment that is up on this machine, with its key."""
    given: dict[str, Any] = {"task": {"envs": {}, "resources": {}}} | changes
    record = Record("m", "local", "up", "m", "m", port, str(ours / "node"), "s", time.time(), **given)
    state.save(record)
    state.api_key("m")
    return record


def envs(ours: Path) -> dict[str, str]:
    return {"MISTRALCTL_NAME": "m", "MISTRALCTL_NODE_DIR": str(ours / "node")}


@pytest.mark.parametrize("whose", ["this user's", "another user's", "another deployment's", "another home's"])
def test_a_program_that_took_the_port_of_a_dead_server_gets_nothing(
    ours: Path, mistralctl: Run, serve: Serve, whose: str, tmp_path: Path
) -> None:
    environ = {"another deployment's": envs(ours) | {"MISTRALCTL_NAME": "n"}, "another home's": envs(tmp_path / "other")}.get(
        whose
    )
    if whose == "another user's" and os.geteuid() != 0:
        port, taken, _ = serve()
    else:
        port, taken, _ = serve(environ=environ, user=12345 if whose == "another user's" else None)
    record = up(ours, port, pid=os.getpid(), pid_started=1.0)  # its process is gone, and the number was used again
    for command in (("env", "m"), ("chat", "m", "-m", "hello"), ("env", "m", "-o", "json")):
        done = mistralctl(*command)
        assert (done.returncode, done.stdout) == (Exit.CONFLICT, ""), command
        assert len(done.stderr.splitlines()) == 1
        assert f"answers at 127.0.0.1:{port}, and not its own server; nothing was sent to it" in done.stderr
    assert mistralctl("status", "m").returncode == 0
    assert not readiness.answers(record)
    assert not readiness.reached(record)
    with pytest.raises(UserError, match="not its own server"):
        readiness.complete(record)
    assert taken.read_bytes() == b""


@pytest.mark.linux
def test_its_own_server_is_sent_the_key(ours: Path, mistralctl: Run, serve: Serve) -> None:
    """By its environment, or because it is the record's very process."""
    port, taken, _ = serve(environ=envs(ours))
    record = up(ours, port)
    assert readiness.answers(record)
    assert f"Bearer {state.api_key('m')}".encode() in taken.read_bytes()
    assert mistralctl("env", "m").returncode == 0
    with connection.client(record, 5) as client:
        assert client.get("/v1/models").status_code == 200
    port, taken, process = serve()
    assert not readiness.answers(up(ours, port))
    assert readiness.answers(processes.noted(up(ours, port), process.pid))
    assert taken.read_bytes().count(b"Bearer") == 1


@pytest.mark.linux
def test_a_server_that_takes_no_connection_is_sent_nothing(ours: Path, mistralctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel connects before a program takes the connection, and whoever listens then may be another."""
    monkeypatch.setattr(listeners, "ACCEPT_SECONDS", 0.3)
    script = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], env=os.environ | envs(ours), stdout=subprocess.PIPE, text=True) as deaf:
        assert deaf.stdout is not None
        record = up(ours, int(deaf.stdout.readline()))
        with pytest.raises(UserError, match="does not take connections"):
            listeners.check(record)
        [now] = json.loads(mistralctl("status", "m", "-o", "json").stdout)["items"]
        assert (now["state"], now["why"]) == ("starting", "it does not answer")
        deaf.kill()


def test_where_nobody_listens_there_is_nothing_to_find(ours: Path, mistralctl: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    listeners.check(up(ours, port))
    assert mistralctl("env", "m").returncode == 0


@pytest.mark.linux
def test_a_port_that_a_launcher_of_another_home_holds_is_not_free() -> None:
    """Its server listens on it only once the weights are loaded."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert endpoint.is_free(port)
    holder = ports.hold(port)
    assert holder is not None
    assert not endpoint.is_free(port)
    holder.close()
    assert endpoint.is_free(port)
