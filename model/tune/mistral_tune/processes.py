"""A process for each device: started together, ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

KILL_SECONDS = 60.0


def run(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m mistral_tune worker ...` once for each device; the first exit code that is not 0. SIGTERM goes to all of them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rendezvous = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for rank in range(count):
        environ = os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen([sys.executable, "-m", "mistral_tune", "worker", *arguments], env=environ))
    return _together(started)


def _together(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, the others are ended."""
    failed, since = 0, 0.0
    while any(process.poll() is None for process in started):
        codes = [process.returncode for process in started if process.returncode]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > KILL_SECONDS:
            for process in started:
                process.kill()
        time.sleep(0.2)
    return failed or next((process.returncode for process in started if process.returncode), 0)
