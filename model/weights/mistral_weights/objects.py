"""One small object in a store that may change at any time: read if it has another version, replaced if it still has the one that was read."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from .address import parse
from .errors import Kind, WeightsError
from .patience import Patience
from .secrets import Secrets
from .stores import Found, ObjectStore, Opening, open_store

__all__ = ["SCHEMES", "Found", "SmallObject", "open_object"]

SCHEMES = ("s3", "gs", "az", "file")
MOST = 1 << 20
QUICKLY = Patience(connect=5.0, stall=10.0)


@dataclass(frozen=True)
class SmallObject:
    """An object by its URI. Nothing is tried again here."""

    uri: str
    name: str
    store: ObjectStore

    def get(self, known: str = "") -> Found | None:
        """What is there; None if its version is `known` still. WeightsError of the kind NOT_FOUND if nothing is."""
        return self.store.get(self.name, known, MOST)

    def put(self, data: bytes, known: str) -> str:
        """Replaces the version `known`, empty where nothing is there yet; the new version. WeightsError of the kind CHANGED if somebody was
        quicker."""
        return self.store.put(self.name, data, known)


def open_object(uri: str, patience: Patience = QUICKLY) -> SmallObject:
    """The object at `uri`, with this machine's own credentials; WeightsError if no store has such objects."""
    folder, _, name = uri.rpartition("/")
    if uri.partition("://")[0] not in SCHEMES or not name:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise WeightsError(Kind.USAGE, f"{uri!r} names no object; write its URI, which begins with one of {known}")
    address = parse(f"{folder}/" if folder == "file://" else folder)
    store = open_store(address, Opening(Secrets(), Path(tempfile.gettempdir()), patience))
    return SmallObject(uri, name, cast(ObjectStore, store))
