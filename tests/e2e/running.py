"""Running mistralctl in a home folder of its own, with the node's environments and weights of the user's home."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
from mistralctl import state

MODEL = "smollm2-135m-instruct"
# Options with which it takes 1 GiB of cache, not 3: up to four servers run at a time beside two SkyPilots.
LITTLE = ("--max-concurrency", "2")


class Cli:
    """Runs mistralctl in a home folder of its own."""

    def __init__(self, home: Path, command: list[str], **variables: str) -> None:
        self.home, self.command = home, command
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MISTRALCTL_") or key == "MISTRALCTL_DEBUG"}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        self.env = kept | {"MISTRALCTL_HOME": str(home)} | variables

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts a command and returns at once."""
        return subprocess.Popen(
            [*self.command, *arguments], env=self.env, cwd=self.home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __call__(self, *arguments: str, code: int = 0, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs a command; fails the test unless it ends with `code`."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, f"{arguments}: {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str) -> Any:
        """The JSON result of a command, without its envelope."""
        found = json.loads(self(*arguments, "-o", "json").stdout)
        assert found.pop("version") == 1
        return found.get("items", found)

    def json_lines(self, *arguments: str) -> list[Any]:
        """The JSON lines of a command that tells its progress in them."""
        return [json.loads(line) for line in self(*arguments, "-o", "json").stdout.splitlines()]

    def processes(self) -> list[psutil.Process]:
        """Every process that works in this home folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.home) in " ".join([*process.cmdline(), process.environ().get("MISTRALCTL_NODE_DIR", "")]):
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.pid != os.getpid()]


def on_nodes(below: Path, name: str) -> list[psutil.Process]:
    """A deployment's processes on simulated nodes whose disks lie below this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("MISTRALCTL_NAME") == name
            if ours and f"upperdir={below}/" in Path(f"/proc/{process.pid}/mountinfo").read_text():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def launchers(below: Path, name: str) -> list[psutil.Process]:
    """The launchers of a deployment on simulated nodes."""
    return [one for one in on_nodes(below, name) if _words(one)[-1:] == ["mistral_node.serve"]]


def stopped(below: Path, name: str, script: str) -> list[psutil.Process]:
    """The processes of a script on simulated nodes, which hang from now on."""
    found = [one for one in on_nodes(below, name) if _words(one)[:1] == ["bash"] and _words(one)[-1].endswith(f"/{script}")]
    for process in found:
        process.suspend()
    return found


def share_node(home: Path) -> Path:
    """Lets a home folder use the environments and weights that the user's own home has (or will have)."""
    node, own = home / "node", state.home() / "node"
    node.mkdir(parents=True)
    for part in ("envs", "weights"):
        (own / part).mkdir(parents=True, exist_ok=True)
        (node / part).symlink_to(own / part)
    return home


def down(cli: Cli) -> None:
    """Ends whatever a test left."""
    cli.start("down", "--all").communicate(timeout=600)
