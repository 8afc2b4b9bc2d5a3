"""file:// — a folder of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..address import Address
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from . import Contents, Link, Opening, StoredFile

PIECE = 2**20


class FileStore:
    """A folder; links that lead out of it are refused."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> Contents:
        if not self.root.is_dir():
            raise WeightsError(Kind.NOT_FOUND, f"there is no folder {self.root}; check the path")
        inside = self.root.resolve()
        files: list[StoredFile] = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                shown = path.relative_to(self.root).as_posix()
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    raise WeightsError(
                        Kind.REFUSED, f"{path} is a link that leads out of its folder; put the file itself there"
                    )
                if path.is_file():
                    files.append(_stored(shown, path))
        return Contents(tuple(files), source=f"file://{self.root}")

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        path = self.root / file.name
        try:
            with path.open("rb", buffering=0) as source:
                if _stored(file.name, path).version != file.version:
                    raise WeightsError(Kind.CHANGED, f"{path} changed while it was read; leave it alone and pull again")
                source.seek(start)
                while start < stop:
                    piece = source.read(min(PIECE, stop - start))
                    if not piece:
                        raise WeightsError(Kind.CHANGED, f"{path} became shorter; leave it alone and pull again")
                    start += len(piece)
                    yield piece
        except FileNotFoundError:
            raise WeightsError(Kind.NOT_FOUND, f"{path} is gone; check the source") from None
        except PermissionError:
            raise WeightsError(Kind.DENIED, f"{path} may not be read; change its permissions") from None
        except OSError as error:
            raise WeightsError(Kind.UNREACHABLE, f"{path} cannot be read ({error.strerror}); check the disk") from None

    def link(self, file: StoredFile) -> Link | None:
        return None

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        return file.promises

    def write(self, name: str, path: Path, facts: ManifestFile | None) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(path, partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        return False

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


def _stored(name: str, path: Path) -> StoredFile:
    stat = path.stat()
    return StoredFile(name, stat.st_size, f"{stat.st_mtime_ns}-{stat.st_size}-{stat.st_ino}")


def open_store(address: Address, opening: Opening) -> FileStore:
    return FileStore(Path(address.root))
