"""What keeps SkyPilot's local API server from starting: its ports are held.

By processes of a server that was killed, which `sky api stop` does not find, because it looks for the server itself; by a finished
connection of any program, which had one of these ports by chance, for they lie where systems take the ports of outgoing
connections from; by another server.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from mistralctl.endpoint import is_free

MARK = "IS_SKYPILOT_SERVER"  # SkyPilot sets it for its server, and the server's processes have it from there
LOG = Path("~/.sky/api_server/server.log")
PORT_VARIABLE = "SKYPILOT_API_SERVER_LOCAL_PORT"
HELD_SECONDS = 65.0  # Linux holds the port of a finished connection for 60 s (TCP_TIMEWAIT_LEN), macOS for 30
_HELD = re.compile(r"[Pp]ort '?(\d+)'? is (?:not available|already in use)")  # of its own port, of its queue's


def orphans() -> list[psutil.Process]:
    """This user's processes that an API server of this home folder began and did not outlive.

    Each bears the server's mark in its environment, or wrote a title of SkyPilot's over it and is in a session with one that does.
    """
    sessions: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            session = os.getsid(process.pid)
            if session and process.uids().real == os.getuid() and not psutil.pid_exists(session):
                sessions.setdefault(session, []).append(process)
        except (psutil.Error, OSError):
            continue
    found = []
    for members in sessions.values():
        marked = [process for process in members if _is_marked(process)]
        found += marked + [process for process in members if marked and process not in marked and _has_a_title(process)]
    return found


def _is_marked(process: psutil.Process) -> bool:
    try:
        environ = process.environ()
        return MARK in environ and environ.get("HOME") == os.environ.get("HOME")
    except (psutil.Error, OSError):
        return False


def _has_a_title(process: psutil.Process) -> bool:
    try:
        return not any(process.environ()) and process.cmdline()[:1] != [] and process.cmdline()[0].startswith("SkyPilot:")
    except (psutil.Error, OSError):
        return False


def clear_the_way(url: str, ports: Sequence[int]) -> None:
    """If none answers at `url`: ends what a killed server left, and waits until finished connections have given `ports` back."""
    address = urlsplit(url)
    if _answers(address.port or 80, address.hostname or "127.0.0.1"):
        return
    left = orphans()
    for process in left:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(left, timeout=5)
    deadline = time.monotonic() + HELD_SECONDS
    while not all(is_free(port) or _answers(port) for port in ports) and time.monotonic() < deadline:
        time.sleep(0.5)


def _answers(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def why_not() -> str:
    """Why the server did not start, and what to do, by the last line of its log."""
    words = _last_words()
    if not (held := _HELD.search(words)):
        return f"{words[:300] or 'it does not say why'} (log: {LOG})"
    port = int(held[1])
    return f"port {port} is held by {_holder(port)}; end that, or export {PORT_VARIABLE}=46600 or any other free port"


def _holder(port: int) -> str:
    try:
        users = {one.pid for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port and one.pid}
        return " and ".join(f"{psutil.Process(pid).name()} (process {pid})" for pid in sorted(users)) or "another program"
    except psutil.Error:  # macOS shows them to root only
        return "another program"


def _last_words() -> str:
    """The line of the server's log that says why it ended; empty if there is none."""
    try:
        lines = LOG.expanduser().read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
