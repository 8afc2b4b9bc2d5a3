"""SkyPilot's catalog of a simulated cloud: the project's own snapshot, and what tests add to it."""

from __future__ import annotations

import shutil
from pathlib import Path

TESTS = Path(__file__).parent.parent.parent
SOURCES = (TESTS.parent / "deploy" / "mistralctl" / "catalog", TESTS / "deploy" / "sky_catalog")


def lay_out(home: Path, cloud: str) -> Path:
    """Puts a cloud's tables where SkyPilot keeps what it downloads, in that home; the folder with them."""
    folder = home / ".sky" / "catalogs" / "v8"
    for source in SOURCES:
        for name in (cloud, "common"):
            if (source / name).exists():
                shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    return folder / cloud
