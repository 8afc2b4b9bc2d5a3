"""Checksums by name, so that what a store promises can be compared with what arrived."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import blake3 as _blake3

from .errors import Kind, WeightsError

# from the strongest to the weakest; of several promises the first is checked
STRENGTH: tuple[str, ...] = ("sha256", "blake3", "git-sha1", "sha1", "crc32c", "md5", "crc32")
OURS: tuple[str, ...] = ("sha256", "blake3")


class Digest(Protocol):
    """A running checksum."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class _Crc32c:
    def __init__(self) -> None:
        try:
            import google_crc32c
        except ImportError as error:
            raise WeightsError(Kind.MISSING, "crc32c needs the package google-crc32c; install mistral-weights[gs]") from error
        self._sum = google_crc32c.Checksum()

    def update(self, data: memoryview) -> None:
        self._sum.update(bytes(data))  # google_crc32c takes nothing but bytes

    def hexdigest(self) -> str:
        return bytes(self._sum.digest()).hex()


def start(name: str, size: int) -> Digest:
    """A new checksum of the kind `name` for `size` bytes (git hashes the size, too)."""
    if name == "blake3":
        return _blake3.blake3()
    if name == "crc32":
        return _Crc32()
    if name == "crc32c":
        return _Crc32c()
    if name == "git-sha1":
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(f"blob {size}\0".encode())
        return digest
    return hashlib.new(name, usedforsecurity=False)


def blake3_of(data: memoryview | bytes) -> str:
    """The blake3 of `data`, 64 hexadecimal digits."""
    return _blake3.blake3(data).hexdigest()


def strongest(promises: Iterable[str]) -> str:
    """The strongest kind of checksum among `promises`; empty when none is known."""
    known = set(promises)
    return next((name for name in STRENGTH if name in known), "")


def disagreement(promised: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first kind of checksum in which both speak and differ; empty when they agree."""
    return next((name for name in STRENGTH if name in promised and found.get(name, promised[name]) != promised[name]), "")
