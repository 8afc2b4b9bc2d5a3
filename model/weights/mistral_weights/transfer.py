"""Ranges of files, fetched in parallel, each checked as it lands.

A worker takes a buffer and then the earliest range that nobody has. It fills the buffer (from the disk, when an earlier
run left that range there and it is still right; else from the store), checks it, writes it, and hands it to the file's
hashing. As buffers are taken before ranges, the earliest open range always has one: parked buffers cannot block it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .arrival import Arrival, Wanted
from .disk import page_aligned
from .errors import Kind, WeightsError
from .events import Advanced, FileFinished, FileRestarted, Report, Retrying
from .journal import Journal
from .manifest import ManifestFile
from .patience import Patience
from .stores import StoredFile

RESTARTS: dict[Kind, int] = {Kind.CHANGED: 3, Kind.DAMAGED: 2}


class Reader(Protocol):
    """Fills buffers with ranges of files; every worker has one of its own.

    The result is the blake3 of what came, taken piece by piece while it is still in the processor's cache.
    """

    def read_into(self, file: StoredFile, start: int, buffer: memoryview) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Conditions:
    """How to transfer. `renew` looks a file up again after it changed in the store."""

    range_bytes: int
    connections: int
    direct: bool
    patience: Patience
    new_reader: Callable[[], Reader]
    renew: Callable[[Wanted], Wanted]


def nothing(wanted: Wanted, facts: ManifestFile) -> None:
    """What to do with a complete file: nothing."""


class Transfer:
    """Fetches files with several workers: into `folder`, or nowhere when they are only to be checked."""

    def __init__(
        self,
        conditions: Conditions,
        report: Report,
        folder: Path | None = None,
        journal: Journal | None = None,
        complete: Callable[[Wanted, ManifestFile], None] = nothing,
    ) -> None:
        self._conditions = conditions
        self._report = report
        self._folder = folder
        self._journal = journal
        self._complete = complete
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._readers: list[Reader] = []
        self._arrivals: list[Arrival] = []
        self._tasks: list[tuple[int, int]] = []  # (range, number of the arrival), the earliest last
        self._open = 0
        self._restarts: dict[str, int] = {}
        self._facts: dict[str, ManifestFile] = {}
        self._buffers: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()

    def run(self, wanted: Sequence[Wanted]) -> dict[str, ManifestFile]:
        """The facts of every file, by name, once all are complete and right."""
        try:
            for one in wanted:
                self._begin(one)
            ranges = sum(arrival.count for arrival in self._arrivals)
            workers = max(1, min(self._conditions.connections, ranges))
            spare = workers // 4 if any(arrival.in_order for arrival in self._arrivals) else 0
            for _ in range(min(max(1, ranges), workers + spare)):
                self._buffers.put(page_aligned(self._conditions.range_bytes))
            self._run(workers)
        finally:
            for arrival in self._arrivals:
                arrival.close()
        return self._facts

    def _begin(self, wanted: Wanted) -> None:
        arrival = Arrival(wanted, self._conditions.range_bytes, self._folder, self._journal, self._conditions.direct)
        with self._changed:
            self._arrivals.append(arrival)
            self._open += 1
            number = len(self._arrivals) - 1
            self._tasks += [(index, number) for index in range(arrival.count)]
            self._tasks.sort(reverse=True)  # the same range of every file comes together: files hash side by side
            self._changed.notify_all()
        if arrival.count == 0:
            self._finish(arrival)

    def _run(self, workers: int) -> None:
        threads = [threading.Thread(target=self._work, daemon=True, name=f"weights-{n}") for n in range(workers)]
        for thread in threads:
            thread.start()
        try:
            with self._changed:
                while self._open and not self._stop.is_set():
                    self._changed.wait(0.5)
        except BaseException as error:  # noqa: BLE001 (an interrupt, too, must first stop the workers)
            self._fail(error)
        self._stop.set()
        for _ in threads:
            self._buffers.put(None)
        with self._changed:
            self._changed.notify_all()
            readers = list(self._readers)
        if self._failure:
            for reader in readers:
                reader.close()
        for thread in threads:
            thread.join(self._conditions.patience.stall)
        if self._failure:
            raise self._failure

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._stop.set()
            self._changed.notify_all()

    def _work(self) -> None:
        reader: Reader | None = None
        try:
            reader = self._conditions.new_reader()
            with self._changed:
                self._readers.append(reader)
            while (buffer := self._buffers.get()) is not None:
                task = self._take()
                if task is None:
                    return
                for free in self._one(reader, self._arrivals[task[1]], task[0], buffer):
                    self._buffers.put(free)
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that called `run`)
            if not self._stop.is_set():
                self._fail(error)
        finally:
            if reader is not None:
                reader.close()

    def _take(self) -> tuple[int, int] | None:
        with self._changed:
            while not self._stop.is_set():
                if self._tasks:
                    return self._tasks.pop()
                self._changed.wait(0.5)
            return None

    def _one(self, reader: Reader, arrival: Arrival, index: int, buffer: memoryview) -> list[memoryview]:
        """One range from store or disk to its place; the buffers that are free again, each of them once."""
        if arrival.dead:
            return [buffer]
        start, stop = arrival.bounds(index)
        view = buffer[: stop - start]
        blake3 = arrival.restore(index, view)
        resumed = bool(blake3)
        if not resumed:
            try:
                blake3 = self._fetch(reader, arrival, index, start, view)
            except WeightsError as error:
                return [buffer, *self._restart(arrival, error)]
            if arrival.dead:
                return [buffer]
            arrival.keep(index, view, blake3)
        self._report(Advanced(stop - start, resumed))
        free, whole = arrival.land(index, buffer, view, blake3)
        if whole:
            try:
                self._finish(arrival)
            except WeightsError as error:
                return [*free, *self._restart(arrival, error)]
        return free

    def _fetch(self, reader: Reader, arrival: Arrival, index: int, start: int, view: memoryview) -> str:
        failures = 0
        while True:
            try:
                return arrival.check(index, reader.read_into(arrival.wanted.file, start, view))
            except WeightsError as error:
                failures += 1
                seconds = self._conditions.patience.wait(error, failures)
                if seconds is None or self._stop.is_set() or arrival.dead:
                    raise
                self._report(Retrying(arrival.name, str(error), seconds))
                if self._stop.wait(seconds):
                    raise

    def _finish(self, arrival: Arrival) -> None:
        facts = arrival.finish()
        self._complete(arrival.wanted, facts)
        self._report(FileFinished(facts.name, facts.size, facts.checked_by))
        with self._changed:
            self._facts[facts.name] = facts
            self._open -= 1
            self._changed.notify_all()

    def _restart(self, arrival: Arrival, error: WeightsError) -> list[memoryview]:
        """The file has changed in the store, or arrived wrong: from the beginning, a few times at most."""
        if error.kind not in RESTARTS:
            raise error
        with self._changed:
            if arrival.dead:
                return []
            lost, free = arrival.abandon()
            self._restarts[arrival.name] = self._restarts.get(arrival.name, 0) + 1
            if self._restarts[arrival.name] > RESTARTS[error.kind]:
                raise error
        self._report(FileRestarted(arrival.name, lost, str(error)))
        self._begin(self._conditions.renew(arrival.wanted))
        with self._changed:
            self._open -= 1
        return free
