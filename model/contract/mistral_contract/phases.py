"""The lines by which a node says how far it is: `mistralctl-phase {...}`, in a log of anything else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, get_args

from mistral_contract import untrusted

MARK = "mistralctl-phase "
Kind = Literal["start", "end", "fail"]
# The phases in whose course a node prints lines, in their order; `outside` is the laptop's own and in no log.
PHASES = {
    "environment": "`setup` installs vLLM and our packages",
    "weights": "`setup` pulls weights, adapters and chats, beside `environment`; a mirror's only phase",
    "train": "a run of training learns, from its last checkpoint on",
    "prove": "vLLM serves what was trained, and its figures are held against those of the training",
    "publish": "what was trained goes to its place. The last phase of a run of training",
    "engine": "vLLM starts",
    "check": "the canary, and what each adapter changes",
    "gate": "the launcher walks every route of its server",
    "ready": "has an `end` only: the server is open. One that is started again says `engine` to `ready` again",
    "outside": "the laptop's own walk, in no log",
}


@dataclass(frozen=True)
class PhaseEvent:
    """A phase started, ended or failed, at a time in seconds since the epoch; `message` says why it failed."""

    phase: str
    event: Kind
    at: float
    message: str = ""

    def line(self) -> str:
        """The line of the log that carries this event."""
        data = {"phase": self.phase, "event": self.event, "at": self.at} | ({"message": self.message} if self.message else {})
        return MARK + json.dumps(data)


def parse(line: str) -> PhaseEvent | None:
    """The event that a line of the log carries, None for any other line."""
    start = line.find(MARK)
    if start < 0:
        return None
    try:
        data = untrusted.read(line[start + len(MARK) :])
        phase, message = untrusted.printable(str(data["phase"])), untrusted.printable(str(data.get("message", "")))
        event = PhaseEvent(phase, data["event"], float(data["at"]), message)
    except (ValueError, KeyError, TypeError):
        return None
    return event if event.event in get_args(Kind) else None
