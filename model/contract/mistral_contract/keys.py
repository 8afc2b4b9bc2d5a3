"""Keys of a server as hashes: who may ask, and how much. Whoever reads them learns nothing that opens the server.

A guard has to recognise a key, not to know it. The sha256 of a key that nobody can guess (128 bits or more) may be read by anybody, so these
travel in the task and lie in a file of the node, which the guard reads again when it changes (docs/contract.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

VERSION = 1
MOST_KEYS = 200
LARGEST = 100_000  # bytes; Linux takes 128 KiB in one variable
LIMITS = ("requests_at_once", "requests_per_minute", "tokens_per_minute", "tokens_per_day")
MOST = 1_000_000_000_000
LEAST_BITS, LEAST_DIFFERENT, LONGEST = 128, 8, 256
CLASSES = {r"[0-9]": 10, r"[a-z]": 26, r"[A-Z]": 26, r"[-_]": 2, r"[^0-9A-Za-z_-]": 30}
_TEXTS = {
    "id": r"[a-z0-9][a-z0-9-]{0,39}",
    "name": r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}",
    "sha256": r"[0-9a-f]{64}",
}


@dataclass(frozen=True)
class Key:
    """One who may ask. Times are seconds since the epoch; a limit that is None does not exist."""

    id: str
    name: str
    sha256: str
    created: float
    expires: float | None = None
    requests_at_once: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None

    def expired(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires


@dataclass(frozen=True)
class Keys:
    """All that may ask. Of two, the one with the higher `serial` is the newer."""

    serial: int = 0
    keys: tuple[Key, ...] = ()

    def changed(self, keys: Iterable[Key]) -> Keys:
        """A newer one with these keys: its serial is the time, or one more where that is no more."""
        return replace(self, serial=max(self.serial + 1, int(time.time())), keys=tuple(keys))

    def dump(self) -> str:
        """As JSON in one line; what is not set is left out."""
        every = [{name: value for name, value in asdict(key).items() if value not in (None, "")} for key in self.keys]
        return json.dumps({"version": VERSION, "serial": self.serial, "keys": every})


def digest(secret: str | bytes) -> str:
    """The sha256 of a key or token, in hexadecimal digits."""
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).hexdigest()


def bits(secret: str) -> int:
    """How hard a key is to guess, at most: its length times the bits of its alphabet. A word and a hyphen in front do not count.

    >>> bits("sk-" + "0123456789abcdef" * 2)
    128
    """
    secret = re.sub(r"^[a-z]{1,8}[-_]", "", secret)
    bare = secret.replace("-", "")
    if re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", bare):
        return int(len(bare) * math.log2(16 if re.search(r"[A-Fa-f]", bare) else 10))
    return int(len(secret) * math.log2(max(2, sum(size for kind, size in CLASSES.items() if re.search(kind, secret)))))


def check_secret(secret: str) -> str:
    """A key that a user brings; ValueError with the reason if its hash could not be shown to anybody, or no header could carry it."""
    if not re.fullmatch(r"[\x21-\x7e]+", secret):
        raise ValueError("a key is one word of visible ASCII characters; make one with: openssl rand -hex 32")
    if len(secret) > LONGEST:
        raise ValueError(f"a key has at most {LONGEST} characters, this has {len(secret)}; make one with: openssl rand -hex 32")
    if bits(secret) < LEAST_BITS or len(set(secret)) < LEAST_DIFFERENT:
        found = f"{bits(secret)} bits" if bits(secret) < LEAST_BITS else f"only {len(set(secret))} different characters"
        raise ValueError(
            f"this key has {found} by its length and alphabet; its hash may be read by others, so it needs at least {LEAST_BITS} bits; "
            "make one with: openssl rand -hex 32"
        )
    return secret


def make(secret: str, name: str, created: float, **limits: Any) -> Key:
    """The key as others may know it; ValueError naming the field that is wrong."""
    hashed = digest(secret)
    return _key({"id": hashed[:12], "name": name, "sha256": hashed, "created": created} | limits, "key")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _key(data: Any, place: str) -> Key:
    if not isinstance(data, dict):
        raise ValueError(f"{place} should be an object")
    known = [field.name for field in fields(Key)]
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{place}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
    if missing := [name for name in ("id", "name", "sha256", "created") if name not in data]:
        raise ValueError(f"{place}: {missing[0]} is missing")
    for name, value in data.items():
        if name in _TEXTS:
            if not isinstance(value, str) or not re.fullmatch(_TEXTS[name], value):
                raise ValueError(f"{place}: {name} should match {_TEXTS[name]}")
        elif name in LIMITS:
            if value is not None and not (_is_whole(value) and 1 <= value <= MOST):
                raise ValueError(f"{place}: {name} should be a whole number from 1 to {MOST}")
        elif value is None and name == "expires":
            continue
        elif not (_is_whole(value) or isinstance(value, float)) or not 0 <= value <= MOST:
            raise ValueError(f"{place}: {name} should be seconds since the epoch")
    return Key(**data)


def read(text: str) -> Keys:
    """What `dump` wrote, or somebody by hand; ValueError in one line, saying where, if it is anything else."""
    if len(text) > LARGEST:
        raise ValueError(f"should have at most {LARGEST} characters")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(data, dict) or set(data) != {"version", "serial", "keys"}:
        raise ValueError("should be an object with version, serial and keys")
    if data["version"] != VERSION:
        raise ValueError(f"version {json.dumps(data['version'])[:40]} is not known here, only {VERSION}")
    if not _is_whole(data["serial"]) or not 0 <= data["serial"] <= MOST:
        raise ValueError("serial should be a whole number from 0")
    if not isinstance(data["keys"], list) or len(data["keys"]) > MOST_KEYS:
        raise ValueError(f"keys should be a list of at most {MOST_KEYS}")
    found = tuple(_key(one, f"keys[{number}]") for number, one in enumerate(data["keys"]))
    for field in ("id", "sha256"):
        every = [getattr(key, field) for key in found]
        if twice := [one for one in every if every.count(one) > 1]:
            raise ValueError(f"{field} {twice[0]} stands twice")
    return Keys(data["serial"], found)


def write(path: Path, found: Keys) -> None:
    """Replaces the file as a whole; a reader sees the old keys or the new ones."""
    put(path, found.dump() + "\n")


def put(path: Path, text: str) -> None:
    """Replaces a file that everybody may read as a whole. It is on the disk then: a key that was revoked stays so over a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        Path(temporary).chmod(0o644)  # the server may be another user; there is nothing to hide in it
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Holds a node's lock of its keys: whoever changes them reads, compares and writes within it."""
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take(path: Path, lock: Path, found: Keys) -> bool:
    """Replaces the file if these are newer, or what is there cannot be read; whether it was."""
    with alone(lock):
        try:
            newer = found.serial > read(path.read_text("utf-8")).serial
        except (OSError, ValueError):
            newer = True
        if newer:
            write(path, found)
        return newer
