"""The back door of a simulated cloud: a socket in its folder, one JSON object in, one out. The test calls, the cloud answers.

A socket with a path is reached from any namespace of networks; it is opened through a handle of its folder, because such a
path may have 107 characters at most and pytest's folders have more.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAME = "control"


def listen(folder: Path, operations: Mapping[str, Callable[..., Any]]) -> None:
    """Answers calls in a thread from now on."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                asked = json.loads(self.rfile.readline())
                answer = {"result": operations[asked.pop("do")](**asked)}
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller shall see it
                answer = {"error": f"{error!r}\n{traceback.format_exc()}"}
            self.wfile.write(json.dumps(answer, default=str).encode() + b"\n")

    handle = os.open(folder, os.O_RDONLY)
    (folder / NAME).unlink(missing_ok=True)
    server = socketserver.ThreadingUnixStreamServer(f"/proc/self/fd/{handle}/{NAME}", Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def call(folder: Path, do: str, **arguments: Any) -> Any:
    """Calls an operation and returns its result."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(f"/proc/self/fd/{handle}/{NAME}")
            connection.sendall(json.dumps({"do": do} | arguments).encode() + b"\n")
            with connection.makefile() as answers:
                answer = json.loads(answers.readline())
    finally:
        os.close(handle)
    if "error" in answer:
        raise RuntimeError(f"{do}: {answer['error']}")
    return answer["result"]
