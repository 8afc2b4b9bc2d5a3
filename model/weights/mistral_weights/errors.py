"""What can go wrong, and the exit code of each kind."""

from __future__ import annotations

from enum import Enum

from mistral_contract.untrusted import printable


class Kind(Enum):
    """The kinds of failure; each has an exit code of its own."""

    USAGE = "usage"
    NOT_FOUND = "not_found"
    DENIED = "denied"
    CHANGED = "changed"
    DAMAGED = "damaged"
    UNREACHABLE = "unreachable"
    DISK = "disk"
    BUSY = "busy"
    REFUSED = "refused"
    MISSING = "missing"
    INTERRUPTED = "interrupted"


EXIT_CODES: dict[Kind, int] = {
    Kind.USAGE: 2,
    Kind.NOT_FOUND: 3,
    Kind.DENIED: 4,
    Kind.CHANGED: 5,
    Kind.DAMAGED: 6,
    Kind.UNREACHABLE: 7,
    Kind.DISK: 8,
    Kind.BUSY: 9,
    Kind.REFUSED: 10,
    Kind.MISSING: 11,
    Kind.INTERRUPTED: 130,
}


class WeightsError(Exception):
    """One line "what is wrong; what to do", with its kind.

    `retry_after` is the time in seconds that the other side asked us to wait (0: it said nothing).
    """

    def __init__(self, kind: Kind, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(printable(message))
        self.kind = kind
        self.retry_after = retry_after

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.kind]
