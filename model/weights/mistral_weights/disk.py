"""Writing so that it survives a crash, and saying clearly when the disk cannot."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import Kind, WeightsError

PAGE = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an error of the disk at `path` into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what = "the file is larger than allowed here" if error.errno == errno.EFBIG else "the disk is full"
            raise WeightsError(Kind.DISK, f"{what} ({path}); free some space and pull again: it continues where it was") from None
        raise WeightsError(Kind.DISK, f"{path}: {error.strerror or error}; check the folder and its permissions") from None


def require_space(folder: Path, size: int) -> None:
    """A clear error when fewer than `size` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise WeightsError(
            Kind.DISK,
            f"the disk of {folder} has {free / 1e9:.2f} GB free and {size / 1e9:.2f} GB are still to come; free some space",
        )


def written_so_far(folder: Path) -> tuple[int, float] | None:
    """Return the bytes that the disk of `folder` has written since boot, and the seconds that it was busy; None where it is no disk.

    Both are the kernel's (docs.kernel.org/block/stat.html: sectors of 512 bytes, milliseconds), whoever wrote.
    """
    device = folder.stat().st_dev
    try:
        counts = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text("ascii").split()
        return int(counts[6]) * 512, int(counts[9]) / 1000
    except (OSError, ValueError, IndexError):
        return None


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def still_there(path: Path, handle: int) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An empty file that takes the name `path` when it is written: never half, and on the disk then.

    Its name until then is the same for all, so that a killed writer's pieces do not stay; who comes meanwhile waits for it.
    """
    partial = path.with_name(f".{path.name}.partial")
    while True:
        with partial.open("ab") as sink:
            fcntl.flock(sink, fcntl.LOCK_EX)
            if not still_there(partial, sink.fileno()):
                continue  # it has become another writer's whole file
            sink.truncate(0)
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
            partial.replace(path)
            sync_folder(path.parent)
            return


def write_whole(path: Path, data: bytes) -> None:
    """`path` with `data`: never half written, and on the disk when this returns."""
    with explained(path), replacing(path) as sink:
        sink.write(data)


class PartialFile:
    """A file that is filled range by range, in any order. With `direct` the page cache is passed by.

    Through it, too, a range is on the disk when it is written (O_DSYNC): disk and network work at once, where a sync at the end
    would find everything still to be done.
    """

    def __init__(self, path: Path, size: int, *, direct: bool) -> None:
        self.path = path
        self.size = size
        self._direct: int | None = None
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DSYNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            if os.fstat(self._handle).st_size > size:
                os.ftruncate(self._handle, size)
            if direct and size > PAGE and hasattr(os, "O_DIRECT"):
                with suppress(OSError):  # a file system without it (tmpfs): through the page cache
                    self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            if self._direct is not None:
                os.posix_fallocate(self._handle, 0, size)  # O_DIRECT is twice as fast into blocks that are there already

    def write(self, start: int, data: memoryview) -> None:
        """Puts `data` at byte `start`. O_DIRECT takes whole pages; the rest of the last one goes the plain way."""
        with explained(self.path):
            whole = len(data) - len(data) % PAGE if self._direct is not None and start % PAGE == 0 else 0
            if whole and self._direct is not None:
                _pwrite(self._direct, data[:whole], start)
            _pwrite(self._handle, data[whole:], start + whole)

    def read_into(self, start: int, buffer: memoryview) -> bool:
        """Fills `buffer` from byte `start`; False when the file does not reach so far."""
        done = 0
        with explained(self.path):
            while done < len(buffer):
                got = os.preadv(self._handle, [buffer[done:]], start + done)
                if not got:
                    return False
                done += got
        return True

    def clear(self) -> None:
        with explained(self.path):
            os.ftruncate(self._handle, 0)

    def finish(self, target: Path) -> None:
        """The file under its name, its bytes on the disk; the name is there for good once its folder is synced."""
        with explained(self.path):
            os.ftruncate(self._handle, self.size)
            os.fsync(self._handle)
            self.path.replace(target)
        self.close()

    def close(self) -> None:
        for handle in (self._handle, self._direct):
            if handle is not None and handle >= 0:
                os.close(handle)
        self._handle, self._direct = -1, None


def _pwrite(handle: int, data: memoryview, start: int) -> None:
    while data:
        done = os.pwrite(handle, data, start)
        data, start = data[done:], start + done


def page_aligned(size: int) -> memoryview:
    """A buffer of `size` bytes that O_DIRECT accepts; it takes memory only when it is filled."""
    return memoryview(mmap.mmap(-1, size))
