"""All examples of a file, and what they amount to."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_chats.chats import Chats
from mistral_chats.encoder import Encoder, Example
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
    """The examples of a file in its order, with the line of each."""

    examples: tuple[Example, ...]
    lines: tuple[int, ...]
    summary: Summary


def dataset(chats: Chats, encoder: Encoder, max_length: int = 0) -> Dataset:
    """Return the examples of a file; Malformed if a row is not taken by the tokenizer, or longer than `max_length` tokens.

    Nothing is cut: rows that are too long are refused, all of them counted and named. 0 takes any length.
    """
    examples: list[Example] = []
    lines: list[int] = []
    faults: list[Fault] = []
    count = 0
    long: dict[int, int] = {}
    for chat in chats.rows:
        try:
            found = encoder.examples(chat, chats.file)
        except Malformed as malformed:
            count += malformed.count
            faults += malformed.faults[: MOST_KEPT - len(faults)]
            continue
        longest = max(len(example.input_ids) for example in found)
        if max_length and longest > max_length:
            long[chat.line] = longest
        examples += found
        lines += [chat.line] * len(found)
    if long:
        count += 1
        faults.append(_too_long(chats, long, max_length))
    if faults:
        raise Malformed(faults, count)
    at = max(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    summary = Summary(
        chats.file, chats.format, len(chats.rows), len(examples), sum(each.learnt for each in examples),
        sum(len(each.input_ids) for each in examples), len(examples[at].input_ids), lines[at], encoder.by, chats.ignored,
    )  # fmt: skip
    return Dataset(tuple(examples), tuple(lines), summary)


def _too_long(chats: Chats, long: dict[int, int], max_length: int) -> Fault:
    """Return the fault of all rows that are too long: the longest first."""
    named = sorted(long, key=lambda line: -long[line])
    listed = ", ".join(f"line {line} with {long[line]}" for line in named[:MOST_NAMED])
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    rows = f"{len(long)} of {len(chats.rows)} rows {'is' if len(long) == 1 else 'are'} longer than {max_length} tokens: {listed}{more}"
    return Fault(chats.file, min(long), "", rows, "split or shorten them, or raise --max-length; nothing is cut")
