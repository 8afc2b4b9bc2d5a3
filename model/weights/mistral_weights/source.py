"""What there is to fetch at an address: files chosen, manifest read, promises collected."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import manifest as manifests
from . import names
from .address import Address
from .arrival import Wanted
from .errors import Kind, WeightsError
from .events import Report
from .patience import Patience
from .reader import PlainReader
from .retrying import tried
from .stores import Contents, Store, StoredFile

LARGEST_FILE = 2**44
POINTER, LARGEST_POINTER = b"version https://git-lfs", 1024  # what git keeps of a file that git-lfs has


@dataclass(frozen=True)
class Source:
    """A set in a store; `manifest` is None where the store holds none."""

    contents: Contents
    wanted: tuple[Wanted, ...]
    manifest: manifests.Manifest | None

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(one.file.size for one in self.wanted)


def look(store: Store, address: Address, form: str, patience: Patience, report: Report) -> Source:
    """What serving needs of the set at `address`, and what every file is to be held against."""
    where = str(address)
    contents = tried(where, patience, report, store.list)
    if address.file:
        contents = _only(contents, address.file)
    files = {file.name: file for file in contents.files}
    if len(files) != len(contents.files):
        raise WeightsError(Kind.REFUSED, f"{where} lists a file twice; do not use this source")
    for file in contents.files:
        names.check(file.name)
        if not 0 <= file.size <= LARGEST_FILE:
            raise WeightsError(Kind.REFUSED, f"{file.name} at {where} has {file.size} bytes by its store; do not use this source")
    if names.MANIFEST in files:
        data = _whole(store, files[names.MANIFEST], patience, report)
        return _with_manifest(contents, files, manifests.read(data, where), address, form)
    if names.UNFINISHED in files:
        raise WeightsError(Kind.DAMAGED, f"the mirror at {where} was never finished; run `mirror` to it again")
    if form == names.FOLDER:
        raise WeightsError(
            Kind.NOT_FOUND, f"{where} holds no folder that was sealed (it has no {names.MANIFEST}); look at the address"
        )
    chosen = names.select(files, form)
    if absent := names.absent_shards(chosen):
        raise WeightsError(Kind.DAMAGED, f"{where} lacks {absent[0]}, which the names of its other files count; use a whole copy")
    # The hub itself puts files in the place of pointers; there somebody has uploaded them as weights, if at all.
    looked_at = [name for name in chosen if address.scheme != "hf" or names.kind_of(name) in names.FORMATS]
    _no_pointers(store, where, [files[name] for name in looked_at], patience, report)
    wanted = []
    for name in chosen:
        file = files[name]
        promises = tried(name, patience, report, lambda file=file: store.promises(file))  # type: ignore[misc]
        wanted.append(Wanted(file, None, promises))
        if name.endswith(".safetensors.index.json"):
            _complete(where, _whole(store, file, patience, report), chosen)
    return Source(contents, tuple(wanted), None)


def renew(store: Store, wanted: Wanted, patience: Patience, report: Report) -> Wanted:
    """The same file as it is in the store now."""
    name = wanted.file.name
    contents = tried(name, patience, report, store.list)
    file = next((file for file in contents.files if file.name == name), None)
    if file is None:
        raise WeightsError(Kind.NOT_FOUND, f"{name} was taken away at {contents.source}; check the source")
    if wanted.facts:
        if file.size != wanted.facts.size:
            raise _not_as_promised(name, contents.source)
        return replace(wanted, file=file)
    return Wanted(file, None, tried(name, patience, report, lambda: store.promises(file)))


def _with_manifest(
    contents: Contents, files: dict[str, StoredFile], manifest: manifests.Manifest, address: Address, form: str
) -> Source:
    where, wanted = str(address), []
    chosen = set(names.select((file.name for file in manifest.files if address.file in ("", file.name)), form))
    kept = tuple(facts for facts in manifest.files if facts.name in chosen)
    for facts in kept:
        file = files.get(facts.name)
        if file is None:
            raise WeightsError(Kind.DAMAGED, f"{where} lacks {facts.name}, which its manifest names; mirror it again")
        if file.size != facts.size:
            raise _not_as_promised(facts.name, where)
        wanted.append(Wanted(file, facts))
    return Source(contents, tuple(wanted), replace(manifest, files=kept))


def _not_as_promised(name: str, where: str) -> WeightsError:
    return WeightsError(Kind.DAMAGED, f"{name} at {where} has not the size that its manifest promises; mirror it again")


def beginning(store: Store, file: StoredFile, size: int, patience: Patience, report: Report) -> bytes:
    """The first `size` bytes of a file, or all of it."""

    def read() -> bytes:
        buffer = bytearray(min(size, file.size))
        if buffer:
            PlainReader(store).read_into(file, 0, memoryview(buffer))
        return bytes(buffer)

    return tried(file.name, patience, report, read)


def _only(contents: Contents, name: str) -> Contents:
    """One file of what lies there, as if nothing lay beside it."""
    files = tuple(file for file in contents.files if file.name == name or file.name in names.OWN)
    folder = contents.source.removesuffix(f"/{name}")
    if not any(file.name == name for file in files):
        there = names.listed(file.name for file in contents.files if file.name.endswith(".gguf"))
        raise WeightsError(Kind.NOT_FOUND, f"{folder} has no {name}; its GGUF files are {there}")
    return replace(contents, files=files, source=f"{folder}/{name}")


def _no_pointers(store: Store, where: str, files: list[StoredFile], patience: Patience, report: Report) -> None:
    for file in files:
        small = len(POINTER) <= file.size < LARGEST_POINTER
        if small and beginning(store, file, len(POINTER), patience, report) == POINTER:
            raise WeightsError(
                Kind.REFUSED,
                f"{file.name} at {where} is a pointer of git-lfs, not the weights; run git lfs pull where it was cloned",
            )


def _whole(store: Store, file: StoredFile, patience: Patience, report: Report) -> bytes:
    if file.size > names.LARGEST_INDEX:
        raise WeightsError(Kind.REFUSED, f"{file.name} has {file.size} bytes, far too many; do not use this source")

    return beginning(store, file, file.size, patience, report)


def _complete(where: str, index: bytes, chosen: tuple[str, ...]) -> None:
    missing = names.missing_shards(index, chosen)
    if missing:
        raise WeightsError(Kind.DAMAGED, f"{where} lacks {missing[0]}, which its index names; use a whole copy")
