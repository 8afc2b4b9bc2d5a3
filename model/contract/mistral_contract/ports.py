"""Who is about to listen on a port of a machine: a launcher holds it by a name while it lives, long before its server listens."""

from __future__ import annotations

import socket
import sys

# Linux's abstract sockets are of a network namespace, as ports are, whichever user or folder a deployment has, and end with their process.
_HOLDER, CHOSEN = "\0mistralctl-port-{}", "\0mistralctl-chosen-{}"


def hold(port: int, name: str = _HOLDER) -> socket.socket | None:
    """Take the name of a port until the socket is closed; None where there are no such names. OSError if another process has it.

    A launcher holds the one, an `up` that has CHOSEN a port and not written it down yet the other.
    """
    if sys.platform != "linux":
        return None
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(name.format(port))
    except OSError:
        holder.close()
        raise
    return holder


def is_held(port: int) -> bool:
    """Whether a launcher holds a port."""
    try:
        holder = hold(port)
    except OSError:
        return True
    if holder is not None:
        holder.close()
    return False
