"""The fast way to read a range: a plain HTTP(S) GET whose body goes from the socket straight into the buffer.

One connection for each worker, kept alive. The system fills the buffer (MSG_WAITALL), so that Python wakes about once
for each MiB, and hashes it before the next one pushes it out of the processor's cache. Where a store gives no link, a
proxy is set, or a server answers in a way that this reader does not know, the plain reader does the work.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from . import digests
from .errors import Kind, WeightsError
from .patience import Patience
from .reader import PlainReader
from .status import LET_IT_BE, meaning
from .stores import Link, Store, StoredFile
from .transfer import Reader

PIECE = 2**20
LONGEST_HEAD = 64 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:\d{1,19}|\*)")


class Links:
    """The links of a set's files, shared by all workers; a refused one is made anew."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str], Link | None] = {}

    def get(self, file: StoredFile) -> Link | None:
        with self._lock:
            key = (file.name, file.version)
            if key not in self._links:
                self._links[key] = self._store.link(file)
            return self._links[key]

    def drop(self, file: StoredFile, link: Link) -> None:
        with self._lock:
            if self._links.get((file.name, file.version)) is link:
                del self._links[(file.name, file.version)]

    def use_plain(self, file: StoredFile) -> None:
        """No more of the fast way for this file."""
        with self._lock:
            self._links[(file.name, file.version)] = None


class _UnknownAnswerError(Exception):
    """The server answers in a way that this reader does not know."""


class _StalledError(Exception):
    """The peer sends next to nothing."""


