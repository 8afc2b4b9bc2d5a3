"""How long to wait, and how often to try again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .errors import Kind, WeightsError


@dataclass(frozen=True)
class Patience:
    """Times in seconds. A peer that sends fewer than `least_bytes` in `stall` seconds counts as dead.

    `tries` are for what passes by itself (the network, a busy server). `tries_refused` are for what may pass: a refused
    credential that is being renewed, a file that a cache does not know yet, a range that arrived damaged.
    """

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
        tries = {
            Kind.UNREACHABLE: self.tries,
            Kind.DENIED: self.tries_refused,
            Kind.NOT_FOUND: self.tries_refused,
            Kind.DAMAGED: self.tries_refused,
        }
        if failures >= tries.get(error.kind, 0):
            return None
        spread = random.uniform(0.5, 1.0)  # noqa: S311 (no secret: only so that many do not come back at once)
        backoff = min(self.longest_wait, self.first_wait * 2.0 ** (failures - 1)) * spread
        return max(backoff, min(error.retry_after, self.longest_wait))
