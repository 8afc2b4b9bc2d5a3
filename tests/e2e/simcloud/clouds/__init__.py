"""The simulated clouds: a row here, one file each. A file says what the laptop needs to reach it, and serves it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast


class Store(Protocol):
    """A cloud's object store, a module: a real server, and how the laptop uploads to it."""

    SCHEME: str
    PORT: int

    def command(self, folder: Path) -> list[str]:
        """The server's command line; its data lie in `folder`/data. It listens on 127.0.0.1:PORT."""

    def put(self, folder: Path, url: str) -> int:
        """Uploads every file below a folder, as the laptop, making the bucket first; says how many."""


class Backend(Protocol):
    """What each file here has. `ADDRESS` and `PORTS`: where it listens on loopback; `NAMES`: the names of hosts that lead there,
    which the certificate in ROOT/tls is for (tls.py). `CREDENTIALS` are those of the laptop."""

    ADDRESS: str
    PORTS: tuple[int, ...]
    NAMES: tuple[str, ...]
    STORE: Store
    CREDENTIALS: dict[str, str]

    def prepare(self, folder: Path, home: Path) -> dict[str, str]:
        """Writes the cloud's tables into `folder` and the laptop's settings into its home; returns the laptop's variables."""

    def serve(self, folder: Path, image: Path) -> None:
        """Serves the cloud; never returns."""


CLOUDS = {"aws": "simcloud.clouds.aws", "gcp": "simcloud.clouds.gcp", "azure": "simcloud.clouds.azure"}


def backend(name: str) -> Backend:
    return cast(Backend, importlib.import_module(CLOUDS[name]))
