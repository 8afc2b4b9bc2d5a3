"""What a place to run tasks can do: implemented for this machine (local.py) and for a rented one (rented.py, by SkyPilot)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mistralctl.lifecycle import Observed
    from mistralctl.phases import PhaseEvent
    from mistralctl.state import Record


@dataclass(frozen=True)
class Attempt:
    """One try to bring a deployment up: its record as it will be, its secrets, and what was there before.

    `keep` saves the record, at once where something exists from now on; `began` is in seconds since the epoch; `note` says what the user should
    know meanwhile; `on_line` is told each line of the task's log.
    """

    record: Record
    secrets: Mapping[str, str]
    observed: Observed
    on_phase: Callable[[PhaseEvent], None]
    keep: Callable[[Record], None]
    began: float
    old: Record | None = None
    disk_bytes: int = 0
    note: Callable[[str], None] = lambda text: None
    on_line: Callable[[str], None] = lambda line: None


class Server(Protocol):
    """A server that was started; its log is followed until `close`."""

    @property
    def record(self) -> Record:
        """The record of the deployment as its start left it."""

    @property
    def events(self) -> list[PhaseEvent]:
        """What was heard so far."""

    def wait(self, phase: str, seconds: float | None = None) -> None:
        """Wait until the task has ended a phase; UserError, in its own words, if it ends before that, or after so many seconds."""

    def close(self) -> None:
        """Stop following its log."""


class Runtime(Protocol):
    """Where a task runs. `rents`: on machines that a cloud has to be asked for; `packages` are those of the laptop that it works by."""

    @property
    def rents(self) -> bool: ...

    @property
    def packages(self) -> tuple[str, ...]: ...

    def cluster(self, name: str) -> str:
        """Return SkyPilot's name of a deployment's machine; empty where none is rented."""

    def observe(self, record: Record | None, wanted: Record | None) -> Observed:
        """Return what is there for what is wanted, or for `down` without that; asks nobody else where the server itself answers."""

    def check(self, attempt: Attempt) -> None:
        """UserError if there is no room for the task where it is to run."""

    def start(self, attempt: Attempt) -> Server:
        """Make the machine, as far as it is not there, set it up and start the server."""

    def replace(self, attempt: Attempt) -> Server:
        """Start the server on a machine that is set up, in the place of one that runs; or go on with the one that is the same."""

    def attach(self, attempt: Attempt) -> Server | None:
        """Return the job of the attempt's task that runs already, its log from the first line on; None if none does."""

    def connect(self, attempt: Attempt, server: Server) -> Record:
        """Make the server reachable from here, and wait until it is."""

    def reconnect(self, record: Record) -> Record:
        """Open the way to the server again; UserError if it needs none."""

    def cancel(self, record: Record) -> Record:
        """End what an `up` that was interrupted left at work."""

    def stop(self, record: Record) -> None:
        """End the server; its machine stays."""

    def remove(self, record: Record) -> bool:
        """Take the machine away; False if there was none."""

    def sweep(self, record: Record, *, promised: bool) -> None:
        """Wait until nothing is left of the machine, and delete what is; `promised`: its end was begun already."""

    def forget(self, record: Record) -> Record:
        """Remove what a deployment left where it ran; its record from now on."""

    def give_up(self, attempt: Attempt, error: BaseException) -> None:
        """Take back what an attempt that failed left; may raise another error that says more."""

    def logs(self, record: Record, *, follow: bool, lines: int | None) -> Iterator[str]:
        """Return pieces of the log's text: the last `lines` lines (None: all); with `follow` also what comes."""

    def read(self, record: Record, file: str) -> str:
        """Return the text of a file below the node's folder, empty where it is not there."""

    def write(self, record: Record, file: str, text: str) -> None:
        """Replace a file below the node's folder as a whole."""

    def exchange(self, record: Record, text: str, old: str) -> bool:
        """Replace the node's file of keys if its text is still `old`; False if it is not."""

    def extend(self, record: Record, until: float) -> None:
        """Let the machine live until then."""
