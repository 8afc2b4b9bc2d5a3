"""What SkyPilot's local API server leaves behind when it is killed: processes that hold its ports, so that no other one can start.

`sky api stop` does not find them, because it looks for the server itself.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil

MARK = "IS_SKYPILOT_SERVER"  # SkyPilot sets it for its server, and the server's processes have it from there
LOG = Path("~/.sky/api_server/server.log")


def orphans() -> list[psutil.Process]:
    """This user's processes in a session that an API server of this home folder began and did not outlive."""
    sessions: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            session = os.getsid(process.pid)
            if session and process.uids().real == os.getuid() and not psutil.pid_exists(session):
                sessions.setdefault(session, []).append(process)
        except (psutil.Error, OSError):
            continue
    return [process for members in sessions.values() if any(map(_is_marked, members)) for process in members]


def _is_marked(process: psutil.Process) -> bool:
    try:
        environ = process.environ()
        return MARK in environ and environ.get("HOME") == os.environ.get("HOME")
    except (psutil.Error, OSError):
        return False


def clear_the_way(url: str) -> None:
    """Ends what a killed server left, if none answers at `url`."""
    address = urlsplit(url)
    try:
        socket.create_connection((address.hostname or "127.0.0.1", address.port or 80), timeout=5).close()
        return
    except OSError:
        pass
    left = orphans()
    for process in left:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(left, timeout=5)


def last_words() -> str:
    """The line of the server's log that says why it ended; empty if there is none."""
    try:
        lines = LOG.expanduser().read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
