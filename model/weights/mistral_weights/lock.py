"""One process works on a set at a time; a second one waits and then shares what the first has brought."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .disk import explained, still_there
from .errors import Kind, WeightsError
from .events import Report, Waiting


@contextmanager
def locked(path: Path, patience: float, report: Report) -> Iterator[None]:
    """Holds the lock file `path`; the system frees it when we die. Waits at most `patience` seconds."""
    handle = _acquire(path, patience, report)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while we hold it: who waits looks whether his file is still the one at `path`
        os.close(handle)


def _acquire(path: Path, patience: float, report: Report) -> int:
    end = time.monotonic() + patience
    said = False
    while True:
        with explained(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if still_there(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
            os.close(handle)
            continue
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
        if time.monotonic() >= end:
            raise WeightsError(
                Kind.BUSY, f"process {holder or 'unknown'} has been working on the same set for too long; look at it"
            )
        if not said:
            report(Waiting(f"process {holder or 'unknown'}, which works on the same set"))
            said = True
        time.sleep(0.1)
