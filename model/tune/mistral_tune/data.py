"""The chats as rows of token ids: what is learnt, and what is held out to see whether it was."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import mistral_chats
from mistral_chats import Chats, Encoder, Example

from mistral_tune.errors import TuneError
from mistral_tune.job import Job

LEAST_TO_HOLD_OUT, MOST_HELD_OUT = 10, 64  # chats


@dataclass(frozen=True)
class Learnt:
    """`rows` are trained on. `held_out` are not, unless `seen`: of too few chats none is held out, and those that are learnt are asked."""

    rows: tuple[Example, ...]
    held_out: tuple[Example, ...]
    seen: bool
    by: str

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, of those held out, too."""
        return max(len(row.input_ids) for row in (*self.rows, *self.held_out))


@dataclass(frozen=True)
class Packing:
    """How rows become steps: `length` tokens are the most of a packed row, `accumulated` rows of each process make a step."""

    length: int
    accumulated: int


def learnt(job: Job, tokenizer: Path) -> Learnt:
    """Return the rows of a run, encoded as the server sees them; TuneError if a chat is wrong, or longer than `max_length`."""
    wanted = job.wanted
    try:
        encoder = mistral_chats.encode(tokenizer, "mistral" if wanted.tokenizer_mode == "mistral" else "hf")
        chats = mistral_chats.read(job.chats)
        rows = _encoded(chats, encoder, wanted.max_length)
        if job.held_out is not None:
            others = mistral_chats.read(job.held_out)
            return Learnt(_flat(rows), _flat(_encoded(others, encoder, wanted.max_length)), False, encoder.by)
    except (mistral_chats.Malformed, mistral_chats.NoTokenizer) as error:
        raise TuneError(str(error).splitlines()[0]) from None
    chosen = held_out(len(rows), wanted.seed)
    if not chosen:
        return Learnt(_flat(rows), _flat(rows[:MOST_HELD_OUT]), True, encoder.by)
    apart = [rows[number] for number in chosen]
    return Learnt(_flat([row for number, row in enumerate(rows) if number not in set(chosen)]), _flat(apart), False, encoder.by)


def held_out(chats: int, seed: int) -> list[int]:
    """Return which chats are held out: one of twenty, at least one and at most 64; none of fewer than ten.

    >>> len(held_out(200, seed=0))
    10
    """
    if chats < LEAST_TO_HOLD_OUT:
        return []
    count = min(MOST_HELD_OUT, max(1, chats // 20))
    return sorted(random.Random(seed).sample(range(chats), count))  # noqa: S311 (no secret)


def _encoded(chats: Chats, encoder: Encoder, longest: int) -> list[list[Example]]:
    """Return the examples of each chat."""
    found = mistral_chats.dataset(chats, encoder, longest)
    by_chat: dict[int, list[Example]] = {}
    for number, example in zip(found.rows, found.examples, strict=True):  # several chats of a JSON array may stand in one line
        by_chat.setdefault(number, []).append(example)
    return list(by_chat.values())


def _flat(rows: list[list[Example]]) -> tuple[Example, ...]:
    return tuple(example for row in rows for example in row)


def packing(longest: int, max_length: int, batch_tokens: int, processes: int) -> Packing:
    """Return how rows are packed: a step of all processes has about `batch_tokens` tokens, a row at most `max_length`, and fits the longest.

    >>> packing(longest=300, max_length=4096, batch_tokens=16384, processes=2)
    Packing(length=4096, accumulated=2)
    >>> packing(longest=300, max_length=4096, batch_tokens=256, processes=1)
    Packing(length=300, accumulated=1)
    """
    length = max(longest, min(max_length, batch_tokens // processes))
    return Packing(length, max(1, batch_tokens // (length * processes)))
