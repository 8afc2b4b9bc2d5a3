"""Who has taken a connection on this machine: a deployment's own server or tunnel, or a program that came to have its port."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from mistralctl import processes
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record

ACCEPT_SECONDS = 5.0
LOOK_SECONDS = 0.02


class Stranger(UserError):
    """Another program has a deployment's port."""


def _myself(record: Record) -> list[psutil.Process]:
    return [psutil.Process()]


CANDIDATES = (processes.led, _myself, processes.of)  # from the one that is found fastest


def _hexadecimal(address: tuple[str, int]) -> str:
    """An address as /proc/net/tcp has it."""
    return f"{int.from_bytes(socket.inet_aton(address[0]), sys.byteorder):08X}:{address[1]:04X}"


def _inodes(here: tuple[str, int], there: tuple[str, int]) -> tuple[set[str], set[str]]:
    """Linux's numbers of the other end's socket, none as long as no program has taken the connection, and of those that listen there."""
    lines = Path("/proc/net/tcp").read_text("ascii").splitlines()
    taken, listening = f" {_hexadecimal(there)} {_hexadecimal(here)} ", f":{there[1]:04X} 00000000:0000 0A "
    found = [{line.split()[9] for line in lines if mark in line} for mark in (taken, listening)]
    return found[0] - {"0"}, found[1]


def _hold(every: Iterable[psutil.Process], inodes: set[str]) -> bool:
    """Whether one of these processes has one of these sockets."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in every:
        with contextlib.suppress(psutil.Error, OSError):
            for file in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if str(file.readlink()) in wanted and process.is_running():
                        return True
    return False


def _on_linux(record: Record, here: tuple[str, int], there: tuple[str, int]) -> bool | None:
    taken, listening = _inodes(here, there)
    if any(_hold(find(record), taken or listening) for find in CANDIDATES):
        return True if taken else None
    return False


def _elsewhere(record: Record, here: tuple[str, int], there: tuple[str, int]) -> bool | None:
    listens = False
    for find in CANDIDATES:
        for process in find(record):
            with contextlib.suppress(psutil.Error, OSError):
                for one in process.net_connections("tcp4"):
                    if one.laddr and tuple(one.laddr) == there and one.raddr and tuple(one.raddr) == here:
                        return True
                    listens = listens or (one.status == psutil.CONN_LISTEN and bool(one.laddr) and one.laddr[1] == there[1])
    return None if listens else False


def require_own(connection: socket.socket, record: Record) -> None:
    """Return once a process of the deployment has taken this very connection, so that a key may be sent over it.

    Stranger if another program has taken it or listens there, UserError if nobody takes it.
    """
    here, there = connection.getsockname()[:2], connection.getpeername()[:2]
    deadline = time.monotonic() + ACCEPT_SECONDS
    look = _on_linux if sys.platform == "linux" else _elsewhere
    while not (own := look(record, here, there)):
        if own is False:
            raise Stranger(
                f"{record.name}: {_holder(there[1])} answers at 127.0.0.1:{there[1]}, and not its own server; nothing was sent to it; "
                f"mistralctl status {record.name} says what became of the server",
                Exit.CONFLICT,
            )
        if time.monotonic() > deadline:  # the kernel connects before a program takes the connection
            silent = f"{record.name}: its server does not take connections at 127.0.0.1:{there[1]}; nothing was sent"
            raise UserError(silent, Exit.SERVER)
        time.sleep(LOOK_SECONDS)


def _holder(port: int) -> str:
    """Who listens at a port, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                process = psutil.Process(one.pid)
                return f"another program (process {one.pid}, {process.name()}, of {process.username()})"
    return "another program, perhaps of another user,"


def check(record: Record) -> None:
    """Raise what `require_own` does where something answers in a deployment's place; where nobody does there is nothing to find."""
    if record.public:  # its certificate says who it is
        return
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", record.port), timeout=ACCEPT_SECONDS) as connection:
        require_own(connection, record)
