"""A proxy that stands in front of a store and does it wrong, in one chosen way, a chosen number of times.

A number is the status of an answer; "cut", "slow" and "drip" stop in the middle of a body, "short" announces half of it.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from hub import Server

EXPIRED = b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>'
ENOUGH = 10**9


@dataclass
class Proxy:
    """`fault` is done to the next `left` answers that carry data (a ranged GET) from below `below`; every answer counts in `done`."""

    target: str
    url: str = ""
    fault: str = ""
    left: int = 0
    after: int = 0
    below: str = "/"
    done: int = 0
    seen: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    delay: float = 0.0

    def plan(self, fault: str, times: int = ENOUGH, after: int = 0, below: str = "/") -> None:
        """From now on: `after` good answers from below a path, then `times` bad ones."""
        with self.lock:
            self.fault, self.left, self.after, self.below, self.done = fault, times, after, below, 0

    def take(self, path: str) -> str:
        """The fault for this answer; empty for none."""
        with self.lock:
            if not self.fault or self.left <= 0 or not path.startswith(self.below):
                return ""
            if self.after > 0:
                self.after -= 1
                return ""
            self.left -= 1
            self.done += 1
            return self.fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _any(self) -> None:
        ranged = self.command == "GET" and "range" in {name.lower() for name in self.headers}
        ranged = ranged or "x-ms-range" in {name.lower() for name in self.headers}
        fault = self.proxy.take(self.path) if ranged else ""
        if ranged and self.proxy.delay:
            time.sleep(self.proxy.delay)
        if fault == "refused":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = self._chunks()
        if fault.isdigit():
            headers = {"Retry-After": "0"} if fault in ("429", "503") else {}
            self._send(int(fault), headers, b"")
            return
        if fault == "expired":
            self._send(403, {"Content-Type": "application/xml"}, EXPIRED)
            return
        status, headers, data = self._forward(body, whole=fault == "200-for-206")
        self._spoilt(fault, status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815 (names that http.server asks for)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes, whole: bool) -> tuple[int, dict[str, str], bytes]:
        target = urlsplit(self.proxy.target)
        upstream = http.client.HTTPConnection(target.hostname or "", target.port or 80, timeout=300)
        hop = {"connection", "transfer-encoding", "content-length", "keep-alive", "expect"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
        if whole:
            headers = {name: value for name, value in headers.items() if name.lower() not in ("range", "x-ms-range")}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in hop}
        if self.command == "HEAD" and answer.getheader("Content-Length"):
            kept["Content-Length"] = str(answer.getheader("Content-Length"))
        upstream.close()
        return answer.status, kept, data

    def _spoilt(self, fault: str, status: int, headers: dict[str, str], data: bytes) -> None:
        if fault == "flipped-bit":
            at = len(data) // 3
            data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        if fault == "changed-etag":
            headers = {name: value for name, value in headers.items() if name.lower() not in ("etag", "x-goog-generation")}
            headers.update({"ETag": '"0123456789abcdef"', "x-goog-generation": "1"})
        if fault == "wrong-range":
            headers = {name: value for name, value in headers.items() if name.lower() != "content-range"}
            headers["Content-Range"] = f"bytes 1-{len(data)}/999999999"
        if fault == "short":
            self._send(status, headers, data[: len(data) // 2])
        elif fault in ("cut", "slow", "drip"):
            self._send(status, headers, data[: len(data) // 2], announced=len(data))
            if fault == "slow":
                time.sleep(1.5)
            for _ in range(12 if fault == "drip" else 0):
                self.wfile.write(b"\0")
                time.sleep(0.1)
            self.close_connection = True
        else:
            self._send(status, headers, data)

    def _send(self, status: int, headers: dict[str, str], data: bytes, announced: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data) if announced is None else announced))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """A running proxy in front of the server `target`."""
    made = Proxy(target)
    server = Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": made}))
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
