"""What happens when each process of a running deployment is killed (SIGKILL), in turn, on this machine: in seconds.

One deployment of the small model by `mistralctl up --cloud local`, in a home folder of its own that shares the environments and weights of the
user's. After each kill a good client asks every half second. The row says whether it is answered again and after how many seconds, or after how
many nothing of the deployment is left; what `status` says; and what `up` does then. Where a kill ends the deployment, `up` brings it back.

    python benchmarks/kills.py [-o json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from running import LITTLE, MODEL, Cli, down, share_node  # noqa: E402 - found by the line before

NAME, SECONDS, POLL = "kills", 240.0, 0.5


@dataclass(frozen=True)
class Row:
    """What one kill did: seconds until a client was answered again, or until nothing was left; what status says, and what up did."""

    process: str
    answered: float | None
    gone: float | None
    left: int
    status: str
    up: str


def _has(words: list[str], text: str) -> bool:
    return any(text in word for word in words)


# Each process of a deployment, by its words.
PROCESSES: dict[str, Callable[[list[str]], bool]] = {
    "API server of vLLM": lambda words: _has(words, "mistral_node.start"),
    "engine of vLLM": lambda words: _has(words[:1], "EngineCore"),
    "ward": lambda words: words[-1:] != [] and words[-1].endswith("ward.py"),
    "watch": lambda words: _has(words, "/watch.sh"),
    "wrapper": lambda words: _has(words, "/run.sh"),
    "launcher": lambda words: words[-1:] == ["mistral_node.serve"],
}


class Deployment:
    """The deployment of this program."""

    def __init__(self, cli: Cli) -> None:
        self.cli, self.client = cli, dict[str, str]()

    def up(self) -> str:
        """Bring it up; the action that `up` names, and its seconds."""
        began = time.monotonic()
        done = self.cli.json("up", MODEL, *LITTLE, "--cloud", "local", "--name", NAME, "--idle", "never", "--restart", "20")
        self.client = self.cli.json("env", NAME)
        return f"{done['action']} in {time.monotonic() - began:.0f} s"

    def answers(self) -> bool:
        """Whether a client with the key is answered."""
        client = self.client
        asked = urllib.request.Request(
            f"{client['base_url']}/completions", json.dumps({"model": MODEL, "prompt": "A", "max_tokens": 1}).encode(),
            {"Authorization": f"Bearer {client['api_key']}", "Content-Type": "application/json"},
        )  # fmt: skip
        with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=10) as answer:
            return bool(answer.status == 200)
        return False

    def running(self, kind: str) -> list[psutil.Process]:
        """Its processes of a kind."""
        every = {one.pid: one for one in self.cli.processes()}
        for process in list(every.values()):  # vLLM's engine has taken another name
            with contextlib.suppress(psutil.Error):
                every |= {one.pid: one for one in process.children(recursive=True)}
        found = []
        for process in every.values():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline() or [process.name()]
                if PROCESSES[kind](words) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self, kind: str) -> Row:
        """Kill a process of a kind, and see what becomes of the deployment."""
        found = sorted(self.running(kind), key=lambda one: one.create_time())
        if not found:
            raise SystemExit(f"no process is the {kind}: {[one.cmdline() for one in self.cli.processes()]}")
        process = found[0]
        before = self.restarts()
        os.kill(process.pid, signal.SIGKILL)
        began, answered, gone = time.monotonic(), None, None
        process.wait(10)
        while time.monotonic() - began < SECONDS:
            now = time.monotonic() - began
            if not self.cli.processes():
                gone = round(now, 1)
                break
            if self.answers():
                answered = round(time.monotonic() - began, 1)
                if now > 5 or self.restarts() > before:  # a server that is about to end may answer once more
                    break
            time.sleep(POLL)
        [status] = self.cli.json("status", NAME)
        said = status["state"] + (f": {status['why']}" if status["why"] else "")
        restarts = ((status["launcher"] or {}).get("restarts") or {}).get("count")
        said += f"; {restarts} restarts" if restarts else ""
        left = len(self.cli.processes())
        return Row(kind, answered, gone, left, said, self.up())

    def restarts(self) -> int:
        """How often its server was started again."""
        [status] = self.cli.json("status", NAME)
        return int((((status["launcher"] or {}).get("restarts")) or {}).get("count") or 0)


def killed_while_it_waits(deployment: Deployment) -> Row:
    """The laptop's `up` is killed while it follows the log of a server that starts."""
    down(deployment.cli)
    arguments = ("up", MODEL, *LITTLE, "--cloud", "local", "--name", NAME, "--idle", "never")
    process = deployment.cli.start(*arguments)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("engine ..."):
            break
    process.kill()
    process.communicate()
    began = time.monotonic()
    [status] = deployment.cli.json("status", NAME)
    key = (deployment.cli.home / "deployments" / NAME / "api_key").read_text().strip()
    deployment.client = {"base_url": status["base_url"], "api_key": key}
    while not deployment.answers() and time.monotonic() - began < SECONDS:
        time.sleep(POLL)
    answered = round(time.monotonic() - began, 1)
    return Row("`up`, while vLLM starts", answered, None, len(deployment.cli.processes()), "", deployment.up())


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| killed | a client is answered again after | nothing is left after | processes then | status | up |",
        "|---|--:|--:|--:|---|---|",
    ]
    for row in rows:
        seconds = ["-" if one is None else f"{one:.1f} s" for one in (row.answered, row.gone)]
        lines.append(f"| {row.process} | {' | '.join(seconds)} | {row.left} | {row.status} | {row.up} |")
    return "\n".join(lines)


def main() -> None:
    """Kills each in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    output = parser.parse_args().output
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cli = Cli(share_node(Path(folder) / "home"), [sys.executable, "-m", "mistralctl"])
        deployment = Deployment(cli)
        try:
            sys.stderr.write(f"first up: {deployment.up()}\n")
            for kind in PROCESSES:
                rows.append(deployment.kill(kind))
                sys.stderr.write(f"{rows[-1]}\n")
            rows.append(killed_while_it_waits(deployment))
            sys.stderr.write(f"{rows[-1]}\n")
        finally:
            down(cli)
    sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) if output == "json" else table(rows))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
