"""A failure story of this machine: `make e2e`. The launcher's own test of a hole, with a real server too, is in tests/plugin/test_launcher.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from mistralctl import package_dir
from running import LITTLE, MODEL, Cli

HOLE = """
OPEN |= {("GET", "/leak")}
_lifespan = Guard._lifespan

async def _leaky(self, scope, receive, send):
    scope["app"].add_api_route("/leak", lambda: {"a": "secret"})
    await _lifespan(self, scope, receive, send)

Guard._lifespan = _leaky
"""


def test_a_server_with_an_open_route_is_stopped(cli: Cli, tmp_path: Path) -> None:
    checkout = package_dir("model").parent
    for part in ("deploy", "model", "task_templates"):
        shutil.copytree(checkout / part, tmp_path / "broken" / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "broken" / "model" / "node" / "mistral_node" / "guard.py").open("a") as guard:
        guard.write(HOLE)
    cli.env["PYTHONPATH"] = str(tmp_path / "broken" / "deploy")
    error = cli("up", MODEL, *LITTLE, "--cloud", "local", "--name", "leaky", code=9).stderr
    [line] = [line for line in error.splitlines() if line.startswith("mistralctl: ")]
    assert (
        "the gate found open what should be shut (GET /leak answered 200, 200, 200; asked with no key, wrong key, right key), so the server was"
        in line
    )
    log = (cli.home / "deployments" / "leaky" / "up.log").read_text()
    [row] = [line.split() for line in log.splitlines() if line.startswith("GET ") and "/leak" in line]
    assert row[:5] == ["GET", "/leak", "200", "200", "200"]
    [status] = cli.json("status")
    where = f" (log: {cli.home}/deployments/leaky/up.log)"
    assert (status["state"], f"mistralctl: {status['why'].removesuffix(where)}") == ("failed", line.removesuffix(where))
    assert cli("logs", "leaky").stdout == log
    assert cli.json("down", "leaky")[0]["was"] == "failed"
    assert cli.json("status") == []
    assert cli.processes() == []
