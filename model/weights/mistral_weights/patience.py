"""How long to wait, and how often to try again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .errors import Kind, WeightsError

# worth another try: the network; a refused credential (it may have been renewed); a file that a cache cannot find yet;
# a range that arrived damaged
_TRIES: dict[Kind, str] = {
    Kind.UNREACHABLE: "tries",
    Kind.DENIED: "tries_refused",
    Kind.NOT_FOUND: "tries_refused",
    Kind.DAMAGED: "tries_refused",
}


@dataclass(frozen=True)
class Patience:
    """Times in seconds. A peer that sends fewer than `least_bytes` in `stall` seconds counts as dead."""

    connect: float = 10.0
    stall: float = 30.0
    least_bytes: int = 16 * 1024
    tries: int = 8
    tries_refused: int = 3
    first_wait: float = 0.5
    longest_wait: float = 30.0
    lock: float = 6 * 3600.0

    def wait(self, error: WeightsError, failures: int) -> float | None:
        """Seconds to wait after the `failures`-th failure in a row; None when it is enough."""
        name = _TRIES.get(error.kind)
        if name is None or failures >= getattr(self, name):
            return None
        backoff = min(self.longest_wait, self.first_wait * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        return max(backoff, min(error.retry_after, self.longest_wait))
