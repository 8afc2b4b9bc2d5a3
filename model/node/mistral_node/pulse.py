"""Whether the engine still answers. The guard asks it for a token when nobody else got one for a while; the launcher counts how long none came."""

from __future__ import annotations

import time

SECONDS = 20.0  # between two questions
# Without an answer: three questions are missed, then the server is started again. A step of a small CPU with a large model takes 20 s.
MISSED_SECONDS, STUCK_SECONDS = 60.0, 120.0
LONGEST_LOOK = 2.0  # a launcher that was stopped itself, or whose machine slept, has not seen that nothing came


class Pulse:
    """How long an engine has been silent, by a number that changes whenever it answers."""

    def __init__(self, beats: int) -> None:
        self._beats, self._silent, self._looked = beats, 0.0, time.monotonic()

    def silent(self, beats: int) -> float:
        """Seconds without an answer; to be asked often."""
        now = time.monotonic()
        self._silent += min(now - self._looked, LONGEST_LOOK)
        self._looked = now
        if beats != self._beats:
            self._beats, self._silent = beats, 0.0
        return self._silent
