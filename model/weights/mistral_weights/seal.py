"""Sealing a folder of any files: its manifest, which is written last, names each of them with size and checksums."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

from mistral_contract import sets

from .digests import blake3_of, start
from .disk import explained, sync_folder, write_whole
from .errors import Kind, WeightsError
from .installed import Installed, damages, find, write_state
from .manifest import RANGE_BYTES, Manifest, ManifestFile, render
from .names import MANIFEST, OWN, check, no_twins

SEALED = "sealed"  # how the bytes were checked: they are those that lay there


def seal(folder: Path, source: str, revision: str) -> Manifest:
    """Return the manifest of all files in a folder and below, written when each of them is on the disk; an earlier one is taken away first.

    `source` says where they come from, `revision` which state of it they are.
    """
    with explained(folder):
        for name in OWN:
            (folder / name).unlink(missing_ok=True)
        found = sorted(check(name) for name in sets.unexpected(folder, ()))
        no_twins(found)
        files = tuple(_facts(folder, name) for name in found)
        for parent in {(folder / name).parent for name in found}:
            sync_folder(parent)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(source, revision, "", created, RANGE_BYTES, files)
        write_whole(folder / MANIFEST, render(manifest))
        write_state(Installed(folder, manifest))
        sync_folder(folder)
    return manifest


def sealed(folder: Path) -> Installed | None:
    """Return the set of a folder that was sealed and still is as it was, every byte of it read; None for any other."""
    try:
        installed = find(folder)
        return installed if installed is not None and not damages(installed, full=True) else None
    except WeightsError:
        return None


def _facts(folder: Path, name: str) -> ManifestFile:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise WeightsError(Kind.REFUSED, f"{path} is no plain file; put the file itself there")
    sha256, blake3 = hashlib.sha256(), start("blake3", 0)
    ranges = []
    with path.open("rb") as file:
        while piece := file.read(RANGE_BYTES):
            sha256.update(piece)
            blake3.update(memoryview(piece))
            ranges.append(blake3_of(piece))
        os.fsync(file.fileno())
        size = file.tell()
    return ManifestFile(name, size, sha256.hexdigest(), blake3.hexdigest(), tuple(ranges), SEALED)
