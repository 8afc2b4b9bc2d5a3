"""What stands between the network and vLLM: the guard, and below it an HTTP server that does not let itself be filled or held.

uvicorn's parser keeps headers of any number and size, and waits for them forever. Importing this module puts a bounded one in its
place, for the server that is made afterwards: give vLLM `--middleware mistral_node.front.Guard`, and it gets both.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.config
from mistral_node.guard import Guard
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedProtocol", "Guard"]

HEAD_SECONDS = 20.0
# Bytes of a request that are not its body: headers, trailers, the lengths of chunks (at most 8 bytes for each byte of the body).
LARGEST_HEAD, FRAMING = 128 << 10, 8


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is closed when a request's head is too large, or does not come in HEAD_SECONDS."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wire = self._body = 0
        self._timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._wire += len(data)
        super().data_received(data)
        if self._wire > LARGEST_HEAD + (1 + FRAMING) * self._body + len(
            data
        ):  # this piece may hold what comes after a small request
            self.transport.close()

    def on_message_begin(self) -> None:
        self._wire = self._body = 0
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def _expect_head(self) -> None:
        self._head_came()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _head_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_protocols: Any = uvicorn.config.HTTP_PROTOCOLS
_protocols["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
