"""Where a secret is: in files, plain or encoded, and in arguments and environments of processes, looked at all the time."""

from __future__ import annotations

import base64
import mmap
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil

PAUSE_SECONDS = 0.2


def forms(secret: str) -> list[bytes]:
    """How it may be written: as it is, in hex, quoted for a URL, in UTF-16, and within base64 at each of its three offsets."""
    raw = secret.encode()
    found = {raw, raw.hex().encode(), quote(secret, safe="").encode(), secret.encode("utf-16-le")}
    for offset in range(3):
        # What the first and the last whole group of three bytes become depends on the neighbours; the middle does not.
        inner = base64.b64encode(bytes(offset) + raw)[4 if offset else 0 : (offset + len(raw)) // 3 * 4]
        found |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    return sorted(found)


@dataclass
class Files:
    """What was searched, and which files hold which of the secrets."""

    files: int = 0
    bytes: int = 0
    hits: dict[str, list[Path]] = field(default_factory=dict)


def in_files(folders: Iterable[Path], secrets: Mapping[str, str]) -> Files:
    """Searches every file below these folders; links are not followed."""
    wanted = {name: forms(secret) for name, secret in secrets.items()}
    found = Files(hits={name: [] for name in secrets})
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                if path.is_symlink() or not path.is_file():
                    continue
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    found.files += 1
                    found.bytes += len(content)
                    for name, every in wanted.items():
                        if any(content.find(form) >= 0 for form in every):
                            found.hits[name].append(path)
            except (FileNotFoundError, ValueError):  # a log that was just rotated; an empty file
                continue
    return found


class Processes:
    """Looks at every process of this machine, so also at those of simulated nodes, from `start` to `stop`.

    `arguments` and `environments` are (secret, command line) of those that hold one there; `seen` counts processes.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self._secrets = dict(secrets)
        self._seen: set[tuple[int, float, str]] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.arguments: set[tuple[str, str]] = set()
        self.environments: set[tuple[str, str]] = set()

    @property
    def seen(self) -> int:
        return len({(pid, created) for pid, created, _ in self._seen})

    def start(self) -> Processes:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE_SECONDS):
            for process in psutil.process_iter():
                try:
                    words = " ".join(process.cmdline())
                    key = (process.pid, process.create_time(), words)  # another program in the same process is looked at again
                    if key in self._seen:
                        continue
                    self._seen.add(key)
                    environment = "\n".join(process.environ().values())
                except (psutil.Error, OSError):
                    continue
                for name, secret in self._secrets.items():
                    if secret in words:
                        self.arguments.add((name, words))
                    if secret in environment:
                        self.environments.add((name, words))