@dataclass(frozen=True)
class _Answer:
    """Status, headers with small names, and what of the body came with them."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpReader:
    """Fills buffers by GET; belongs to one worker, only `close` may come from another thread."""

    def __init__(self, store: Store, links: Links, patience: Patience) -> None:
        self._plain = PlainReader(store)
        self._links = links
        self._patience = patience
        self._right = store.right
        self._socket: socket.socket | None = None
        self._peer: tuple[str, str] = ("", "")
        self._closed = False

    def read_into(self, file: StoredFile, start: int, buffer: memoryview) -> str:
        link = self._links.get(file)
        if link is None or _proxied(link.url):
            return self._plain.read_into(file, start, buffer)
        kept = self._socket is not None
        try:
            return self._get(file, link, start, buffer)
        except WeightsError as error:
            self._hang_up()
            if error.kind in (Kind.DENIED, Kind.NOT_FOUND):
                self._links.drop(file, link)  # its signature or token may have expired
            raise
        except _UnknownAnswerError:
            self._hang_up()
            self._links.use_plain(file)
            return self._plain.read_into(file, start, buffer)
        except ssl.SSLCertVerificationError as error:
            self._hang_up()
            raise WeightsError(
                Kind.REFUSED,
                f"the certificate of {urlsplit(link.url).hostname} is not trusted ({error.verify_message}); "
                "name its authority in SSL_CERT_FILE, or check that this is the right server",
            ) from error
        except (_StalledError, BlockingIOError, TimeoutError):
            self._hang_up()
            raise _unreachable(file, f"the server sent next to nothing for {self._patience.stall:g} s") from None
        except OSError as error:
            self._hang_up()
            if kept and isinstance(error, ConnectionError) and not self._closed:
                return self.read_into(file, start, buffer)  # the server had closed a connection that was idle
            raise _unreachable(file, f"the connection failed ({error.strerror or type(error).__name__})") from None

    def close(self) -> None:
        self._closed = True
        self._hang_up()

    def _hang_up(self) -> None:
        held, self._socket = self._socket, None
        if held is not None:
            with suppress(OSError):  # it may be gone already
                held.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
            held.close()

    def _get(self, file: StoredFile, link: Link, start: int, buffer: memoryview) -> str:
        url = urlsplit(link.url)
        held = self._connect(url.scheme, url.netloc)
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        last = start + len(buffer) - 1
        lines = [f"GET {path} HTTP/1.1", f"Host: {url.netloc.rpartition('@')[2]}", f"Range: bytes={start}-{last}"]
        lines += ["Accept-Encoding: identity", "User-Agent: mistral-weights"]
        lines += [f"{name}: {value}" for name, value in link.headers.items()]
        held.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        answer = self._head(held, file)
        self._check(file, link, answer, range(start, last + 1))
        if len(answer.body) > len(buffer):
            raise _unreachable(file, "the server sent more than was asked for")
        buffer[: len(answer.body)] = answer.body
        blake3 = self._fill(held, buffer, len(answer.body), file)
        if answer.headers.get("connection", "").lower() == "close":
            self._hang_up()
        return blake3

    def _connect(self, scheme: str, peer: str) -> socket.socket:
        if self._socket is not None and self._peer == (scheme, peer):
            return self._socket
        self._hang_up()
        if self._closed:
            raise ConnectionAbortedError
        parts = urlsplit(f"{scheme}://{peer}")
        host, port = parts.hostname or "", parts.port or (443 if scheme == "https" else 80)
        held = socket.create_connection((host, port), self._patience.connect)
        held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if scheme == "https":
            held = _tls().wrap_socket(held, server_hostname=host)
            held.settimeout(self._patience.stall)
        else:
            whole, part = divmod(self._patience.stall, 1)
            times = struct.pack("ll", int(whole), int(part * 1e6))
            held.settimeout(None)  # blocking, so that MSG_WAITALL works; the system keeps the time
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, times)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, times)
        self._socket, self._peer = held, (scheme, peer)
        return held

    def _head(self, held: socket.socket, file: StoredFile) -> _Answer:
        data = b""
        end = time.monotonic() + self._patience.stall
        while (at := data.find(b"\r\n\r\n")) < 0:
            if time.monotonic() > end:
                raise _StalledError
            piece = held.recv(LONGEST_HEAD)
            if not piece:
                raise ConnectionResetError(None, "closed")
            data += piece
            if len(data) > LONGEST_HEAD + PIECE:
                raise _UnknownAnswerError
        first, *lines = data[:at].decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] (\d{3})(?: .*)?", first)
        if match is None:
            raise _UnknownAnswerError
        pairs = (line.partition(":") for line in lines)
        return _Answer(int(match.group(1)), {name.lower(): value.strip() for name, _, value in pairs}, data[at + 4 :])

    def _check(self, file: StoredFile, link: Link, answer: _Answer, asked: range) -> None:
        """An error unless the answer holds exactly the bytes that were asked for, of the version that was asked for."""
        status, headers = answer.status, answer.headers
        if status not in (200, 206):
            if 300 <= status < 400:
                self._links.drop(file, link)
                raise _UnknownAnswerError
            raise meaning(status, file.name, self._right, headers.get("retry-after"))
        if headers.get("transfer-encoding") or headers.get("content-encoding", "identity") != "identity":
            raise _UnknownAnswerError
        for name, expected in link.expect.items():
            if headers.get(name, expected) != expected:
                raise WeightsError(Kind.CHANGED, f"{file.name} changed in the store while it was read; {LET_IT_BE}")
        if status == 200 and asked != range(file.size):
            raise _unreachable(file, "the server sent the whole file and not the range that was asked for")
        if status == 206:
            match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if match is None or range(int(match.group(1)), int(match.group(2)) + 1) != asked:
                raise _unreachable(file, "the server sent another range than was asked for")
        if headers.get("content-length") != str(len(asked)):
            raise _unreachable(file, "the server announced another length than was asked for")

    def _fill(self, held: socket.socket, buffer: memoryview, filled: int, file: StoredFile) -> str:
        """Fills what is left of `buffer` after the first `filled` bytes; the blake3 of all of it."""
        flags = 0 if isinstance(held, ssl.SSLSocket) else socket.MSG_WAITALL
        digest, hashed = digests.start("blake3", len(buffer)), 0
        since, counted = time.monotonic(), 0
        while filled < len(buffer):
            got = held.recv_into(buffer[filled : hashed + PIECE], 0, flags)
            if not got:
                raise _unreachable(file, "the server closed the connection in the middle")
            filled += got
            counted += got
            if filled == hashed + PIECE:
                digest.update(buffer[hashed:filled])
                hashed = filled
            now = time.monotonic()
            if now - since >= self._patience.stall:
                if counted < self._patience.least_bytes and filled < len(buffer):
                    raise _StalledError
                since, counted = now, 0
        digest.update(buffer[hashed:])
        return digest.hexdigest()


def readers(store: Store, patience: Patience, plain: bool) -> Callable[[], Reader]:
    """What makes the reader of each worker: the fast one, or only the plain one."""
    if plain:
        return lambda: PlainReader(store)
    links = Links(store)
    return lambda: HttpReader(store, links, patience)


def _unreachable(file: StoredFile, why: str) -> WeightsError:
    return WeightsError(Kind.UNREACHABLE, f"{file.name}: {why}; check the network and try again")


def _proxied(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


def _tls() -> ssl.SSLContext:
    named = (os.environ.get(name) for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"))
    context = ssl.create_default_context(cafile=next((path for path in named if path), None))
    context.set_alpn_protocols(["http/1.1"])
    return context
