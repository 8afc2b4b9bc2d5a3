"""Ports and endpoints on this machine."""

from __future__ import annotations

import socket
from collections.abc import Collection

from mistral_contract import ports

from mistralctl.errors import Exit, UserError

FIRST_PORT = 8000
PORTS = 200


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now, and no launcher on this machine is about to."""
    if ports.is_held(port):
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


_chosen: dict[int, socket.socket | None] = {}


def _choose(port: int) -> bool:
    """Keep others from choosing a port while this process lives; whether no other process has chosen it."""
    if port not in _chosen:
        try:
            _chosen[port] = ports.hold(port, ports.CHOSEN)
        except OSError:
            return False
    return True


def choose_port(asked: int | None, remembered: int | None, reserved: Collection[int], *, place: str, ours: bool) -> int:
    """The port of a name: the one asked for, else the one it had before, else the first that nobody has.

    `reserved` are the ports of other deployments; `ours` says that the remembered port is held by the deployment that
    is about to be replaced. UserError if the port is taken.
    """
    port = asked or remembered
    if port is None:
        for port in range(FIRST_PORT, FIRST_PORT + PORTS):
            if port not in reserved and is_free(port) and _choose(port):
                return port
        raise UserError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free; give one with --port", Exit.CONFLICT)
    if port in reserved:
        raise UserError(f"{place}: port {port} belongs to another deployment; give another one", Exit.CONFLICT)
    if not is_free(port) and not (ours and port == remembered):
        raise UserError(
            f"{place}: port {port} is taken by another program; stop that program or give another --port", Exit.CONFLICT
        )
    if not _choose(port):
        raise UserError(
            f"{place}: port {port} is what another mistralctl up has chosen just now; give another one", Exit.CONFLICT
        )
    return port
