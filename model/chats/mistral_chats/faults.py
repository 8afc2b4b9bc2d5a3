"""What is wrong with a file of chats: where, what, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mistral_contract import untrusted

MOST_KEPT = 1000  # faults of one file that are kept; all are counted
MOST_LINES = 10  # lines of other faults that the first one names


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a row: its file, its line (0: the file as a whole), its field, what is wrong, what to do.

    >>> str(Fault("chats.jsonl", 3, "messages[1].role", "'bot' is no role", "use system, user, assistant or tool"))
    "chats.jsonl:3: messages[1].role: 'bot' is no role; use system, user, assistant or tool"
    """

    file: str
    line: int
    field: str
    wrong: str
    mend: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return untrusted.line(": ".join(part for part in (place, self.field, f"{self.wrong}; {self.mend}") if part))


class Malformed(ValueError):
    """A file whose rows cannot be trained on; its text is one line: the first fault, and the lines of the others.

    `faults` has the first MOST_KEPT, `count` says how many there are.
    """

    def __init__(self, faults: Sequence[Fault], count: int = 0) -> None:
        self.faults = tuple(faults)
        self.count = max(count, len(faults))
        super().__init__(_line(self.faults, self.count))


class NoTokenizer(ValueError):
    """A folder whose tokenizer cannot be used, or a library that is not installed: what is wrong and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(untrusted.line(message))


class Wrong(Exception):
    """What is wrong with a field, raised where its file and line are not known."""

    def __init__(self, field: str, wrong: str, mend: str) -> None:
        super().__init__(wrong)
        self.field, self.wrong, self.mend = field, wrong, mend


def _line(faults: Sequence[Fault], count: int) -> str:
    """Return the first fault, and how many others there are, in which lines."""
    if count < 2:
        return str(faults[0])
    lines = list(dict.fromkeys(str(fault.line) for fault in faults[1:] if fault.line != faults[0].line))
    named = ", ".join(lines[:MOST_LINES]) + (", ..." if len(lines) > MOST_LINES or count > len(faults) else "")
    where = f" in line{'s' if len(lines) > 1 else ''} {named}" if lines else ""
    return f"{faults[0]} (and {count - 1} more fault{'s' if count > 2 else ''}{where})"


class Faults:
    """The faults of one file, while it is read."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.kept: list[Fault] = []
        self.count = 0

    @contextmanager
    def of_line(self, line: int) -> Iterator[None]:
        """Keep what is raised as Wrong inside as a fault of a line."""
        try:
            yield
        except Wrong as wrong:
            self.count += 1
            if len(self.kept) < MOST_KEPT:
                self.kept.append(Fault(self.file, line, wrong.field, wrong.wrong, wrong.mend))

    def judge(self) -> None:
        """Raise Malformed if there is any."""
        if self.kept:
            raise Malformed(self.kept, self.count)
