"""A process for each device: started together, ended together."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

KILL_SECONDS = 60.0
WORKER = (sys.executable, "-m", "mistral_tune", "worker")
TOGETHER = "MISTRAL_TUNE_TOGETHER"  # what these processes have and no earlier ones had, whose port may have been the same
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def threads(quota: Path = QUOTA) -> int:
    """Return how many threads compute at a time: the cores that this process may use, and no more than its control group is given."""
    cores = len(os.sched_getaffinity(0))
    try:
        most, period = quota.read_text("ascii").split()
        return max(1, min(cores, int(most) // int(period)))
    except (OSError, ValueError):  # no such group, or `max`
        return cores


def bound(environ: MutableMapping[str, str]) -> None:
    """Say how many threads compute, for libraries that are loaded from now on; what the user says stays.

    They wait asleep: one that spins keeps the core for which the others wait (docs/finetune.md).
    """
    environ.setdefault("OMP_NUM_THREADS", str(threads()))
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _free_port() -> int:
    """Return a port of 127.0.0.1 that no server has, and that no connection takes before the first process does: theirs begin at 32768."""
    while True:
        port = 22000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _share(environ: Mapping[str, str], count: int) -> str:
    """Return the threads of each of so many processes."""
    had = environ.get("OMP_NUM_THREADS", "")
    return str(max(1, (int(had) if had.isdecimal() else threads()) // count))


def run(count: int, arguments: Sequence[str], program: Sequence[str] = WORKER) -> int:
    """Run a program once for each device; the first exit code that is not 0. SIGTERM goes to all of them."""
    port = _free_port()
    rendezvous = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rendezvous["OMP_NUM_THREADS"] = _share(os.environ, count)
    rendezvous[TOGETHER] = secrets.token_hex(8)
    started: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for rank in range(count):
        environ = os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = subprocess.Popen([*program, *arguments], env=environ)
        started.append(process)
        for missed in list(asked):  # they came before this one could be told
            process.send_signal(missed)
    return _together(started)


def _together(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, the others are ended."""
    failed, since = 0, 0.0
    while None in [process.poll() for process in started]:  # each is asked
        codes = [process.returncode for process in started if process.returncode]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > KILL_SECONDS:
            for process in started:
                process.kill()
        time.sleep(0.2)
    return failed or next((process.returncode for process in started if process.returncode), 0)
