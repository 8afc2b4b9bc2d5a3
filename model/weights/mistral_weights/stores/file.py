"""file:// — a folder of this machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..address import Address
from ..disk import explained, replacing
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from ..status import changed, too_large
from . import Advance, Contents, Found, Link, Opening, StoredFile, unheard

PIECE = 2**20


class FileStore:
    """A folder; links that lead out of it are refused, but for a snapshot in the hub's cache, whose files lie beside it in `blobs`."""

    right = "change the permissions of the folder"

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> Contents:
        if not self.root.is_dir():
            raise WeightsError(Kind.NOT_FOUND, f"there is no folder {self.root}; check the path")
        inside = home_of(self.root)
        files: list[StoredFile] = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                shown = path.relative_to(self.root).as_posix()
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    raise WeightsError(Kind.REFUSED, f"{path} is a link that leads out of its folder; put the file itself there")
                if path.is_file():
                    files.append(self.stored(shown))
        return Contents(tuple(files), source=f"file://{self.root}")

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        path = self.root / file.name
        try:
            with path.open("rb", buffering=0) as source:
                self._require_same(file, source.fileno())
                source.seek(start)
                while start < stop:
                    piece = source.read(min(PIECE, stop - start))
                    if not piece:
                        raise WeightsError(Kind.CHANGED, f"{path} became shorter; leave it alone and pull again")
                    start += len(piece)
                    if start == stop:
                        self._require_same(file, source.fileno())  # others may write into it as it is
                    yield piece
        except FileNotFoundError:
            raise WeightsError(Kind.NOT_FOUND, f"{path} is gone; check the source") from None
        except PermissionError:
            raise WeightsError(Kind.DENIED, f"{path} may not be read; change its permissions") from None
        except OSError as error:
            raise WeightsError(Kind.UNREACHABLE, f"{path} cannot be read ({error.strerror}); check the disk") from None

    def _require_same(self, file: StoredFile, handle: int) -> None:
        if version_of(os.fstat(handle)) != file.version:
            changed_meanwhile = f"{self.root / file.name} changed while it was read; leave it alone and pull again"
            raise WeightsError(Kind.CHANGED, changed_meanwhile)

    def stored(self, name: str) -> StoredFile:
        """The file as it is now."""
        found = (self.root / name).stat()
        return StoredFile(name, found.st_size, version_of(found))

    def link(self, file: StoredFile) -> Link | None:
        return None

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        return file.promises

    def write(self, name: str, path: Path, facts: ManifestFile | None, advance: Advance = unheard) -> None:
        target = self.root / name
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, replacing(target) as sink:
                while piece := source.read(PIECE):
                    sink.write(piece)
                    advance(len(piece))

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        with (self.root / file.name).open("rb") as source:
            return file.size == facts.size and hashlib.file_digest(source, "sha256").hexdigest() == facts.sha256

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def get(self, name: str, known: str, most: int) -> Found | None:
        path = self.root / name
        try:
            with path.open("rb") as source:  # its version is its content's, as another may take its name while it is read
                data = source.read(most + 1)
        except FileNotFoundError:
            raise WeightsError(Kind.NOT_FOUND, f"{path} is not there; check its name") from None
        except PermissionError:
            raise WeightsError(Kind.DENIED, f"{path} may not be read; change its permissions") from None
        except OSError as error:
            raise WeightsError(Kind.UNREACHABLE, f"{path} cannot be read ({error.strerror}); check the disk") from None
        if len(data) > most:
            raise too_large(str(path), most)
        version = digest(data)
        return None if version == known else Found(data, version)

    def put(self, name: str, data: bytes, known: str) -> str:
        path = self.root / name
        with explained(path):
            self.root.mkdir(parents=True, exist_ok=True)
            with path.with_name(f".{name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (digest(path.read_bytes()) if path.exists() else "") != known:
                    raise changed(str(path))
                with replacing(path) as sink:
                    sink.write(data)
                return digest(data)


def version_of(found: os.stat_result) -> str:
    """Of a file that may be large: made of its time, size and inode."""
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"


def digest(data: bytes) -> str:
    """The version of a small object: two of one size in one tick of the clock differ, too."""
    return hashlib.sha256(data).hexdigest()


def home_of(folder: Path) -> Path:
    """Where the files of a folder may lie: in it, or in the hub's cache (models--OWNER--NAME/snapshots/COMMIT) in its models--... folder."""
    inside = folder.resolve()
    cached = inside.parent.name == "snapshots" and inside.parent.parent.name.startswith("models--")
    return inside.parent.parent if cached else inside


def open_store(address: Address, opening: Opening) -> FileStore:
    return FileStore(Path(address.root))
