"""A job's log as its machine writes it, over SSH. SkyPilot's own way asks the machine for much else before the first line, which takes
a small one's processor for seconds; it is the way out where a version of it keeps the log elsewhere."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mistralctl import state
from mistralctl.errors import Exit, UserError
from mistralctl.runtime import sky, ssh

PAUSE_SECONDS = 1.0
ASK_SECONDS = 60.0  # between questions whether the job still runs, which take SkyPilot 3 s; the log mostly says it first
NO_LOG = 3
MOST = 16_384  # characters of what ssh says of itself
# SkyPilot 0.14 names the folder of a job's log by its number and name.
TAIL = f"""
for n in $(seq 50); do
  set -- ~/sky_logs/{{job}}-*/run.log
  [ -e "$1" ] && exec tail -n +{{first}} -F "$1" 2> /dev/null
  sleep 0.2
done
exit {NO_LOG}
"""


class Following:
    """Passes the lines of a job's log on, in the background, from the first one on; `close` ends that."""

    def __init__(self, name: str, cluster: str, job: int, log: Path, on_line: Callable[[str], None]) -> None:
        self._name, self._cluster, self._job, self._log = name, cluster, job, log
        self._lines = sky.Lines(log, on_line)
        self._process: subprocess.Popen[str] | None = None
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Ends it."""
        self._closed.set()
        if self._process is not None:
            self._process.terminate()

    def _read(self) -> None:
        try:
            first = 1
            while not self._closed.is_set():
                tail = [*ssh.command(self._name), ssh.HOST, TAIL.format(job=self._job, first=first)]
                with tempfile.TemporaryFile("w+", errors="replace") as words, subprocess.Popen(
                    tail, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, text=True, errors="replace",
                    env=state.without_secrets(os.environ),
                ) as self._process:  # fmt: skip
                    if self._closed.is_set():
                        self._process.terminate()
                    for line in self._process.stdout or ():
                        if line.endswith("\n"):  # the rest of one that was cut off comes as a whole the next time
                            self._lines.write(line)
                            first += 1
                    self._process.wait()
                    words.seek(0)
                    refused = ssh.REFUSED in words.read(MOST)
                if refused and self._process.returncode == ssh.UNREACHED:
                    raise ssh.HostKeyChanged(self._name)
                if self._process.returncode == NO_LOG:
                    sky.tail(self._cluster, self._job, self._lines)
                    return
                self._closed.wait(PAUSE_SECONDS)
        except Exception as error:  # noqa: BLE001 - `wait` raises it
            self._failure = error

    def wait(self, seconds: float, until: Callable[[], bool], failed: Callable[[], bool]) -> bool:
        """Waits until `until` says so (True), or `failed` does or the job has ended (False); UserError after so many seconds."""
        deadline, ask_at = time.monotonic() + seconds, time.monotonic() + ASK_SECONDS
        while not until():
            if failed() or not self._reader.is_alive():
                if self._failure is not None:
                    raise self._failure
                return until()
            if time.monotonic() > deadline:
                raise UserError(f"not ready after {seconds / 60:.0f} minutes; see the log {self._log}", Exit.SERVER)
            if time.monotonic() > ask_at:
                if self._job not in (sky.running_jobs(self._cluster) or ()):
                    time.sleep(PAUSE_SECONDS)  # for its last lines
                    return until()
                ask_at = time.monotonic() + ASK_SECONDS
            time.sleep(0.1)
        return True
