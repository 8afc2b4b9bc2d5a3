"""Who is let into the engine next: at most so many sequences at once, keys in turn, and a queue in front of it that ends somewhere."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mistral_node.bodies import SHARE, Bounds

QUEUE = 3  # requests that may wait, for each sequence that runs at once
WAITING_BYTES = 128 << 20
RETRY_SECONDS = 2


class Full(Exception):
    """The queue takes no more."""


@dataclass
class _Place:
    key: str
    sequences: int
    size: int
    let_in: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Places in the engine and in front of it.

    A key that is the only one may have all of them; of several keys each leaves a quarter to the others, here and in the queue. Those that wait
    are let in by turns of their keys, and for one key in their order.
    """

    def __init__(self, bounds: Bounds, several: Callable[[], bool]) -> None:
        # Some more than run at once, so that the engine never waits for the next one.
        self._places = bounds.max_num_seqs + max(1, bounds.max_num_seqs // 4)
        self._share = bounds.sequences
        self._queue = QUEUE * bounds.max_num_seqs
        self._several = several
        self._running: dict[str, int] = {}
        self._waiting: deque[_Place] = deque()

    def enter(self, key: str, sequences: int, size: int) -> _Place:
        """A place, for which `let_in` says when it is in the engine; `leave` gives it back. `size` is what it holds meanwhile, in bytes.

        Full if too many wait, of this key or of all.
        """
        place = _Place(key, sequences, size)
        self._waiting.append(place)
        self._let_in()
        if place.let_in.done():
            return place
        own = sum(one.key == key for one in self._waiting)
        held = sum(one.size for one in self._waiting)
        if own > self._queue * (SHARE if self._several() else 1) or len(self._waiting) > self._queue or held > WAITING_BYTES:
            self._waiting.remove(place)
            raise Full
        return place

    def leave(self, place: _Place) -> None:
        """It has ended, or waits no more."""
        if place.let_in.done():
            self._running[place.key] -= place.sequences
            if not self._running[place.key]:
                del self._running[place.key]
        else:
            self._waiting.remove(place)
        self._let_in()

    def _let_in(self) -> None:
        tried = set()
        for place in sorted(self._waiting, key=lambda one: self._running.get(one.key, 0)):  # who has least comes first
            own = self._running.get(place.key, 0)
            if place.key in tried:
                continue
            most = self._share if self._several() else self._places
            if sum(self._running.values()) + place.sequences <= self._places and own + place.sequences <= most:
                self._waiting.remove(place)
                self._running[place.key] = own + place.sequences
                place.let_in.set_result(None)
            else:
                tried.add(place.key)
