"""How far an `up` is: what the lines of its log say, of the node (mistral_contract.phases) and of SkyPilot."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from mistral_contract.phases import PhaseEvent, parse

__all__ = ["Milestones", "Phase", "PhaseEvent", "durations", "full_memory", "parse"]

WORDS = {
    "optimize": "choice of machine",
    "provision": "machine",
    "node": "SkyPilot's runtime on it",
    "files": "files",
    "environment": "environment of vLLM",
    "weights": "weights",
    "train": "training",
    "prove": "proof in vLLM",
    "publish": "upload",
    "engine": "engine",
    "check": "check",
    "ready": "ready",
    "gate": "gate",
    "outside": "gate from outside",
}


@dataclass(frozen=True)
class Phase:
    """A phase that ended, and its seconds."""

    phase: str
    seconds: float


# What SkyPilot prints when it comes to each of these. Where a version says it otherwise, the phases before it are one.
SKYPILOT = (("provision", "Launching on"), ("node", "is up."), ("files", "Syncing files"))


class Milestones:
    """Events of SkyPilot's phases, from the lines of its log: optimize, provision, node. Ended by the first line of our own set-up."""

    def __init__(self) -> None:
        self._now: str | None = None

    def begin(self, at: float) -> Iterator[PhaseEvent]:
        """The first phase starts."""
        self._now = "optimize"
        yield PhaseEvent("optimize", "start", at)

    def read(self, line: str, at: float) -> Iterator[PhaseEvent]:
        """The events that a line of the log stands for."""
        event = parse(line)
        if event is not None:
            yield from self.finish(at)
            yield event
            return
        order = ["optimize", *(phase for phase, _ in SKYPILOT)]
        for phase, mark in SKYPILOT:
            if self._now is not None and mark in line and order.index(phase) == order.index(self._now) + 1:
                yield PhaseEvent(self._now, "end", at)
                yield PhaseEvent(phase, "start", at)
                self._now = phase

    def finish(self, at: float) -> Iterator[PhaseEvent]:
        """The phase that still runs ends."""
        if self._now is not None:
            yield PhaseEvent(self._now, "end", at)
            self._now = None


# What Ray, by which SkyPilot runs jobs, writes into a job's log when it ends the job; the job's status says so only minutes later.
FULL_MEMORY = re.compile(r"Memory on the node .* was running was (\S+) / (\S+) .*Ray killed this worker")


def full_memory(line: str) -> str:
    """Why Ray ended the job, if that is what a line of its log says; empty otherwise."""
    full = FULL_MEMORY.search(line)
    if full is None:
        return ""
    return (
        f"the machine's memory was full ({full[1]} of {full[2]}), so Ray, by which SkyPilot runs jobs, ended ours; take a machine with more "
        "memory, or lower --max-concurrency if it serves"
    )


def durations(events: Iterable[PhaseEvent]) -> Iterator[Phase]:
    """The phases that ended, in that order, with their seconds."""
    began: dict[str, float] = {}
    for event in events:
        if event.event == "start":
            began[event.phase] = event.at
        elif event.event == "end" and event.phase in began:
            yield Phase(event.phase, round(event.at - began.pop(event.phase), 2))


@dataclass
class Progress:
    """What was heard so far of a task, passed on as it comes."""

    on_phase: Callable[[PhaseEvent], None]
    on_line: Callable[[str], None] = lambda line: None
    milestones: Milestones = field(default_factory=Milestones)
    events: list[PhaseEvent] = field(default_factory=list)
    failure: str = ""
    last: str = ""

    def hear(self, event: PhaseEvent) -> None:
        """Take an event."""
        self.events.append(event)
        if event.event == "fail":
            self.failure = event.message
        self.on_phase(event)

    def line(self, line: str) -> None:
        """Take a line of SkyPilot's or of the task's log."""
        if parse(line) is None and line.strip():
            self.last = line.strip()
        self.failure = full_memory(line) or self.failure
        self.on_line(line)
        for event in self.milestones.read(line, time.time()):
            self.hear(event)

    def begin(self) -> None:
        """Note that SkyPilot begins."""
        for event in self.milestones.begin(time.time()):
            self.hear(event)

    def ended(self, phase: str) -> bool:
        """Return whether a phase has come to its end."""
        return any(event.phase == phase and event.event == "end" for event in self.events)
