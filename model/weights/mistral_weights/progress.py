"""Progress for eyes and for programs: a bar on a terminal, lines when piped, JSON events with -o json."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from .events import Advanced, Begun, Event, FileFinished, FileRestarted, Kept, Report, Retrying, SetAside, Waiting
from .names import listed

VERSION = 1  # of the lines of JSON
LINE_SECONDS = 5.0
EVENT_SECONDS = 0.5
NAMES: dict[type, str] = {
    Begun: "begun", FileFinished: "file", FileRestarted: "restarted", Retrying: "retrying", Waiting: "waiting", Kept: "kept",
    SetAside: "set_aside",
}  # fmt: skip


@contextmanager
def progress(output: str) -> Iterator[Report]:
    """A report for the command line; it goes to standard error, JSON events to standard output."""
    shown: _Bar | _Lines | _Events
    if output == "json":
        shown = _Events(sys.stdout)
    elif sys.stderr.isatty():
        shown = _Bar(sys.stderr)
    else:
        shown = _Lines(sys.stderr)
    lock = threading.Lock()

    def report(event: Event) -> None:
        with lock:
            shown.take(event)

    try:
        yield report
    finally:
        shown.close()


def sentence(event: Event) -> str:
    """What a person wants to know of an event; empty when nothing."""
    match event:
        case Begun(what, files, size):
            return f"{what}: {files} files, {size / 1e9:.2f} GB"
        case Retrying(name, why, seconds):
            return f"{name}: {why} (trying again in {seconds:.1f} s)"
        case FileRestarted(name, _, why):
            return f"{name} starts again: {why}"
        case Waiting(for_what):
            return f"waiting for {for_what}"
        case Kept(why):
            return f"what is there is used as it is: {why}"
        case SetAside(names, where):
            return f"{listed(names)} lay in the set, and its manifest does not name it: moved to {where}"
        case _:
            return ""


def _say(line: str, out: TextIO) -> None:
    out.write(line + "\n")
    out.flush()


class _Bar:
    def __init__(self, out: TextIO) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=0, unit="B", unit_scale=True, file=out, dynamic_ncols=True, smoothing=0.1, disable=None)

    def take(self, event: Event) -> None:
        match event:
            case Begun(what, _, size):
                self._bar.set_description(what)
                self._bar.reset(total=size)
            case Advanced(size):
                self._bar.update(size)
            case FileRestarted(_, size, _):
                self._bar.update(-size)
        if text := sentence(event):
            self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()


class _Counted:
    """Counts the bytes that are there and the seconds since they began."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._begun = self._said = time.monotonic()
        self._total = self._done = 0

    def count(self, event: Event) -> None:
        match event:
            case Begun(_, _, size):
                self._total, self._done, self._begun = size, 0, time.monotonic()
            case Advanced(size):
                self._done += size
            case FileRestarted(_, size, _):
                self._done -= size

    def close(self) -> None:
        """Nothing to tidy."""


class _Lines(_Counted):
    def take(self, event: Event) -> None:
        self.count(event)
        if text := sentence(event):
            _say(text, self._out)
        elif time.monotonic() - self._said >= LINE_SECONDS and self._total:
            self._said = time.monotonic()
            speed = self._done / max(self._said - self._begun, 1e-3)
            left = f", {(self._total - self._done) / speed:.0f} s left" if speed else ""
            percent = 100 * self._done // self._total
            text = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB ({percent} %), {speed / 1e6:.0f} MB/s{left}"
            _say(text, self._out)


class _Events(_Counted):
    def take(self, event: Event) -> None:
        self.count(event)
        if not isinstance(event, Advanced):
            self._print({"event": NAMES[type(event)], **asdict(event)})
        elif time.monotonic() - self._said >= EVENT_SECONDS or self._done == self._total:
            self._said = time.monotonic()
            seconds = round(self._said - self._begun, 3)
            self._print({"event": "progress", "bytes": self._done, "total": self._total, "seconds": seconds})

    def _print(self, entry: dict[str, object]) -> None:
        _say(json.dumps({"version": VERSION, **entry}), self._out)
