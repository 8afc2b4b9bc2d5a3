"""Requests served and running, shared by the guard (which counts, in vLLM's process) and the launcher (which reads).

32 bytes in a memory-mapped file: two counts, a time, two words of the launcher (that no more requests are taken, and that the gate was
passed), and how often the engine has answered. No route that a client could call, no call between processes, and nothing written to disk
with each request.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from mistral_contract import files

LAYOUT = struct.Struct("<QQd")
COUNTS, LAST_AT = struct.Struct("<QQ"), struct.Struct("<d")  # its parts
DRAINING, OPEN = (
    LAYOUT.size,
    LAYOUT.size + 1,
)  # the bytes behind the counts; the guard writes before them, the launcher only there
SIZE = 32
BEATS, AT_BEATS = struct.Struct("<I"), 28  # the guard's, too


@dataclass(frozen=True)
class Count:
    """`last_at` is when a request last began or ended, seconds since the epoch; 0.0 before the first."""

    served: int
    running: int
    last_at: float


class Traffic:
    """The counter in a folder; made empty with `fresh`."""

    def __init__(self, run_dir: Path, *, fresh: bool = False) -> None:
        path = run_dir / files.TRAFFIC.name
        if fresh or not path.exists():
            path.write_bytes(bytes(SIZE))
            path.chmod(0o666)  # for the two users that can enter the folder
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)

    def read(self) -> Count:
        """The counts now."""
        return Count(*LAYOUT.unpack_from(self._map))

    def _change(self, served: int, running: int) -> None:
        now = self.read()
        # The time first: who reads in between must not take the end of a long request for one of long ago.
        LAST_AT.pack_into(self._map, COUNTS.size, time.time())
        COUNTS.pack_into(self._map, 0, now.served + served, max(0, now.running + running))

    def drain(self) -> None:
        """From now on the guard takes no more requests."""
        self._map[DRAINING] = 1

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._map[DRAINING] == 1

    def open(self) -> None:
        """From now on the guard takes requests from everybody, no longer the launcher's own."""
        self._map[OPEN] = 1

    @property
    def is_open(self) -> bool:
        """Whether the gate was passed."""
        return self._map[OPEN] == 1

    @property
    def beats(self) -> int:
        """Changes whenever the engine has answered something."""
        return int(BEATS.unpack_from(self._map, AT_BEATS)[0])

    def beat(self) -> None:
        """The engine has answered something."""
        BEATS.pack_into(self._map, AT_BEATS, (self.beats + 1) & 0xFFFFFFFF)

    def go_on(self, before: Count) -> None:
        """Counts on from a server that died, before the next one begins."""
        LAYOUT.pack_into(self._map, 0, before.served, 0, before.last_at)

    def begin(self) -> None:
        """A request began."""
        self._change(0, 1)

    def end(self) -> None:
        """A request ended."""
        self._change(1, -1)
