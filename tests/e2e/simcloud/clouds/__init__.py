"""The simulated clouds: a row here, one file each. A file says what the laptop needs to reach it, and serves it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast


class Backend(Protocol):
    """What each file here has. `PORTS`: where it listens on loopback; `NAMES`: the names of hosts that lead there."""

    PORTS: tuple[int, ...]
    NAMES: tuple[str, ...]
    ENDPOINTS: dict[str, str]
    CREDENTIALS: dict[str, str]

    def prepare(self, folder: Path, home: Path) -> dict[str, str]:
        """Writes the cloud's tables into `folder` and the laptop's settings into its home; returns the laptop's variables."""

    def serve(self, folder: Path, image: Path) -> None:
        """Serves the cloud; never returns."""


CLOUDS = {"aws": "simcloud.clouds.aws"}


def backend(name: str) -> Backend:
    return cast(Backend, importlib.import_module(CLOUDS[name]))
