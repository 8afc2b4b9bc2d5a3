"""Keys that lie in an object of a bucket: followed from here, beside the server, and put where the guard reads them when they are newer.

The object is read by `mistral_weights.follow` in a process of its own, with the stores' SDKs and the machine's role, which vLLM's user cannot
reach. Whatever goes wrong there keeps the keys that are in force, holds up nothing, and is in the status.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mistral_contract import files, keys

SILENT_SECONDS = 60.0  # a look has a limit of its own, which is shorter
AGAIN_SECONDS = 5.0
END_SECONDS = 5.0


class KeySource:
    """Follows the object at `uri` for the deployment in `run_dir` until `end`."""

    def __init__(self, uri: str, run_dir: Path) -> None:
        self.uri = uri
        self._run_dir = run_dir
        self._file, self._lock = run_dir / files.KEYS.name / files.KEYS_FILE.name, run_dir / files.KEYS_LOCK.name
        self._over, self._looked = threading.Event(), threading.Event()
        self._heard = time.monotonic()
        self._content = self._unread = ""  # what is wrong with what was read last, and why it cannot be read
        self._since: float | None = None
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True, name="keys")

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def first(self, asked: threading.Event, seconds: float) -> None:
        """Waits for the first look, so many seconds at most, or until the launcher is asked to end."""
        deadline = time.monotonic() + seconds
        while not (self._looked.is_set() or asked.is_set() or time.monotonic() > deadline):
            self._looked.wait(0.05)

    def status(self) -> dict[str, Any]:
        """As it is in status.json: why the object is not followed now, and since when; both null while it is."""
        silent = time.monotonic() - self._heard > SILENT_SECONDS
        problem = self._unread or self._content or ("what reads it does not answer" if silent else "")
        self._since = (self._since or round(time.time(), 3)) if problem else None
        return {"uri": self.uri, "problem": problem or None, "since": self._since}

    def end(self) -> None:
        """Ends what reads the object."""
        self._over.set()
        process = self._process
        if process is not None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()

    def _command(self) -> list[str]:
        python = self._run_dir / files.WEIGHTS_TOOL.name / "bin" / "python"
        return [str(python), "-m", "mistral_weights.follow", self.uri]

    def _follow(self) -> None:
        while not self._over.is_set():
            try:
                with self._reading() as lines:
                    for line in lines:
                        self._take(json.loads(line))
                if not self._over.is_set():
                    self._unread = "what reads it has ended; it is started again"
            except Exception as error:  # noqa: BLE001 - a thread that ends would follow no revocation any more
                self._unread = f"what reads it does not work: {error}"
            self._looked.set()
            self._over.wait(AGAIN_SECONDS)

    @contextmanager
    def _reading(self) -> Iterator[Iterator[str]]:
        with subprocess.Popen(self._command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            self._process = process
            try:
                yield iter(()) if self._over.is_set() or process.stdout is None else iter(process.stdout)
            finally:
                process.kill()

    def _take(self, said: dict[str, Any]) -> None:
        self._heard = time.monotonic()
        self._unread = said["message"] if said["event"] == "problem" else ""
        if said["event"] == "object":
            try:
                keys.take(self._file, self._lock, keys.read(said["text"]))
                self._content = ""
            except ValueError as error:
                self._content = f"{self.uri} {error}"
        self._looked.set()
