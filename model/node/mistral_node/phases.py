"""How far the launcher is: lines for the log, and status.json, always replaced as a whole."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_contract.phases import Kind, PhaseEvent
from mistral_node import disk, log


def say(phase: str, event: Kind, message: str = "") -> float:
    """Prints one event of the contract; its time in seconds since the epoch."""
    at = round(time.time(), 3)
    log.line(PhaseEvent(phase, event, at, message).line())
    return at


class Status:
    """status.json: `set` changes fields and writes the file. Where that fails, as on a full disk, the next `set` tries again."""

    def __init__(self, file: Path, **fields: Any) -> None:
        self.file = file
        self.fields: dict[str, Any] = {
            "schema": 1, "pid": os.getpid(), "state": "starting", "phase": "", "phases": [], "started_at": time.time(),
            "ready_at": None, "isolation": None, "ends_at": None, "budget": None, "flags": None, "engine": None, "canary": None,
            "requests": {"served": 0, "running": 0, "last_at": None},
            "restarts": {"count": 0, "of": 0, "why": None, "at": None}, "keys": None, "error": None, **fields,
        }  # fmt: skip
        self.watched: Callable[[], dict[str, Any]] = dict  # fields that change by themselves, looked at with each `set`
        self._written = False
        self.set()

    def set(self, **fields: Any) -> None:
        """Changes fields and replaces the file, only if anything changed."""
        fields = self.watched() | fields
        changed = any(self.fields.get(key, self) != value for key, value in fields.items())
        if self._written and not changed and self.file.exists():
            return
        self.fields |= fields
        self._written = disk.replaced(self.file, json.dumps(self.fields, indent=1) + "\n")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase: said at its start and at its end, with its seconds in the status."""
        began = say(phase, "start")
        self.set(phase=phase)
        yield
        seconds = round(say(phase, "end") - began, 2)
        self.set(phases=[*self.fields["phases"], {"phase": phase, "seconds": seconds}])
