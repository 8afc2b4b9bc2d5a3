"""The launcher as a client of its own server: on this machine, with a key that it makes itself and that only counts before the server is open."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from mistral_node.guard import PROBE_HEADER

SECONDS = 30.0


@dataclass(frozen=True)
class Client:
    """`context` is what to trust where the server speaks TLS."""

    url: str
    key: str = field(repr=False)
    context: ssl.SSLContext | None = None

    @property
    def probe(self) -> dict[str, str]:
        """The header that a closed guard lets in."""
        return {PROBE_HEADER.decode(): self.key}

    def connect(self) -> http.client.HTTPConnection:
        """A connection for many requests, which show what their caller wants to show."""
        host, _, port = urllib.parse.urlsplit(self.url).netloc.partition(":")
        if self.context is not None:
            return http.client.HTTPSConnection(host, int(port), timeout=SECONDS, context=self.context)
        return http.client.HTTPConnection(host, int(port), timeout=SECONDS)

    def ask(self, path: str, body: dict[str, Any] | None = None, *, seconds: float) -> bytes:
        """The body of an answer; urllib's exceptions otherwise."""
        headers = {"Authorization": f"Bearer {self.key}"} | self.probe
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - this machine
            self.url + path, data, headers | {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds, context=self.context) as answer:  # noqa: S310
            return bytes(answer.read())
