"""The launcher as a client of its own server: on this machine, with a key that it makes itself, which opens a closed guard, too."""

from __future__ import annotations

import json
import ssl
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from mistral_node.guard import PROBE_HEADER


@dataclass(frozen=True)
class Client:
    """`context` is what to trust where the server speaks TLS."""

    url: str
    key: str = field(repr=False)
    context: ssl.SSLContext | None = None

    def ask(self, path: str, body: dict[str, Any] | None = None, *, seconds: float) -> bytes:
        """The body of an answer; urllib's exceptions otherwise."""
        headers = {"Authorization": f"Bearer {self.key}", PROBE_HEADER.decode(): self.key}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - this machine
            self.url + path, data, headers | {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds, context=self.context) as answer:  # noqa: S310
            return bytes(answer.read())
