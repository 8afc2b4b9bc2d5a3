"""Taking a set out of a store: its manifest first, so that what is left of it counts as unfinished."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from . import names
from .address import parse
from .errors import Kind, WeightsError
from .events import Report, silent
from .patience import Patience
from .retrying import tried
from .secrets import Secrets
from .source import look
from .stores import Opening, open_store


@dataclass(frozen=True)
class Remove:
    """Which set."""

    uri: str
    secrets: Secrets = field(default_factory=Secrets)
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Removed:
    """What was taken away."""

    uri: str
    files: tuple[str, ...]
    bytes: int


def remove(request: Remove, report: Report = silent) -> Removed:
    """Take away the files that a manifest names, and it; nothing there is no error. What it does not name stays."""
    address = parse(request.uri)
    where = str(address)
    if address.scheme in ("hf", "pypi"):
        raise WeightsError(Kind.USAGE, f"{where} cannot be removed; name a bucket or a folder")
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), request.patience))
        try:
            wanted = look(store, address, names.FOLDER, request.patience, report).wanted
        except WeightsError as error:
            if error.kind is not Kind.NOT_FOUND:
                raise
            return Removed(where, (), 0)
        for name in (names.MANIFEST, *(one.file.name for one in wanted), names.STATE):
            tried(name, request.patience, report, lambda name=name: store.delete(name))  # type: ignore[misc]
    return Removed(where, tuple(one.file.name for one in wanted), sum(one.file.size for one in wanted))
