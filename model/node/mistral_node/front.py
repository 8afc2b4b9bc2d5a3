"""What stands between the network and vLLM: the guard, and below it an HTTP server that does not let itself be filled or held.

uvicorn's protocol keeps headers of any number and size, reads what nobody wants any more, and cancels its one timer with every byte that
comes. Importing this module puts a bounded one in its place, for the server that is made afterwards: give vLLM
`--middleware mistral_node.front.Guard`, and it gets both. It speaks TLS itself, because uvicorn's connections begin only after the handshake.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import importlib
import socket
from contextlib import suppress
from typing import Any

import httptools
import uvicorn.config
from mistral_node.connections import (
    FRAMING,
    HEAD_SECONDS,
    HELD,
    LARGEST_HEAD,
    LARGEST_PATH,
    LET_IN,
    LINGER_BYTES,
    LINGER_SECONDS,
    MOST_PIPELINED,
    STALLED_BYTES,
    STALLED_SECONDS,
    Held,
)
from mistral_node.guard import Guard, error_body
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

__all__ = ["BoundedProtocol", "Guard"]

KERNEL_BYTES = 64 << 10  # of an answer on its way; on a line of 100 ms that is 1 MB/s
FLUSH_SECONDS = 0.05  # how often a connection that is to be closed is asked whether its answer is on its way


class _Refused(Exception):
    """Ends the parser in the middle of a request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class _Transport:
    """A transport as uvicorn uses it, whose `close` is the protocol's."""

    def __init__(self, transport: asyncio.Transport, protocol: BoundedProtocol) -> None:
        self._transport, self._protocol = transport, protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol.closing or self._transport.is_closing()


def _tls_protocol(loop: asyncio.AbstractEventLoop) -> Any:
    """The loop's own class for a connection with TLS."""
    if type(loop).__module__.startswith("uvloop"):
        return importlib.import_module("uvloop.loop").SSLProtocol
    return asyncio.sslproto.SSLProtocol


