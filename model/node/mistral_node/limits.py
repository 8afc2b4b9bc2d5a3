"""How much each key has asked: counts, limits, and the tokens of an answer as it passes. What a key costs in memory does not grow."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from typing import Any

from mistral_contract.keys import Key

SLOTS = 60
DAY = 86400.0
PROMPT_BYTES = 4  # of a request for each token of its prompt, where vLLM does not say how many it has
# Quotes inside a JSON string are escaped, so no text of a prompt or an answer looks like this.
USAGE = re.compile(rb'"usage":\s*\{[^{}]*?"total_tokens":\s*([0-9]{1,12})')
TAIL = 256


class Window:
    """What was added in the last `seconds`, to a 60th of them: never less, at most that 60th too long."""

    def __init__(self, seconds: float) -> None:
        self._step = seconds / SLOTS
        self._counts = [0] * (SLOTS + 1)
        self._newest = 0

    def _turn(self, now: float) -> None:
        slot = int(now / self._step)
        if (
            slot < self._newest
        ):  # the clock went back, or the file was damaged: what was counted keeps its age, and does not stay for ever
            turned = (slot - self._newest) % len(self._counts)
            self._counts, self._newest = self._counts[-turned:] + self._counts[:-turned], slot
        for each in range(max(self._newest + 1, slot - SLOTS), slot + 1):
            self._counts[each % len(self._counts)] = 0
        self._newest = max(self._newest, slot)

    def add(self, now: float, amount: int) -> None:
        """Counts so many now."""
        self._turn(now)
        self._counts[self._newest % len(self._counts)] += amount

    def total(self, now: float) -> int:
        """The sum."""
        self._turn(now)
        return sum(self._counts)

    def wait(self, now: float, limit: int) -> int:
        """Seconds, at least one, until the sum is below a limit if nothing is added."""
        left = self.total(now)
        for slot in range(self._newest - SLOTS, self._newest + 1):
            left -= self._counts[slot % len(self._counts)]
            if left < limit:
                return max(1, math.ceil((slot + SLOTS + 1) * self._step - now))
        return math.ceil(self._step * SLOTS)

    def dump(self) -> list[int]:
        """What `load` takes."""
        return [self._newest, *self._counts]

    def load(self, data: Any) -> None:
        """Goes on from what `dump` gave; ValueError if it is anything else."""
        if not isinstance(data, list) or len(data) != SLOTS + 2 or not all(type(one) is int and one >= 0 for one in data):
            raise ValueError("is no window")
        self._newest, self._counts = data[0], data[1:]


class Account:
    """What one key has asked since the deployment began on this node."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.refused = self.running = 0
        self._asked, self._minute, self._day = Window(60), Window(60), Window(DAY)

    def held(self, key: Key, now: float) -> tuple[str, int] | None:
        """The limit of the key that another request would break, and the seconds until it does not."""
        if key.requests_at_once is not None and self.running >= key.requests_at_once:
            return "requests_at_once", 1
        for name, limit, window in (
            ("requests_per_minute", key.requests_per_minute, self._asked),
            ("tokens_per_minute", key.tokens_per_minute, self._minute),
            ("tokens_per_day", key.tokens_per_day, self._day),
        ):
            if limit is not None and window.total(now) >= limit:
                return name, window.wait(now, limit)
        return None

    def begin(self, now: float) -> None:
        """A request began."""
        self.requests += 1
        self.running += 1
        self._asked.add(now, 1)

    def end(self, now: float, tokens: int) -> None:
        """A request ended, with so many tokens of prompt and answer."""
        self.running -= 1
        self.tokens += tokens
        self._minute.add(now, tokens)
        self._day.add(now, tokens)

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return {"requests": self.requests, "tokens": self.tokens, "refused": self.refused, "day": self._day.dump()}

    @classmethod
    def load(cls, data: dict[str, Any]) -> Account:
        """One that goes on from what `dump` gave; ValueError, TypeError or KeyError if it is anything else."""
        found = cls()
        found.requests, found.tokens, found.refused = (int(data[name]) for name in ("requests", "tokens", "refused"))
        found._day.load(data["day"])
        return found


class Meter:
    """Counts the tokens of one request while its answer passes.

    vLLM says them in `usage`, at the end of an answer and of a stream that asks for that, as the guard does where the client does not:
    `asked`. Of a stream that its client leaves each event counts as one, and its prompt by its size.
    """

    def __init__(self) -> None:
        self.asked = False
        self.status: int | None = None
        self.received = 0
        self._events = 0
        self._said: int | None = None
        self._tail = b""

    def feed(self, piece: bytes) -> None:
        """A piece of the answer's body."""
        self._events += piece.count(b"data: {")
        together = self._tail + piece
        for found in USAGE.finditer(together):
            self._said = int(found[1])
        self._tail = together[-TAIL:]

    def shown(self, piece: bytes) -> bytes:
        """What the client gets of a piece: not the event that has usage alone, if only the guard has asked for it."""
        if not self.asked or not piece.startswith(b"data: {") or b'"choices":[]' not in piece:
            return piece
        with suppress(ValueError):
            event = json.loads(piece[len(b"data: ") :])
            if event["choices"] == [] and event.get("usage"):
                return b""
        return piece

    @property
    def tokens(self) -> int:
        """Of prompt and answer, as far as that is known; a request that was refused has none."""
        if self._said is not None:
            return self._said
        if self.status is not None and (self.status >= 400 or not self._events):
            return 0
        return self._events + math.ceil(self.received / PROMPT_BYTES)  # a stream, or a client that went before its answer
