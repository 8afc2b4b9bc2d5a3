"""All examples of a file, and what they amount to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mistral_chats.chats import Chats
from mistral_chats.encoder import Encoder, Example, TooLong
from mistral_chats.faults import MOST_KEPT, Fault, Malformed
from mistral_chats.formats import Format

MOST_NAMED = 10


@dataclass(frozen=True)
class Summary:
    """What a file amounts to. `learnt` and `tokens` are of one epoch; `longest` is in tokens, at line `longest_line`.

    `by` says which library counted.
    """

    file: str
    format: Format
    rows: int
    examples: int
    learnt: int
    tokens: int
    longest: int
    longest_line: int
    by: str
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The examples of a file in its order, all or the first of them; the summary is of all.

    `lines` has the line of each, `rows` which of the file's chats it is of: in a JSON array several may begin in one line.
    """

    examples: tuple[Example, ...]
    lines: tuple[int, ...]
    rows: tuple[int, ...]
    summary: Summary


def dataset(chats: Chats, encoder: Encoder, max_length: int = 0, keep: int | None = None) -> Dataset:
    """Return the examples of a file; Malformed if a row is not taken by the tokenizer, or longer than `max_length` tokens.

    Nothing is cut: rows that are too long are refused, all of them counted and named. 0 takes any length. `keep`: so many examples are
    kept, where the summary is all that is wanted of the others; None keeps all.
    """
    found = _Counted()
    faults: list[Fault] = []
    count = 0
    long: list[tuple[int, int]] = []
    for row, chat in enumerate(chats.rows):
        try:
            found.add(row, chat.line, encoder.examples(chat, chats.file, max_length), keep)
        except TooLong as error:
            long.append((error.length, chat.line))
        except Malformed as malformed:
            count += malformed.count
            faults += malformed.faults[: MOST_KEPT - len(faults)]
    if long:
        count += 1
        faults.append(_too_long(chats, long, max_length))
    if faults:
        raise Malformed(faults, count)
    summary = Summary(
        chats.file, chats.format, len(chats.rows), found.count, found.learnt, found.tokens, found.longest, found.longest_line, encoder.by,
        chats.ignored,
    )  # fmt: skip
    return Dataset(tuple(found.examples), tuple(found.lines), tuple(found.rows), summary)


class _Counted:
    """What is added up while a file is encoded."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.lines: list[int] = []
        self.rows: list[int] = []
        self.count = self.learnt = self.tokens = self.longest = self.longest_line = 0

    def add(self, row: int, line: int, examples: Sequence[Example], keep: int | None) -> None:
        for example in examples:
            length = len(example.input_ids)
            self.count, self.learnt, self.tokens = self.count + 1, self.learnt + example.learnt, self.tokens + length
            if length > self.longest:
                self.longest, self.longest_line = length, line
            if keep is None or len(self.examples) < keep:
                self.examples.append(example)
                self.lines.append(line)
                self.rows.append(row)


def _too_long(chats: Chats, long: list[tuple[int, int]], max_length: int) -> Fault:
    """Return the fault of all rows that are too long, (tokens, line) of each: the longest first."""
    listed = ", ".join(
        f"line {line} with {length}" for length, line in sorted(long, key=lambda row: (-row[0], row[1]))[:MOST_NAMED]
    )
    more = f" and {len(long) - MOST_NAMED} more" if len(long) > MOST_NAMED else ""
    rows = f"{len(long)} of {len(chats.rows)} rows {'is' if len(long) == 1 else 'are'} longer than {max_length} tokens: {listed}{more}"
    return Fault(chats.file, long[0][1], "", rows, "split or shorten them, or raise --max-length; nothing is cut")
