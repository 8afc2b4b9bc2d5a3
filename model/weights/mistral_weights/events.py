"""What a running transfer tells about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Begun:
    """A transfer starts: what is done ("pull", "push", "verify"), and how much there is in all."""

    what: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Advanced:
    """`bytes` more are right and in place; `resumed` when they were there from an earlier run."""

    bytes: int
    resumed: bool = False


@dataclass(frozen=True)
class FileFinished:
    """A file is complete; `checked_by` says what its bytes were held against."""

    name: str
    bytes: int
    checked_by: str


@dataclass(frozen=True)
class FileRestarted:
    """A file starts again from nothing; `bytes` of it that had counted are void."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Retrying:
    """A failure that is worth another try, after `seconds`."""

    name: str
    why: str
    seconds: float


@dataclass(frozen=True)
class Waiting:
    """Another process works on the same set; we wait for it."""

    for_what: str


@dataclass(frozen=True)
class Kept:
    """The set that is there is used, because the store could not be asked whether it has a newer one."""

    why: str


@dataclass(frozen=True)
class SetAside:
    """Files lay in a set that its manifest does not name; they were moved to the folder `where`, so that nothing loads them."""

    names: tuple[str, ...]
    where: str


Event = Begun | Advanced | FileFinished | FileRestarted | Retrying | Waiting | Kept | SetAside
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """A report that nobody reads."""
