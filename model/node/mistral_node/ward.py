"""vLLM's keeper: `python ward.py` starts the one command that standard input names, and ends it when told, or when that input ends.

On a node vLLM belongs to a user of its own, whom the launcher may not signal; this process belongs to that user too. It hears of
the launcher's end, whatever its cause, because the kernel closes the pipe. The first line is a JSON object: `command`,
`environment` and `files` (written with mode 0600). Then come the words `end` (it may drain) and `kill`.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ORPHAN_SECONDS = 30.0  # what vLLM has to end by itself when the launcher is gone


def _die_with_the_ward() -> None:
    """In vLLM's process before it begins: Linux sends it SIGTERM should this process be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _inherit() -> None:
    """Linux gives this process the children that vLLM leaves behind when it is killed, so that they can be ended, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:  # each knows when it was started, so that a number used again is not hit
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def remind(environment: Mapping[str, str]) -> None:
    """Gives vLLM what it found out about our model class when its environment was made (model/node/byte_code.sh); it looks again where
    that is of another version of the class."""
    caches = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache"
    folder = Path(environment.get("VLLM_CACHE_ROOT") or Path(caches) / "vllm") / "modelinfos"
    with suppress(OSError):
        for file in (Path(sys.prefix) / "vllm-cache" / "modelinfos").glob("*.json"):
            if not (folder / file.name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / file.name)


class Ward:
    """The command of an order, running."""

    def __init__(self, order: dict[str, Any]) -> None:
        for name, text in order["files"].items():
            Path(name).unlink(missing_ok=True)
            with os.fdopen(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(text)
        remind(order["environment"])
        self.process = subprocess.Popen(
            order["command"], env=order["environment"], stdin=subprocess.DEVNULL, preexec_fn=_die_with_the_ward
        )
        self.seen: list[psutil.Process] = []

    def end(self) -> None:
        """Asks it to end."""
        self.seen = _tree(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and all that it started, now."""
        self.seen += _tree(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
        _kill(self.seen)

    def obey(self) -> None:
        """Does what the launcher says until it says no more."""
        for word in sys.stdin:
            {"end": self.end, "kill": self.kill}[word.strip()]()
        self.end()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(ORPHAN_SECONDS)
        self.kill()


def main() -> int:
    """Runs the order; the command's exit code, negative numbers of signals as 128 and more."""
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the launcher, which says here what they mean
        signal.signal(number, lambda number, frame: None)
    _inherit()
    ward = Ward(json.loads(sys.stdin.readline()))
    threading.Thread(target=ward.obey, daemon=True).start()
    code = ward.process.wait()
    _kill([*ward.seen, *_tree(os.getpid())])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread may still read standard input
