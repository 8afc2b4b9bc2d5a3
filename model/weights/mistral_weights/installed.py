"""A set of weights in a folder of this machine: is it there, is it whole, is it right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mistral_contract import sets, untrusted

from . import manifest as manifests
from . import names
from .digests import blake3_of
from .disk import explained, page_aligned, write_whole
from .errors import Kind, WeightsError
from .manifest import Manifest, ManifestFile


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file: "missing", "size", "content" (`at` are the first bytes of its wrong ranges), or "unexpected".

    Unexpected is what lies there and the manifest does not name.
    """

    name: str
    what: str
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Installed:
    """A set in a folder: its manifest, and the address it was pulled from.

    `stats` has the stat of each file after its last check, `versions` the version that it had in the store.
    """

    folder: Path
    manifest: Manifest
    address: str = ""
    stats: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def find(folder: Path) -> Installed | None:
    """The set in `folder`; None when there is no folder, or an empty one."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    path = folder / names.MANIFEST
    if not folder.is_dir() or not path.is_file():
        raise WeightsError(
            Kind.USAGE, f"{folder} is there, but is no set of weights (it has no {names.MANIFEST}); name another folder"
        )
    try:
        data = untrusted.contents(path, names.LARGEST_INDEX)
    except ValueError as error:
        raise WeightsError(
            Kind.DAMAGED, f"the manifest of {folder} cannot be read ({error}); pull or mirror the set again"
        ) from None
    manifest = manifests.read(data, str(folder))
    try:
        state = untrusted.read_file(folder / names.STATE, names.LARGEST_INDEX)
        stats, versions = dict(state["stats"]), dict(state["versions"])
        return Installed(folder, manifest, str(state["address"]), stats, versions)
    except (OSError, ValueError, KeyError, TypeError):
        return Installed(folder, manifest)


def stat_of(path: Path) -> str:
    """Changes when the file does: size, time of change in ns, inode. Empty when it is not a plain file."""
    try:
        stat = path.lstat()
    except OSError:
        return ""
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}" if path.is_file() and not path.is_symlink() else ""


def stats_of(installed: Installed) -> dict[str, str]:
    """The stat of each file now."""
    return {file.name: stat_of(installed.folder / file.name) for file in installed.manifest.files}


def write_state(installed: Installed, stats: Mapping[str, str] | None = None) -> None:
    """Notes that every file was right when it had these stats, left out: those of now."""
    noted = stats_of(installed) if stats is None else dict(stats)
    state = {"address": installed.address, "stats": noted, "versions": dict(installed.versions)}
    write_whole(installed.folder / names.STATE, json.dumps(state, indent=1).encode())


def damages(installed: Installed, full: bool, advance: Callable[[int], None] = lambda size: None) -> tuple[Damage, ...]:
    """What is wrong with a set. A file whose stat is the noted one is not read again, unless `full`."""
    doubtful = []
    for file in installed.manifest.files:
        stat = stat_of(installed.folder / file.name)
        if not full and stat and stat == installed.stats.get(file.name):
            advance(file.size)
        else:
            doubtful.append(file)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
        found = workers.map(lambda file: damage(installed.folder, file, installed.manifest.range_bytes, advance), doubtful)
        wrong = tuple(one for one in found if one)
    named = {file.name for file in installed.manifest.files}
    with explained(installed.folder):
        return wrong + tuple(Damage(name, "unexpected") for name in sets.unexpected(installed.folder, named))


def damage(
    folder: Path, file: ManifestFile, range_bytes: int, advance: Callable[[int], None] = lambda size: None
) -> Damage | None:
    """What is wrong with one file, every byte of it read; None when nothing is."""
    path = folder / file.name
    if not stat_of(path):
        return Damage(file.name, "missing")
    if path.lstat().st_size != file.size:
        return Damage(file.name, "size")
    buffer = page_aligned(range_bytes)
    wrong = []
    with path.open("rb", buffering=0) as source:
        for index, promised in enumerate(file.ranges):
            view = buffer[: min(range_bytes, file.size - index * range_bytes)]
            done = 0
            while done < len(view) and (got := source.readinto(view[done:])):
                done += got
            if done < len(view) or blake3_of(view) != promised:
                wrong.append(index * range_bytes)
            advance(len(view))
    return Damage(file.name, "content", tuple(wrong)) if wrong else None
