"""A look at a set in its store, for who wants to judge it before it is pulled: names, sizes, a version, and bytes here and there."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .address import parse
from .events import Report, silent
from .ls import Ls
from .retrying import tried
from .source import look
from .stores import Opening, open_store


@dataclass(frozen=True)
class Peeked:
    """What a pull would bring: sizes by name. `version` changes when a file does; `read` gives a file's bytes from a start to a stop."""

    sizes: Mapping[str, int]
    version: str
    read: Callable[[str, int, int], bytes]


@contextmanager
def peek(request: Ls, report: Report = silent) -> Iterator[Peeked]:
    """Opens a set in its store; WeightsError, also from `read`, if it may not be read."""
    address = parse(request.uri, request.revision)
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), request.patience))
        source = look(store, address, request.form, request.patience, report)
        files = {one.file.name: one.file for one in source.wanted}

        def read(name: str, start: int, stop: int) -> bytes:
            file = files[name]
            if start >= min(stop, file.size):
                return b""
            return tried(name, request.patience, report, lambda: b"".join(store.read(file, start, min(stop, file.size))))

        seen = hashlib.sha256("\n".join(sorted(f"{file.name}\0{file.version}" for file in files.values())).encode())
        yield Peeked({name: file.size for name, file in files.items()}, seen.hexdigest()[:12], read)
