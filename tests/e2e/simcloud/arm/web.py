"""The doors of the cloud: its hosts behind one certificate, and the metadata service of its machines."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from simcloud.arm.errors import Refused

PIECE = 1 << 18


class Asked(NamedTuple):
    """A request: `host` and `path` are decoded, `who` is the address that it comes from."""

    method: str
    host: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    who: str

    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body)) if self.body else {}


class Answer(NamedTuple):
    """What goes back: a document, bytes, or nothing."""

    status: int
    document: Any = None
    headers: Mapping[str, str] = MappingProxyType({})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def handler(answer: Callable[[Asked], Answer | http.client.HTTPResponse]) -> type[BaseHTTPRequestHandler]:
    """What answers requests by calling `answer`; Refused becomes Azure's JSON."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            asked = Asked(
                self.command, self.headers.get("Host", "").partition(":")[0], unquote(parts.path), dict(parse_qsl(parts.query, True)),
                self.headers, self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.client_address[0],
            )  # fmt: skip
            try:
                given = answer(asked)
            except Refused as refused:
                given = Answer(refused.status, refused.document(), {"Retry-After": "1"} if refused.status == 429 else {})
            except Exception as error:  # noqa: BLE001 - a bug of this simulation shall be seen by the test
                sys.stderr.write(traceback.format_exc())
                given = Answer(500, {"error": {"code": "InternalServerError", "message": repr(error)}})
            if isinstance(given, Answer):
                self.send(given)
            else:
                self.pass_on(given)

        def send(self, given: Answer) -> None:
            body = given.document if isinstance(given.document, bytes) else b""
            self.send_response(given.status)
            for name, value in given.headers.items():
                self.send_header(name, value)
            if not isinstance(given.document, bytes | None):
                body = json.dumps(given.document).encode()
                self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("x-ms-request-id", str(uuid.uuid4()))
            if given.status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if given.status != 204 and self.command != "HEAD":
                self.wfile.write(body)

        def pass_on(self, given: http.client.HTTPResponse) -> None:
            """The answer of the server behind, as it comes."""
            length = given.getheader("Content-Length")
            whole = b"" if length is not None or self.command == "HEAD" else given.read()
            self.send_response(given.status)
            for name, value in given.getheaders():
                if name.lower() not in ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length if length is not None else str(len(whole)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(whole)
                while piece := given.read(PIECE):
                    self.wfile.write(piece)
            given.close()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    for method in ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_any)
    return Handler


def server(address: str, port: int, answer: Callable[[Asked], Any], certificate: Path | None = None) -> Server:
    """A server, not yet serving; with a certificate it speaks TLS."""
    made = Server((address, port), handler(answer))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        made.socket = context.wrap_socket(made.socket, server_side=True, do_handshake_on_connect=False)
    return made