class BoundedProtocol(HttpToolsProtocol):
    """A connection that has a timer whenever it does not serve a request, and is closed after a request that was refused.

    `_timer` ends what it waits for: the head of a request, the next request, a client that reads, the end of a connection.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._made = args, kwargs
        self.loop: asyncio.AbstractEventLoop = kwargs.get("_loop") or asyncio.get_running_loop()
        self.app_state: dict[str, Any] = kwargs["app_state"]
        self.closing = self._ending = self._begun = False
        if HELD not in self.app_state:  # a guard puts it there
            self.app_state[HELD] = Held()
        self._held: Held = self.app_state[HELD]
        self._raw: asyncio.Transport | None = None
        self._inner: asyncio.Transport | None = None
        self._active: RequestResponseCycle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = self._in_message = False
        self._wire = self._body = self._path = self._late = 0

    # A connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self._raw is None:
            self._raw = transport
            peer, wire = transport.get_extra_info("peername"), transport.get_extra_info("socket")
            if wire is not None and wire.family in (socket.AF_INET, socket.AF_INET6):
                # Else the kernel keeps 4 MB of an answer that nobody reads, which is a whole stream.
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
            self._wait(HEAD_SECONDS, "too slow a request")
            self._held.add(self, peer[0] if isinstance(peer, tuple) else None)
            if self.closing:
                return
            if self._held.context is not None:
                self._shake_hands(transport)
                return
        self._inner = transport

    def _begin(self) -> None:
        """Becomes uvicorn's protocol at the first byte: a connection that says nothing costs half as much without."""
        self._begun = True
        args, kwargs = self._made
        super().__init__(*args, **kwargs)
        self.ws_protocol_class = None
        super().connection_made(_Transport(self._inner, self))  # type: ignore[arg-type]

    def _shake_hands(self, transport: asyncio.Transport) -> None:
        """Begins TLS; `connection_made` is called again when it is agreed upon."""
        shaken: asyncio.Future[None] = self.loop.create_future()
        shaken.add_done_callback(self._shook_hands)
        tls = _tls_protocol(self.loop)(
            self.loop, self, self._held.context, shaken, server_side=True,
            ssl_handshake_timeout=HEAD_SECONDS, ssl_shutdown_timeout=LINGER_SECONDS,
        )  # fmt: skip
        transport.set_protocol(tls)
        tls.connection_made(transport)

    def _shook_hands(self, shaken: asyncio.Future[None]) -> None:
        failed = not shaken.cancelled() and shaken.exception() is not None  # asked for, or the loop logs that nobody did
        if (failed or self._inner is None) and not self.closing:
            self.drop("no TLS")

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        if self._active is not None and not self._active.response_complete:
            self._disconnect(self._active)
        if self._begun:
            super().connection_lost(exc)

    def _forget(self) -> None:
        self.closing = self._ending = True
        self._stop_waiting()
        self._held.remove(self)

    def drop(self, why: str) -> None:
        """Ends the connection now."""
        self._held.refused[why] += 1
        self._abort()

    def _abort(self) -> None:
        self._forget()
        if self._raw is not None:
            self._raw.abort()

    # Timers

    def _wait(self, seconds: float, why: str) -> None:
        """Ends the connection in so many seconds, unless it waits for something else by then."""
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, self._waited, why)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited(self, why: str) -> None:
        if why:
            self._held.refused[why] += 1
        if self._begun:
            self.close()
        else:
            self._abort()

    def _rest(self) -> None:
        """Waits for the next request, or for the rest of its head."""
        if self._in_head:
            self._wait(HEAD_SECONDS, "too slow a request")
        else:
            self._wait(self.timeout_keep_alive, "")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)  # type: ignore[misc]  # of uvicorn 0.54, which the node has

    @property
    def _serving(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def _disconnect(self, cycle: RequestResponseCycle) -> None:
        cycle.disconnected = True
        cycle.message_event.set()

    # What comes

    def data_received(self, data: bytes) -> None:
        if self.closing:
            self._late += len(data)
            if self._late > LINGER_BYTES and self._begun:
                self.flow.pause_reading()
            return
        if not self._begun:
            self._begin()
        self._wire += len(data)
        try:
            self.parser.feed_data(data)
            # This piece may hold what comes after a small request.
            if self._wire > LARGEST_HEAD + (1 + FRAMING) * self._body + len(data):
                self._refuse(431, "the request has too much beside its body")
        except httptools.HttpParserUpgrade:
            if self.cycle is not None:  # nobody offers one: the request is served as if it had not asked, and is the last
                self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, _Refused):
                self._refuse(cause.status, cause.message)
            else:
                self._refuse(400, "this is no HTTP request")

    def eof_received(self) -> None:
        """The client sends no more, which for uvicorn is its end. What it does not read of its answer is not kept for ever."""
        self.closing = self._ending = True
        self._stop_waiting()
        self._timer = self.loop.call_later(STALLED_SECONDS, self._abort)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MOST_PIPELINED:
            raise _Refused(400, "too many requests that did not wait for an answer")
        self._wire = self._body = self._path = 0
        self._in_head = self._in_message = True
        if not self._serving:
            self._rest()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._path += len(url)
        if self._path > LARGEST_PATH:
            raise _Refused(414, f"the path is longer than {LARGEST_PATH} bytes")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer is no header: the guard would take a key in one for the request's
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._get_upgrade() == b"websocket":
            raise _Refused(403, "no websocket is served")
        was_serving = self._serving
        super().on_headers_complete()
        cycle = self.cycle
        logs, cycle.access_log = cycle.access_log, False

        def let_in() -> None:
            self._held.prove(self)
            cycle.access_log = logs

        extensions: dict[str, Any] = {LET_IN: let_in}
        self.scope["extensions"] = extensions
        if not was_serving:
            self._stop_waiting()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def _refuse(self, status: int, message: str) -> None:
        """Answers and closes; where a request is served before this one, that is the last."""
        self._held.refused[str(status)] += 1
        self.pipeline.clear()
        if self._active is not None and not self._active.response_complete:
            if self.cycle is not self._active or not self._active.more_body or self._active.response_started:
                self.closing = True
                self._active.keep_alive = False
                return
            self._disconnect(self._active)
        body = error_body(status, message)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.close()

    # What goes

    def on_response_complete(self) -> None:
        if self._in_message and not self._in_head and self.cycle.response_complete:
            self.close()  # the rest of this request is not read
        super().on_response_complete()
        self._unset_keepalive_if_required()
        if not self.closing and not self._serving:
            self._rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self.closing:
            self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._ending:
            self._stop_waiting()
            if not self._serving:
                self._rest()

    def _unsent(self) -> int:
        """Bytes of answers that the client has not taken, as far as they are in this process."""
        return max(each.get_write_buffer_size() for each in (self._inner, self._raw) if each is not None)

    def _watch_reader(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(STALLED_SECONDS, self._has_read, self._unsent())

    def _has_read(self, before: int) -> None:
        if self._unsent() > before - STALLED_BYTES:
            self.drop("an answer that was not read")
        else:
            self._watch_reader()

    # The end

    def close(self) -> None:
        """Serves nothing more; ends the connection when its answer has gone and the client has had the time to read it."""
        if not self._ending and self._begun:
            self.closing = self._ending = True
            self._flush(self.loop.time(), self._unsent())

    def _flush(self, since: float, before: int) -> None:
        """Waits until the answer has gone, as long as the client takes it."""
        self._stop_waiting()
        now, clock = self._unsent(), self.loop.time()
        if now <= before - STALLED_BYTES:
            since, before = clock, now
        if not now:
            self._linger()
        elif clock - since < STALLED_SECONDS:
            self._timer = self.loop.call_later(FLUSH_SECONDS, self._flush, since, before)
        else:
            self.drop("an answer that was not read")

    def _linger(self) -> None:
        """Reads on for a moment: a connection that is closed with unread bytes takes its answer back from the client."""
        if self._inner is self._raw:
            self._inner.write_eof()  # type: ignore[union-attr]
        wire = self._raw.get_extra_info("socket")  # type: ignore[union-attr]
        if wire is not None:  # the client may have gone by now
            with suppress(OSError):
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LINGER_BYTES)
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_SECONDS, self._end)

    def _end(self) -> None:
        if self._inner is self._raw:
            self._abort()
            return
        if self._late > LINGER_BYTES:
            self._raw.pause_reading()  # type: ignore[union-attr]
        self._inner.close()  # type: ignore[union-attr]
        self._timer = self.loop.call_later(LINGER_SECONDS, self._abort)


_protocols: Any = uvicorn.config.HTTP_PROTOCOLS
_protocols["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
