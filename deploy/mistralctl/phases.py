"""The lines by which a node says how far it is: `mistralctl-phase {...}`, in a log of anything else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

MARK = "mistralctl-phase "
WORDS = {
    "environment": "environment of vLLM",
    "weights": "weights",
    "engine": "engine",
    "check": "check",
    "ready": "ready",
}


@dataclass(frozen=True)
class PhaseEvent:
    """A phase started, ended or failed, at a time in seconds since the epoch; `message` says why it failed."""

    phase: str
    event: Literal["start", "end", "fail"]
    at: float
    message: str = ""


@dataclass(frozen=True)
class Phase:
    """A phase that ended, and its seconds."""

    phase: str
    seconds: float


def parse(line: str) -> PhaseEvent | None:
    """The event that a line of the log carries, None for any other line."""
    start = line.find(MARK)
    if start < 0:
        return None
    try:
        data = json.loads(line[start + len(MARK) :])
        event = PhaseEvent(str(data["phase"]), data["event"], float(data["at"]), str(data.get("message", "")))
    except (ValueError, KeyError, TypeError):
        return None
    return event if event.event in ("start", "end", "fail") else None


def durations(events: Iterable[PhaseEvent]) -> Iterator[Phase]:
    """The phases that ended, in that order, with their seconds."""
    began: dict[str, float] = {}
    for event in events:
        if event.event == "start":
            began[event.phase] = event.at
        elif event.event == "end" and event.phase in began:
            yield Phase(event.phase, round(event.at - began.pop(event.phase), 2))
