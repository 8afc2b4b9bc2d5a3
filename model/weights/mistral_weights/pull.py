"""Bringing a set of weights from a store into a folder, which appears only when it is complete and right."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from . import names
from .address import Address, parse
from .arrival import Wanted
from .disk import explained, require_space, sync_folder, write_whole, written_so_far
from .errors import Kind, WeightsError
from .events import Advanced, Begun, FileFinished, FileRestarted, Kept, Report, SetAside, silent
from .http_reader import readers
from .installed import Damage, Installed, damage, damages, find, stat_of, stats_of, write_state
from .journal import Journal
from .lock import locked
from .manifest import RANGE_BYTES, Manifest, ManifestFile, render, require_digest
from .patience import Patience
from .secrets import Secrets
from .source import Source, look, renew
from .stores import Opening, open_store
from .transfer import Conditions, Transfer


@dataclass(frozen=True)
class Pull:
    """What to bring where. `connections` is the number of ranges (of `range_bytes`) that are fetched at once.

    `direct` writes past the page cache where the file system can: the pull is faster, the first reading after it slower.
    `plain` reads through the store's SDK only; `full_check` hashes every byte of a set that is there already.
    `fresh` asks the store whether that set is still what it holds, and replaces one that is not, also one of another URI, as soon as the new
    one is whole. `digest` is what the set must have (`Manifest.digest`): a manifest that says another is refused before a file is fetched.
    """

    uri: str
    folder: Path
    revision: str = ""
    secrets: Secrets = field(default_factory=Secrets)
    form: str = "auto"
    connections: int = 10
    range_bytes: int = RANGE_BYTES
    direct: bool = True
    plain: bool = False
    full_check: bool = False
    fresh: bool = False
    digest: str = ""
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Pulled:
    """A set that is there and right. `fetched` counts the bytes that came over the network in this run.

    `unproven` are files of which the source promised no more than the size; `digest` stands for names, sizes and sha256 of all.
    `disk_written` and `disk_seconds` are what its disk wrote meanwhile (bytes, whoever wrote) and how long it was busy, None if unknown.
    """

    uri: str
    folder: str
    source: str
    revision: str
    license: str
    files: tuple[str, ...]
    bytes: int
    fetched: int
    resumed: int
    seconds: float
    already_there: bool
    disk_written: int | None = None
    disk_seconds: float | None = None
    digest: str = ""
    unproven: tuple[str, ...] = ()


def pull(request: Pull, report: Report = silent) -> Pulled:
    """Brings the set; at once when it is there already. Run again after any failure, it continues where it was."""
    begun = time.monotonic()
    address = parse(request.uri, request.revision)
    folder = request.folder.expanduser().resolve()
    if not request.fresh:
        with suppress(OSError, WeightsError):  # another pull may be replacing the set: what is wrong is found out alone
            if isinstance(there := _there(folder, address, request), Pulled):
                return replace(there, seconds=time.monotonic() - begun)
    with explained(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), request.patience.lock, report):
        there = _there(folder, address, request)
        if isinstance(there, tuple) and any(one.what == "unexpected" for one in there):
            _set_aside(folder, [one.name for one in there if one.what == "unexpected"], report)
            there = _there(folder, address, request)
        if isinstance(there, Pulled) and (not request.fresh or _is_fresh(request, address, folder, report)):
            return replace(there, seconds=time.monotonic() - begun)
        partial = folder.with_name(f".{folder.name}.partial")
        if isinstance(there, tuple):
            _withdraw(folder, partial, there)
        with explained(partial):
            partial.mkdir(exist_ok=True)
        before = written_so_far(partial)
        try:
            brought, tally = _bring(request, address, partial, report)
        finally:
            with suppress(OSError):
                partial.rmdir()  # only when nothing came into it
        _publish(brought, folder)
    manifest = brought.manifest
    found = replace(
        _already(address, folder, manifest), seconds=time.monotonic() - begun, fetched=tally.fetched, resumed=tally.resumed,
        already_there=False,
    )  # fmt: skip
    after = written_so_far(folder)
    if before is None or after is None:
        return found
    return replace(found, disk_written=after[0] - before[0], disk_seconds=round(after[1] - before[1], 3))


def _there(folder: Path, address: Address, request: Pull) -> Pulled | tuple[Damage, ...] | None:
    """The set that is there already, what is wrong with it, or None."""
    try:
        installed = find(folder)
    except WeightsError as error:
        if error.kind is not Kind.DAMAGED:
            raise
        return (Damage(names.MANIFEST, "content"),)
    if installed is None:
        return None
    if request.fresh and not _same(installed, address):
        return None
    if request.digest and installed.manifest.digest != request.digest and _same(installed, address):
        return None  # another set than the one that is wanted: it is replaced, once that is here
    _require_same(installed, address)
    stats = stats_of(installed)  # a file that is changed from now on has another
    wrong = damages(installed, request.full_check)
    if wrong:
        return wrong
    if stats != installed.stats:
        with suppress(WeightsError):  # a folder that we may only read: the next check hashes again
            write_state(installed, stats)
    return _already(address, folder, installed.manifest)


def _same(installed: Installed, address: Address) -> bool:
    return str(address) in {installed.address, installed.manifest.source}


def _is_fresh(request: Pull, address: Address, folder: Path, report: Report) -> bool:
    """Whether the store still holds the set that is there: the same files in the same versions."""
    installed = find(folder)
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), request.patience))
        try:
            source = look(store, address, request.form, request.patience, report)
        except WeightsError as error:
            if error.kind is not Kind.UNREACHABLE:
                raise
            report(Kept(str(error)))
            return True
    return installed is not None and {one.file.name: one.file.version for one in source.wanted} == dict(installed.versions)


def _require_same(installed: Installed, address: Address) -> None:
    if not _same(installed, address):
        held = installed.address or installed.manifest.source
        raise WeightsError(Kind.USAGE, f"{installed.folder} holds {held}, not {address}; name another folder or remove it")


def _set_aside(folder: Path, unnamed: list[str], report: Report) -> None:
    """Moves what the manifest does not name out of the set: nothing of it is loaded, and nothing is lost."""
    aside = folder.with_name(f".{folder.name}.unexpected-{time.time_ns()}")
    with explained(folder):
        for name in unnamed:
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(target)
    report(SetAside(tuple(unnamed), str(aside)))


def _withdraw(folder: Path, partial: Path, wrong: tuple[Damage, ...]) -> None:
    """Takes a damaged set out of sight, and notes what of it is right: only the rest is fetched again."""
    with explained(folder):
        if partial.exists():
            shutil.rmtree(partial)
        folder.rename(partial)
        try:
            installed = find(partial)
        except WeightsError:
            return  # without its manifest nothing is known to be right
    if installed is None:
        return
    bad = {one.name for one in wrong}
    journal = Journal(partial, installed.manifest.range_bytes)
    for facts in installed.manifest.files:
        version, path = installed.versions.get(facts.name, ""), partial / facts.name
        if facts.name not in bad:
            journal.file_complete(version, facts, "")
        elif stat_of(path):
            path.rename(path.with_name(f"{path.name}.partial"))
            for index, blake3 in enumerate(facts.ranges):
                journal.range_landed(facts.name, version, index, blake3)
        else:
            path.unlink(missing_ok=True)
    journal.close()


@dataclass
class _Tally:
    fetched: int = 0
    resumed: int = 0


def _bring(request: Pull, address: Address, partial: Path, report: Report) -> tuple[Installed, _Tally]:
    tally = _Tally()

    def counted(event: object) -> None:
        if isinstance(event, Advanced):
            if event.resumed:
                tally.resumed += event.bytes
            else:
                tally.fetched += event.bytes
        report(event)  # type: ignore[arg-type]

    patience = request.patience
    store = open_store(address, Opening(request.secrets, partial / ".scratch", patience))
    source = look(store, address, request.form, patience, report)
    if source.manifest:
        require_digest(source.manifest, request.digest, str(address))
    range_bytes = source.manifest.range_bytes if source.manifest else request.range_bytes
    journal = Journal(partial, range_bytes)
    try:
        report(Begun("pull", len(source.wanted), source.size))
        complete = _complete_already(partial, source, journal, range_bytes, counted)
        missing = [one for one in source.wanted if one.file.name not in complete]
        require_space(partial, _still_to_come(partial, missing))
        conditions = Conditions(
            range_bytes=range_bytes,
            connections=request.connections,
            direct=request.direct,
            patience=patience,
            new_reader=readers(store, patience, request.plain),
            renew=lambda wanted: renew(store, wanted, patience, report),
        )

        def note(wanted: Wanted, facts: ManifestFile) -> None:
            journal.file_complete(wanted.file.version, facts, stat_of(partial / facts.name))

        facts = {**complete, **Transfer(conditions, counted, partial, journal, note).run(missing)}
    finally:
        journal.close()
    files = tuple(facts[one.file.name] for one in source.wanted)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    contents = source.contents
    manifest = source.manifest or Manifest(contents.source, contents.revision, contents.license, created, range_bytes, files)
    require_digest(manifest, request.digest, str(address))
    versions = {one.file.name: one.file.version for one in source.wanted}
    return Installed(partial, manifest, str(address), {}, versions), tally


def _complete_already(
    partial: Path, source: Source, journal: Journal, range_bytes: int, report: Report
) -> dict[str, ManifestFile]:
    """The files that an earlier run completed: believed when their stat is the noted one, else read again."""
    complete: dict[str, ManifestFile] = {}
    for wanted in source.wanted:
        name, version = wanted.file.name, wanted.file.version
        if journal.other_version(name, version):
            report(FileRestarted(name, 0, f"{name} has changed in the store since the last run"))
        at = journal.landed(name, version)
        facts = wanted.facts or at.whole
        if facts is None or not stat_of(partial / name):
            continue
        if (at.stat == stat_of(partial / name) and at.whole == facts) or not damage(partial, facts, range_bytes):
            complete[name] = facts
            report(Advanced(facts.size, resumed=True))
            report(FileFinished(name, facts.size, facts.checked_by))
    return complete


def _still_to_come(partial: Path, missing: list[Wanted]) -> int:
    total = 0
    for wanted in missing:
        path = partial / f"{wanted.file.name}.partial"
        there = path.stat().st_blocks * 512 if path.exists() else 0
        total += max(0, wanted.file.size - there)
    return total


def _publish(brought: Installed, folder: Path) -> None:
    """Clears what only the journey needed, and lets the set appear."""
    partial, manifest = brought.folder, brought.manifest
    keep = {file.name for file in manifest.files}
    with explained(partial):
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(partial).as_posix() not in keep:
                path.unlink()
        for parent in {(partial / name).parent for name in keep}:
            sync_folder(parent)
        write_whole(partial / names.MANIFEST, render(manifest))
        write_state(brought)
        old = partial.with_name(f".{folder.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _already(address: Address, folder: Path, manifest: Manifest) -> Pulled:
    """A set for which nothing was fetched."""
    return Pulled(
        uri=str(address),
        folder=str(folder),
        source=manifest.source,
        revision=manifest.revision,
        license=manifest.license,
        files=tuple(file.name for file in manifest.files),
        bytes=manifest.size,
        fetched=0,
        resumed=0,
        seconds=0.0,
        already_there=True,
        digest=manifest.digest,
        unproven=tuple(file.name for file in manifest.files if file.checked_by == "size"),
    )
