"""SkyPilot's catalog of a simulated cloud: the project's own snapshot, and what tests add to it."""

from __future__ import annotations

import csv
import functools
import shutil
from pathlib import Path

TESTS = Path(__file__).parent.parent.parent
SKY = TESTS / "deploy" / "sky_catalog"
SOURCES = (TESTS.parent / "deploy" / "mistralctl" / "clouds", SKY)


@functools.cache
def images(cloud: str) -> list[dict[str, str]]:
    """The rows of a cloud's images. The snapshot of AWS's is older than SkyPilot's image with CUDA 13, the default of GPU machines: it
    has ids of ours, which begin with ami-c."""
    with (SKY / cloud / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tag = "skypilot:custom-gpu-ubuntu"
    newer = [
        row | {"Tag": f"{tag}-cuda13", "ImageId": row["ImageId"].replace("ami-0", "ami-c", 1), "CreationDate": "20260603"}
        for row in rows if cloud == "aws" and row["Tag"] == tag
    ]  # fmt: skip
    return rows + newer


def lay_out(home: Path, cloud: str) -> Path:
    """Puts a cloud's tables where SkyPilot keeps what it downloads, in that home; the folder with them."""
    folder = home / ".sky" / "catalogs" / "v8"
    for source in SOURCES:
        for name in (cloud, "common"):
            if (source / name).exists():
                shutil.copytree(
                    source / name, folder / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"), dirs_exist_ok=True
                )
    with (folder / cloud / "images.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, list(images(cloud)[0]))
        rows.writeheader()
        rows.writerows(images(cloud))
    return folder / cloud
