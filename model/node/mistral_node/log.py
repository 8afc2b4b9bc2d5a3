"""The launcher's log: standard output, which a full disk does not stop and which does not fill a disk.

A file is rotated at LARGEST bytes, into `FILE.1`. What a pipe leads to is not ours: SkyPilot keeps three copies of what a job writes. There
vLLM's lines have a budget, and what is beyond it is counted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import sys
import threading
import time
from pathlib import Path

LARGEST = 16 << 20  # a start writes 60 kB, a served request a line of 100 bytes
BYTES_A_SECOND = 512  # into a pipe, after the first LARGEST: 44 MB a day
_lock = threading.Lock()


class _Budget:
    """Bytes that may be written into a pipe now."""

    def __init__(self) -> None:
        self._left, self._at, self._missing = float(LARGEST), time.monotonic(), 0

    def take(self, text: bytes) -> bytes:
        """What of a text may be written: all or nothing, and before it how many lines were not."""
        now = time.monotonic()
        self._left = min(float(LARGEST), self._left + (now - self._at) * BYTES_A_SECOND)
        self._at = now
        if len(text) > self._left:
            self._missing += 1
            return b""
        self._left -= len(text)
        missing, self._missing = self._missing, 0
        return (b"(%d lines of vLLM are left out: the log is full)\n" % missing if missing else b"") + text


_budget = _Budget()


def line(text: str, *, ours: bool = True) -> None:
    """Writes a line; of vLLM's, not `ours`, as far as there is room. Never fails: what cannot be written is lost."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # in a test it is no file
        sys.stdout.write(f"{text}\n")
        return
    data = f"{text}\n".encode("utf-8", "replace")
    with _lock:
        try:
            found = os.fstat(descriptor)
            if not (stat.S_ISREG(found.st_mode) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND):
                data = data if ours else _budget.take(data)
            elif found.st_size > LARGEST:
                _rotate(descriptor)
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            pass


def _rotate(descriptor: int) -> None:
    """Copies the log to the file beside it and empties it: others write to it, too, so it stays where it is."""
    path = Path(f"/proc/self/fd/{descriptor}").readlink()
    older = path.with_name(f"{path.name}.1")
    older.unlink(missing_ok=True)
    try:
        shutil.copyfile(path, older)
    except OSError:  # the disk is full: the newer half of nothing is better than a full disk
        older.unlink(missing_ok=True)
    os.ftruncate(descriptor, 0)
