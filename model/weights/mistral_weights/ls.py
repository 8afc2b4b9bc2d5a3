"""What lies at an address, what of it serving needs, and whether we may read it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from . import digests, names
from .address import parse
from .events import Report, silent
from .patience import Patience
from .retrying import tried
from .secrets import Secrets
from .source import look
from .stores import Opening, open_store


@dataclass(frozen=True)
class Ls:
    """Where to look."""

    uri: str
    revision: str = ""
    secrets: Secrets = field(default_factory=Secrets)
    form: str = "auto"
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class ListedFile:
    """A file: its size in bytes, whether a pull brings it, and by what it is checked ("size": only that)."""

    name: str
    size: int
    wanted: bool
    checked_by: str


@dataclass(frozen=True)
class Listed:
    """A set in a store. `bytes` is what a pull brings; `manifest` says whether the set has one."""

    uri: str
    source: str
    revision: str
    license: str
    manifest: bool
    bytes: int
    files: tuple[ListedFile, ...]


def ls(request: Ls, report: Report = silent) -> Listed:
    """Lists a set, and reads one byte of it: who may list may yet be refused to read (a gated model, a narrow role)."""
    address = parse(request.uri, request.revision)
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), request.patience))
        source = look(store, address, request.form, request.patience, report)
        first = min((one.file for one in source.wanted if one.file.size), key=lambda file: file.size, default=None)
        if first:
            tried(first.name, request.patience, report, lambda: b"".join(store.read(first, 0, 1)))
    wanted = {one.file.name: one for one in source.wanted}
    files = tuple(
        ListedFile(
            file.name,
            file.size,
            file.name in wanted,
            (digests.strongest(wanted[file.name].expected) or "size") if file.name in wanted else "",
        )
        for file in sorted(source.contents.files, key=lambda file: file.name)
        if file.name not in names.OWN
    )
    manifest = source.manifest
    return Listed(
        uri=str(address),
        source=manifest.source if manifest else source.contents.source,
        revision=manifest.revision if manifest else source.contents.revision,
        license=manifest.license if manifest else source.contents.license,
        manifest=manifest is not None,
        bytes=source.size,
        files=files,
    )
