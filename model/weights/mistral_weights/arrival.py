"""One file on its way: which of its ranges have landed, and its hashes, taken in order while they land."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import digests
from .disk import PartialFile
from .errors import Kind, WeightsError
from .journal import Journal
from .manifest import ManifestFile, range_count
from .stores import StoredFile


@dataclass(frozen=True)
class Wanted:
    """A file to fetch. `facts`: what the source's manifest says of it. `promises`: what the store itself promises."""

    file: StoredFile
    facts: ManifestFile | None = None
    promises: Mapping[str, str] = field(default_factory=dict)

    @property
    def expected(self) -> Mapping[str, str]:
        """Checksums of the whole file that must agree."""
        return {"sha256": self.facts.sha256, "blake3": self.facts.blake3} if self.facts else self.promises


class Arrival:
    """Without a `folder` the bytes of the file are only checked, and nothing is kept.

    When the manifest has the blake3 of every range, the ranges prove the file, in any order. Otherwise the file's own
    hashes are taken from first byte to last: a range that comes too early waits, with its buffer, for its turn.
    """

    def __init__(self, wanted: Wanted, range_bytes: int, folder: Path | None, journal: Journal | None, direct: bool) -> None:
        self.wanted = wanted
        self.name = wanted.file.name
        self.count = range_count(wanted.file.size, range_bytes)
        self.dead = False
        self._range_bytes = range_bytes
        self._journal = journal
        self._target = folder / self.name if folder else None
        self._partial: PartialFile | None = None
        if self._target:
            path = self._target.with_name(self._target.name + ".partial")
            self._partial = PartialFile(path, wanted.file.size, direct=direct)
        facts = wanted.facts
        self._by_ranges = facts is not None and len(facts.ranges) == self.count
        kinds = {*digests.OURS, digests.strongest(wanted.expected)} - {""}
        self._digests = {} if self._by_ranges else {kind: digests.start(kind, wanted.file.size) for kind in kinds}
        self._noted = dict(journal.landed(self.name, wanted.file.version).ranges) if journal and folder else {}
        self._lock = threading.Lock()
        self._blake3s: dict[int, str] = {}
        self._parked: dict[int, tuple[memoryview, memoryview]] = {}
        self._next = 0
        self._hashing = False
        self._told_whole = False

    @property
    def in_order(self) -> bool:
        """Whether ranges that come too early have to wait for their turn."""
        return bool(self._digests)

    def bounds(self, index: int) -> tuple[int, int]:
        """The first byte of a range, and the byte after its last."""
        start = index * self._range_bytes
        return start, min(start + self._range_bytes, self.wanted.file.size)

    def check(self, index: int, blake3: str) -> str:
        """The blake3 of a range that came; an error when the manifest has another."""
        facts = self.wanted.facts
        if self._by_ranges and facts is not None and facts.ranges[index] != blake3:
            start, stop = self.bounds(index)
            raise WeightsError(
                Kind.DAMAGED,
                f"bytes {start} to {stop - 1} of {self.name} are not what the manifest promises; "
                "the source is damaged: mirror it again, or use another",
            )
        return blake3

    def restore(self, index: int, view: memoryview) -> str:
        """Fills `view` with a range that an earlier run left on the disk; its blake3, or empty if it is not right."""
        noted = self._noted.get(index)
        if not noted or not self._partial or not self._partial.read_into(self.bounds(index)[0], view):
            return ""
        facts = self.wanted.facts
        if digests.blake3_of(view) != noted or (self._by_ranges and facts is not None and facts.ranges[index] != noted):
            return ""
        return noted

    def keep(self, index: int, view: memoryview, blake3: str) -> None:
        """Puts a checked range in its place on the disk, and notes it."""
        if self._partial:
            self._partial.write(self.bounds(index)[0], view)
        if self._journal and self._partial:
            self._journal.range_landed(self.name, self.wanted.file.version, index, blake3)

    def land(self, index: int, buffer: memoryview, view: memoryview, blake3: str) -> tuple[list[memoryview], bool]:
        """Counts a range and hashes what has its turn; the buffers that are free again, and whether the file is whole.

        Exactly one call says that the file is whole.
        """
        free: list[memoryview] = []
        with self._lock:
            if self.dead:
                return [buffer], False
            self._blake3s[index] = blake3
            if not self._digests:
                return [buffer], self._is_whole()
            self._parked[index] = (buffer, view)
            if self._hashing:
                return [], False
            self._hashing = True
        while True:
            with self._lock:
                entry = self._parked.pop(self._next, None)
                if entry is None:
                    self._hashing = False
                    return free, self._is_whole()
            for digest in self._digests.values():
                digest.update(entry[1])
            free.append(entry[0])
            with self._lock:
                self._next += 1

    def _is_whole(self) -> bool:
        whole = (
            not self.dead
            and not self._told_whole
            and len(self._blake3s) == self.count
            and (not self._digests or self._next == self.count)
        )
        self._told_whole = self._told_whole or whole
        return whole

    def finish(self) -> ManifestFile:
        """Holds the whole file against what was promised, and gives it its name."""
        file, facts = self.wanted.file, self.wanted.facts
        ranges = tuple(self._blake3s[index] for index in range(self.count))
        if self._by_ranges and facts is not None:
            result = facts
        else:
            found = {kind: digest.hexdigest() for kind, digest in self._digests.items()}
            expected = self.wanted.expected
            wrong = digests.disagreement(expected, found)
            if wrong:
                raise WeightsError(
                    Kind.DAMAGED,
                    f"{file.name} has {wrong} {found[wrong][:16]}… but {expected[wrong][:16]}… was promised; "
                    "the source is damaged: mirror it again, or use another",
                )
            by = facts.checked_by if facts else digests.strongest(expected) or "size"
            result = ManifestFile(file.name, file.size, found["sha256"], found["blake3"], ranges, by)
        if self._partial and self._target:
            self._partial.finish(self._target)
        return result

    def abandon(self) -> tuple[int, list[memoryview]]:
        """Gives the file up; the bytes that no longer count, and the buffers that were waiting.

        Workers that still hold one of its ranges write into a file that has no name any more.
        """
        with self._lock:
            self.dead = True
            lost = sum(stop - start for start, stop in map(self.bounds, self._blake3s))
            free = [buffer for buffer, _ in self._parked.values()]
            self._parked.clear()
        if self._journal:
            self._journal.void(self.name, self.wanted.file.version)
        if self._partial:
            self._partial.path.unlink(missing_ok=True)
        return lost, free

    def close(self) -> None:
        if self._partial:
            self._partial.close()
