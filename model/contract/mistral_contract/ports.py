"""Who is about to listen on a port of a machine: a launcher holds it by a name while it lives, long before its server listens."""

from __future__ import annotations

import socket
import sys

# Linux's abstract sockets are of a network namespace, as ports are, whichever user or folder a deployment has, and end with their process.
_HOLDER = "\0mistralctl-port-{}"


def hold(port: int) -> socket.socket | None:
    """Take the name of a port until the socket is closed; None where there are no such names. OSError if another process has it."""
    if sys.platform != "linux":
        return None
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(_HOLDER.format(port))
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
