"""Who has taken a connection on this machine: a deployment's own server or tunnel, or a program that came to have its port."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from typing import Any

import psutil

from mistralctl import processes
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record

ACCEPT_SECONDS = 5.0
LOOK_SECONDS = 0.02


class Stranger(UserError):
    """Another program has a deployment's port."""


def _sockets(every: Iterable[psutil.Process]) -> list[Any]:
    found: list[Any] = []
    for process in every:
        with contextlib.suppress(psutil.Error, OSError):
            if process.is_running():
                found += process.net_connections("tcp")
    return found


def _myself(record: Record) -> list[psutil.Process]:
    return [psutil.Process()]


def require_own(connection: socket.socket, record: Record) -> None:
    """Stranger unless this very connection was taken by a process of the deployment, so that a key may be sent over it."""
    here, there = connection.getsockname()[:2], connection.getpeername()[:2]
    deadline = time.monotonic() + ACCEPT_SECONDS
    while True:
        listens = False
        for find in (processes.led, _myself, processes.of):
            for one in _sockets(find(record)):
                if tuple(one.laddr) == there and one.raddr and tuple(one.raddr) == here:
                    return
                listens = listens or (one.status == psutil.CONN_LISTEN and one.laddr.port == there[1])
            if listens:
                break
        if not listens:
            raise Stranger(
                f"{record.name}: {_holder(there[1])} answers at 127.0.0.1:{there[1]}, and not its own server; nothing was sent to it; "
                f"mistralctl status {record.name} says what became of the server",
                Exit.CONFLICT,
            )
        if time.monotonic() > deadline:  # the kernel connects before a program takes the connection
            raise Stranger(
                f"{record.name}: its server does not take connections at 127.0.0.1:{there[1]}; nothing was sent", Exit.SERVER
            )
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
    """Stranger if another program answers where a deployment's server should; where nobody answers there is nothing to find."""
    if record.public:  # its certificate says who it is
        return
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", record.port), timeout=ACCEPT_SECONDS) as connection:
        require_own(connection, record)
