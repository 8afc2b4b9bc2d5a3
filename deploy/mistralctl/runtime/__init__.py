"""Where a task runs: this machine, or one that SkyPilot rents."""

from __future__ import annotations

from mistralctl.clouds import LOCAL
from mistralctl.runtime.protocol import Runtime


def of(cloud: str) -> Runtime:
    """Return the runtime of a cloud, or of this machine."""
    if cloud == LOCAL:
        from mistralctl.runtime import local

        return local.Local()
    from mistralctl.runtime import rented

    return rented.Rented()
