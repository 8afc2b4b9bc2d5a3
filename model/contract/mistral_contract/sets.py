"""A set of weights in a folder: what its manifest names, what else lies there, and the digest that stands for all of it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_contract import files, untrusted

STATE = ".mistral-weights.state.json"
OWN = frozenset({files.MANIFEST.name, STATE, *(f".{name}.partial" for name in (files.MANIFEST.name, STATE))})
LARGEST_MANIFEST = 64 << 20
HASHED = 32 << 20  # a file up to this size is hashed whenever a set is used; of a larger one the size is compared
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Wrong(untrusted.Refusal):
    """What is wrong with a set, and where."""


@dataclass(frozen=True)
class File:
    """A file of a set: size in bytes (-1: not known, which no file has), sha256 in hexadecimal digits (empty: not known)."""

    name: str
    size: int
    sha256: str


def digest(named: Iterable[File]) -> str:
    """Return the digest of a set: the sha256 of a line `SHA256 SIZE NAME` for each file, sorted by name.

    >>> digest([File("b", 2, "cd"), File("a", 1, "ab")]) == digest([File("a", 1, "ab"), File("b", 2, "cd")])
    True
    """
    lines = (f"{file.sha256} {file.size} {file.name}\n" for file in sorted(named, key=lambda file: file.name))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def read(folder: Path, manifest: str = files.MANIFEST.name) -> tuple[File, ...] | None:
    """Return what the manifest of a folder names, None if there is no manifest; Wrong if it cannot be read."""
    try:
        found = untrusted.read_file(folder / manifest, LARGEST_MANIFEST).get("files")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Wrong(f"{folder / manifest} cannot be read ({error})") from None
    if not isinstance(found, list) or not all(map(_is_file, found)):
        raise Wrong(f"{folder / manifest} should list files with name, size and sha256")
    return tuple(File(one["name"], one.get("size", -1), one["sha256"]) for one in found)


def unexpected(folder: Path, named: Collection[str]) -> tuple[str, ...]:
    """Return what lies in a folder and below that is not among these names, sorted; our own files are expected."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_raise):
        below = Path(place).relative_to(folder)
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [
            name for name in ((below / each).as_posix() for each in (*names, *links)) if name not in named and name not in OWN
        ]
    return tuple(sorted(found))


def check(folder: Path, manifest: str = files.MANIFEST.name) -> tuple[File, ...] | None:
    """Return what the manifest of a folder names, None without one; Wrong unless exactly that lies there, in plain files of these sizes.

    Files up to HASHED bytes (configuration, tokenizer, templates) are hashed.
    """
    if (named := read(folder, manifest)) is None:
        return None
    try:
        for name in unexpected(folder, {file.name for file in named} | {manifest}):
            raise Wrong(f"{folder} holds {name}, which {manifest} does not name")
        for file in named:
            _check(folder, file)
    except OSError as error:
        raise Wrong(f"{error.filename} cannot be read ({error.strerror})") from None
    return named


def describe(folder: Path, record: str) -> dict[str, Any]:
    """Return a manifest of what lies in a folder, without `record`, which is its own name."""
    paths = {name: folder / name for name in unexpected(folder, {record})}
    hashes = {name: _sha256(path) if path.stat().st_size <= HASHED else "" for name, path in paths.items()}
    return {"files": [{"name": name, "size": path.stat().st_size, "sha256": hashes[name]} for name, path in paths.items()]}


def _check(folder: Path, file: File) -> None:
    path = folder / file.name
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise Wrong(f"{folder} lacks {file.name}, which its manifest names") from None
    if not stat.S_ISREG(status.st_mode):
        raise Wrong(f"{path} is no plain file")
    if status.st_size != file.size or (file.size <= HASHED and file.sha256 and _sha256(path) != file.sha256):
        raise Wrong(f"{path} is not the file that its manifest names")


def _is_file(one: Any) -> bool:
    if not isinstance(one, dict) or not all(isinstance(one.get(field), str) for field in ("name", "sha256")):
        return False
    parts = one["name"].split("/")
    return type(one.get("size", 0)) is int and not any(part in ("", ".", "..") for part in parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error
