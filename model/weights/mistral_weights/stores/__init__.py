"""Places for weights. A store is one file here, found by its scheme in `STORES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from ..address import Address
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from ..patience import Patience
from ..secrets import Secrets

# scheme -> module of this package; the extra of the distribution has the scheme's name
STORES: dict[str, str] = {"hf": "hf", "s3": "s3", "gs": "gs", "az": "az", "file": "file", "pypi": "pypi"}

T = TypeVar("T")
Advance = Callable[[int], None]


MOST_FILES = 100_000


def bounded(entries: Iterable[T], where: str) -> list[T]:
    """The entries of a listing; WeightsError if it goes on and on."""
    found = list(islice(entries, MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise WeightsError(Kind.REFUSED, f"{where} holds more than {MOST_FILES} files; name the folder with the weights")
    return found


def unheard(size: int) -> None:
    """Nobody listens to the progress of a write."""


@dataclass(frozen=True)
class StoredFile:
    """A file in a store. `version` changes when its content does (ETag, generation, commit, time)."""

    name: str
    size: int
    version: str
    promises: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What lies at an address. `source` is the address pinned to `revision`; `license` is empty when not known."""

    files: tuple[StoredFile, ...]
    source: str
    revision: str = ""
    license: str = ""


@dataclass(frozen=True)
class Link:
    """A plain HTTP(S) GET that reads one file: its URL (may carry a signature: never show it) and headers.

    `expect` are headers (small names) of an answer that is about this very version of the file.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    expect: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """What a store is opened with: secrets, how patient to be, and a folder that it may fill.

    `seconds` are what a store may take that can only fetch all or nothing; None sets no limit.
    """

    secrets: Secrets
    scratch: Path
    patience: Patience
    seconds: float | None = None


class Store(Protocol):
    """The functions of a store. Each raises WeightsError; the caller retries."""

    right: str
    """What somebody who is refused needs, as advice."""

    def list(self) -> Contents:
        """All files at the address."""
        ...

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop` of this version of the file, in pieces."""
        ...

    def link(self, file: StoredFile) -> Link | None:
        """A GET that reads this version of the file, fresh each time; None where the store has none."""
        ...

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        """What the store itself promises about the file's bytes: kind of checksum -> hexadecimal digits."""
        ...

    def write(self, name: str, path: Path, facts: ManifestFile | None, advance: Advance = unheard) -> None:
        """Puts the local file `path` there under `name`, as a whole or not at all; tells of bytes as they go."""
        ...

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        """Whether the store itself says that `file` holds these bytes; False when it cannot say."""
        ...

    def delete(self, name: str) -> None:
        """Takes `name` away; harmless when it is not there."""
        ...


@dataclass(frozen=True)
class Found:
    """A small object, whole. `version` is the store's own name of this content (ETag, generation)."""

    data: bytes
    version: str


class ObjectStore(Protocol):
    """What a store of small objects that change can do besides, each in one request or two: see `objects`."""

    def get(self, name: str, known: str, most: int) -> Found | None:
        """The object; None if its version is `known` still. NOT_FOUND if it is not there, REFUSED if it has more than `most` bytes."""
        ...

    def put(self, name: str, data: bytes, known: str) -> str:
        """Replaces the object of the version `known`, makes it where that is empty; its version. CHANGED if another version is there."""
        ...


def open_store(address: Address, opening: Opening) -> Store:
    """The store for an address; a clear error when its SDK is not installed."""
    try:
        module = importlib.import_module(f".{STORES[address.scheme]}", __name__)
        store: Store = module.open_store(address, opening)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise WeightsError(
            Kind.MISSING,
            f"{address.scheme}:// needs the package {package}; install mistral-weights[{address.scheme}]",
        ) from error
    return store
