"""What lies at the address that the result goes to: read and written by the weights tool, in the environment that has the store's SDK."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mistral_contract
import mistral_weights

from mistral_tune.errors import TuneError
from mistral_tune.job import Job

NOT_FOUND, DAMAGED = "not_found", "damaged"


class StoreError(TuneError):
    """What the weights tool said; `kind` is its own word for it."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Store:
    """The weights tool of one run."""

    python: Path
    secrets: Path

    @classmethod
    def of(cls, job: Job) -> Store:
        """Return the tool that set-up made for this run."""
        return cls(job.weights_python, job.secrets)

    def start(self, verb: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a verb of the tool; `finish` waits for it."""
        sources = [str(Path(module.__file__ or "").parents[1]) for module in (mistral_weights, mistral_contract)]
        command: Sequence[str] = [
            str(self.python), "-m", "mistral_weights", verb, *map(str, arguments), "--secrets", str(self.secrets), "-o", "json",
        ]  # fmt: skip
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(sources)}
        try:
            return subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise StoreError(f"{self.python} cannot be run ({error.strerror}); run the set-up again") from None

    def ask(self, verb: str, *arguments: str | Path) -> dict[str, Any]:
        """Run a verb of the tool and return its result; StoreError if it fails."""
        return finish(self.start(verb, *arguments))

    def look(self, uri: str) -> tuple[str, str]:
        """Return revision and source of the set at an address; empty texts if nothing is there, or nothing whole."""
        try:
            found = self.ask("ls", uri, "--format", "folder")
        except StoreError as error:
            if error.kind in (NOT_FOUND, DAMAGED):
                return "", ""
            raise
        return str(found["revision"]), str(found["source"])


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a verb of the tool and return its result; StoreError if it fails."""
    out, _ = process.communicate()
    last: dict[str, Any] = {}
    for line in out.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") in ("result", "error"):
            last = event
    if process.returncode or last.get("event") != "result":
        raise StoreError(
            str(last.get("message") or f"the weights tool ended with code {process.returncode}"), str(last.get("kind", ""))
        )
    return last
