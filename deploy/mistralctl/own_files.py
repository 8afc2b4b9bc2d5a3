"""Files that are this user's own: written as a whole, read only where nobody else can have written them."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mistralctl.errors import Exit, UserError

LARGEST = 1 << 26  # none of our files comes near


def problem(path: Path, found: os.stat_result, *, shut: bool = False) -> str:
    """Why another user could have written a file or folder, with the command that mends it; empty if none could.

    A group may write a folder where it cannot come to it (`shut`: a folder above is closed to it), or where it has one user alone, as distributions
    make it that let new files be written by the group.
    """
    if found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user (uid {found.st_uid}), so its content is not trusted; run: chown $(id -u) {path}, or remove it"
    loose = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    folder, sticky = stat.S_ISDIR(found.st_mode), found.st_mode & stat.S_ISVTX  # as /tmp: what is in it keeps its owner
    if folder and (sticky or (loose == stat.S_IWGRP and (shut or _is_private(found)))):
        return ""
    if loose:
        mode = stat.S_IMODE(found.st_mode)
        return f"{path} can be written by other users (mode {mode:04o}), so its content is not trusted; run: chmod go-w {path}"
    return ""


def _is_private(found: os.stat_result) -> bool:
    """Whether the group of a folder is its owner's alone."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    alone = set(group.gr_mem) <= {user.pw_name}
    return bool(found.st_uid) and user.pw_gid == found.st_gid and user.pw_name == group.gr_name and alone


def require(path: Path) -> None:
    """UserError if another user could have written what is there, or could put something else in its place. Nothing there is no error."""
    shut = False
    for one in (*reversed(path.parents), path):
        with suppress(FileNotFoundError, NotADirectoryError):
            found = one.stat()
            if why := problem(one, found, shut=shut):
                raise UserError(why, Exit.MACHINE)
            shut = shut or not found.st_mode & stat.S_IXGRP


def loose(root: Path, depth: int = 4) -> list[str]:
    """What of a folder other users could have written, down to so many levels; where one is, what is below it is not looked at."""
    try:
        require(root)
    except UserError as error:
        return [str(error)]
    shut = not root.stat().st_mode & stat.S_IXGRP if root.is_dir() else False
    return list(_below(root, depth, shut=shut))


def _below(root: Path, depth: int, *, shut: bool) -> Iterator[str]:
    with suppress(OSError):
        for one in sorted(root.iterdir()):
            with suppress(FileNotFoundError):
                found = one.stat()
                if why := problem(one, found, shut=shut):
                    yield why
                elif depth > 1 and stat.S_ISDIR(found.st_mode) and not one.is_symlink():
                    yield from _below(one, depth - 1, shut=shut or not found.st_mode & stat.S_IXGRP)


def folder(path: Path) -> Path:
    """Make a folder that only the user can enter, with those above it; UserError if it is there and another user may write it."""
    for one in reversed((path, *path.parents)):
        if not one.is_dir():
            try:
                one.mkdir(mode=0o700)
            except FileExistsError:
                if not one.is_dir():  # another command may have been faster
                    raise UserError(f"{one} is no folder; remove it", Exit.CONFLICT) from None
    require(path)
    return path


def read(path: Path) -> str:
    """The text of a file; FileNotFoundError if there is none, UserError if it is none of our own, or no regular file of text."""
    try:
        return _contents(path, LARGEST, whole=True).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged (it is no text); remove it", Exit.CONFLICT) from None


def head(path: Path, size: int) -> bytes:
    """The first bytes of a file of our own, however long it is; as `read` otherwise."""
    return _contents(path, size, whole=False)


def _contents(path: Path, size: int, *, whole: bool) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing; remove it", Exit.CONFLICT) from None
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct that, or remove it", Exit.CONFLICT) from None
    try:
        found = os.fstat(handle)
        if why := problem(path, found):
            raise UserError(why, Exit.MACHINE)
        require(path.parent)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is no file; remove it", Exit.CONFLICT)
        if whole and found.st_size > size:
            raise UserError(f"{path} is larger than {size >> 20} MiB; remove it", Exit.CONFLICT)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(size)
    finally:
        os.close(handle)


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, on the disk when this returns; nobody but the user can read it at any moment."""
    folder(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        Path(temporary).replace(path)
    except IsADirectoryError:
        Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path} is a folder where a file should be; remove it", Exit.CONFLICT) from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with suppress(OSError):  # a file system that keeps no folders
        entry = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def remove(path: Path) -> None:
    """Remove what is there: a folder with all that is in it, a link and not where it leads. Nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:  # rmtree would open a pipe, and wait
        with suppress(NotADirectoryError):
            path.unlink(missing_ok=True)


def begin_log(path: Path) -> None:
    """Empty a log, or make one that nobody else can read; what is no file is replaced: a pipe would never take a line."""
    folder(path.parent)
    if not stat.S_ISREG(path.lstat().st_mode if os.path.lexists(path) else 0):
        remove(path)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
