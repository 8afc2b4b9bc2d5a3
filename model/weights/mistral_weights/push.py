"""Putting a set that lies in a folder into a store. Its manifest goes last: without it, the set counts as unfinished."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from . import names
from .address import parse
from .errors import Kind, WeightsError
from .events import Advanced, Begun, FileFinished, FileRestarted, Report, silent
from .installed import damages, find
from .manifest import Manifest, ManifestFile, render
from .patience import Patience
from .retrying import tried
from .secrets import Secrets
from .stores import Opening, Store, StoredFile, open_store

T = TypeVar("T")


@dataclass(frozen=True)
class Push:
    """Which folder goes where; `files_at_once` are written side by side."""

    folder: Path
    uri: str
    secrets: Secrets = field(default_factory=Secrets)
    files_at_once: int = 3
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Pushed:
    """A set that a store now holds, manifest and all. `sent` counts the bytes that this run wrote."""

    uri: str
    source: str
    revision: str
    files: tuple[str, ...]
    bytes: int
    sent: int
    seconds: float


def push(request: Push, report: Report = silent) -> Pushed:
    """Writes what the store does not hold yet; run again after any failure, it leaves out what is there and right."""
    begun = time.monotonic()
    address = parse(request.uri)
    installed = find(request.folder.expanduser().resolve())
    if installed is None:
        raise WeightsError(Kind.NOT_FOUND, f"there is no set of weights in {request.folder}; pull one first")
    if wrong := [one for one in damages(installed, full=False) if one.what != "unexpected"]:
        raise WeightsError(Kind.DAMAGED, f"{wrong[0].name} in {request.folder} is damaged; pull the set again")
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), request.patience))
        sent = _Push(store, request, installed.folder, installed.manifest, report).run(str(address), Path(scratch))
    manifest = installed.manifest
    listed = tuple(file.name for file in manifest.files)
    seconds = time.monotonic() - begun
    return Pushed(str(address), manifest.source, manifest.revision, listed, manifest.size, sent, seconds)


class _Push:
    def __init__(self, store: Store, request: Push, folder: Path, manifest: Manifest, report: Report) -> None:
        self._store = store
        self._request = request
        self._folder = folder
        self._manifest = manifest
        self._report = report
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self, where: str, scratch: Path) -> int:
        there = {file.name: file for file in self._listed(where)}
        self._report(Begun("push", len(self._manifest.files), self._manifest.size))
        whole = scratch / names.MANIFEST
        whole.write_bytes(render(self._manifest))
        missing = self._missing(there)
        if not missing and names.MANIFEST in there and self._same_manifest(there[names.MANIFEST], whole):
            return 0
        mark = scratch / names.UNFINISHED
        mark.write_text("A mirror was begun here and is not finished. Run it again.\n")
        self._write(names.UNFINISHED, mark, None)
        if names.MANIFEST in there:
            self._tried(names.MANIFEST, lambda: self._store.delete(names.MANIFEST))
        with ThreadPoolExecutor(max_workers=self._request.files_at_once) as workers:
            list(workers.map(self._write_file, missing))
        if self._failure:
            raise self._failure
        self._write(names.MANIFEST, whole, None)
        self._tried(names.UNFINISHED, lambda: self._store.delete(names.UNFINISHED))
        return sum(file.size for file in missing)

    def _listed(self, where: str) -> Sequence[StoredFile]:
        def look() -> Sequence[StoredFile]:
            try:
                return self._store.list().files
            except WeightsError as error:
                if error.kind is Kind.NOT_FOUND:
                    return ()  # nothing there yet
                raise

        return tried(where, self._request.patience, self._report, look)

    def _missing(self, there: dict[str, StoredFile]) -> list[ManifestFile]:
        missing = []
        for facts in self._manifest.files:
            file = there.get(facts.name)
            if file and file.size == facts.size and self._compare(file, facts):
                self._report(Advanced(facts.size, resumed=True))
                self._report(FileFinished(facts.name, facts.size, facts.checked_by))
            else:
                missing.append(facts)
        return missing

    def _compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        return self._tried(file.name, lambda: self._store.compare(file, facts))

    def _same_manifest(self, file: StoredFile, ours: Path) -> bool:
        if file.size != ours.stat().st_size:
            return False
        return self._tried(file.name, lambda: b"".join(self._store.read(file, 0, file.size))) == ours.read_bytes()

    def _write_file(self, facts: ManifestFile) -> None:
        try:
            if not self._stop.is_set():
                self._write(facts.name, self._folder / facts.name, facts)
                self._report(FileFinished(facts.name, facts.size, facts.checked_by))
        except BaseException as error:  # noqa: BLE001 (raised again by `run`, once the other files have stopped)
            self._failure = self._failure or error
            self._stop.set()

    def _write(self, name: str, path: Path, facts: ManifestFile | None) -> None:
        def write() -> None:
            told = 0

            def advance(size: int) -> None:
                nonlocal told
                told += size
                if self._stop.is_set():
                    raise WeightsError(Kind.INTERRUPTED, "another file failed")
                if facts:
                    self._report(Advanced(size))

            try:
                self._store.write(name, path, facts, advance)
            except WeightsError as error:
                if facts and told:
                    self._report(FileRestarted(name, told, str(error)))
                raise

        self._tried(name, write)

    def _tried(self, what: str, call: Callable[[], T]) -> T:
        return tried(what, self._request.patience, self._report, call)
