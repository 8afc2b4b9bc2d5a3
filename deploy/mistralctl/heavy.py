"""What importing large libraries costs, and how it is kept small."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which would walk all that the SDKs of SkyPilot and the clouds make, again and again while they are
    imported and once more when the process ends: that is a fifth of the time of a `status` of 50. What was made by then is never walked."""
    was_on = gc.isenabled()  # not inside another one of these
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.enable()
