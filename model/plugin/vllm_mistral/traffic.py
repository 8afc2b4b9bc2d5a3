"""Requests served and running, shared by the guard (which counts, in vLLM's process) and the launcher (which reads).

Sixteen bytes of counts and eight of time in a memory-mapped file: no route that a client could call, and nothing written to
disk with each request.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

FILE = "traffic"
LAYOUT = struct.Struct("<QQd")


@dataclass(frozen=True)
class Count:
    """`last_at` is when a request last began or ended, seconds since the epoch; 0.0 before the first."""

    served: int
    running: int
    last_at: float


class Traffic:
    """The counter in a folder; made empty with `fresh`."""

    def __init__(self, run_dir: Path, *, fresh: bool = False) -> None:
        path = run_dir / FILE
        if fresh or not path.exists():
            path.write_bytes(bytes(LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), LAYOUT.size)

    def read(self) -> Count:
        """The counts now."""
        return Count(*LAYOUT.unpack(self._map[:]))

    def _change(self, served: int, running: int) -> None:
        now = self.read()
        self._map[:] = LAYOUT.pack(now.served + served, max(0, now.running + running), time.time())

    def begin(self) -> None:
        """A request began."""
        self._change(0, 1)

    def end(self) -> None:
        """A request ended."""
        self._change(1, -1)
