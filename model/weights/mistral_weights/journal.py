"""The journal of a set on its way: which ranges have landed, so that a later run continues there.

A line ends in a checksum of itself, and of a range it is believed only after the bytes on the disk have been hashed again
and agree with it. So nothing needs to be synced here: a line that a crash tore off costs one range, and a line that came
too early is found out.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_contract import untrusted

from .digests import blake3_of
from .disk import explained
from .manifest import ManifestFile
from .names import LARGEST_INDEX

_NAME = "journal.jsonl"


@dataclass
class Landed:
    """What the journal knows of one version of one file: range -> blake3, and the whole file once it is complete."""

    ranges: dict[int, str] = field(default_factory=dict)
    whole: ManifestFile | None = None
    stat: str = ""


class Journal:
    """Lines of JSON, only ever appended."""

    def __init__(self, folder: Path, range_bytes: int) -> None:
        self._path = folder / _NAME
        self._lock = threading.Lock()
        self._landed: dict[tuple[str, str], Landed] = {}
        with explained(self._path):
            old = self._path.read_bytes() if self._path.exists() else b""
            self._read(old, range_bytes)
            self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            if old and not old.endswith(b"\n"):
                os.write(self._handle, b"\n")
        self._append({"range_bytes": range_bytes})

    def landed(self, name: str, version: str) -> Landed:
        """What has landed of this version of the file."""
        return self._landed.setdefault((name, version), Landed())

    def other_version(self, name: str, version: str) -> bool:
        """Whether an earlier run began another version of the file."""
        return any(one == name and other != version and (at.ranges or at.whole) for (one, other), at in self._landed.items())

    def range_landed(self, name: str, version: str, index: int, blake3: str) -> None:
        self._append({"name": name, "version": version, "range": index, "blake3": blake3})

    def file_complete(self, version: str, facts: ManifestFile, stat: str) -> None:
        self._append({"version": version, "stat": stat, "whole": {**vars(facts), "ranges": list(facts.ranges)}})

    def void(self, name: str, version: str) -> None:
        """Takes back what was noted of this version of the file: its bytes were wrong."""
        self._append({"void": name, "version": version})

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._lock, explained(self._path):
            if self._handle >= 0:
                line = json.dumps(entry, separators=(",", ":")).encode()
                os.write(self._handle, line + b"\t" + _checksum(line) + b"\n")

    def _read(self, data: bytes, range_bytes: int) -> None:
        fits = False
        for written in data.split(b"\n"):
            line, _, checksum = written.rpartition(b"\t")
            if checksum != _checksum(line):
                continue  # torn or damaged: what it spoke of is fetched again
            try:
                entry = untrusted.read(line, LARGEST_INDEX)
                if "range_bytes" in entry:
                    fits = entry["range_bytes"] == range_bytes
                elif "void" in entry:
                    self._landed.pop((str(entry["void"]), str(entry["version"])), None)
                elif "whole" in entry:
                    facts = ManifestFile(**{**entry["whole"], "ranges": tuple(entry["whole"]["ranges"])})
                    if fits:
                        at = self.landed(facts.name, str(entry["version"]))
                        at.whole, at.stat = facts, str(entry["stat"])
                elif fits:
                    at = self.landed(str(entry["name"]), str(entry["version"]))
                    at.ranges[int(entry["range"])] = str(entry["blake3"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # of another version of this program


def _checksum(line: bytes) -> bytes:
    return blake3_of(line)[:16].encode()
