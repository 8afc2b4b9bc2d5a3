"""Bytes on a wire, as no HTTP library would send them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

from nodes import KEY


def raw(url: str, pieces: Iterable[bytes], *, pause: float = 0, wait: float = 300) -> int | str:
    """The status of what a server says to these bytes; `closed` if it hangs up without a word, `silent` if it says nothing."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), wait) as wire:
        try:
            for piece in pieces:
                wire.sendall(piece)
                time.sleep(pause)
        except OSError:  # it hung up; perhaps it said why
            pass
        try:
            said = wire.recv(65536)
        except TimeoutError:
            return "silent"
        except OSError:
            return "closed"
    return int(said.split()[1]) if said.startswith(b"HTTP/1.1 ") else "closed" if not said else "not HTTP"


def request(method: str, path: str, *headers: bytes, body: bytes = b"", key: str = KEY) -> bytes:
    """A request with a key, written as it is."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", f"Authorization: Bearer {key}".encode(), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
