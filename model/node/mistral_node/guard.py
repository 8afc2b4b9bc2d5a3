"""The guard: an ASGI middleware in front of all of vLLM's routes.

vLLM's own `--api-key` protects a list of prefixes; this refuses whatever is not on a short list, with a key or without, and
asks for the key on all but `/health`. Give it to vLLM with `--middleware mistral_node.front.Guard`, which puts it outermost and bounds
the HTTP server below it, too.

It starts closed: until the launcher opens it, it serves only who shows the launcher's own key (MISTRALCTL_NODE_KEY is its sha256) from this
machine, and afterwards that key is of no use. It says in routes.json which routes the application has, so that the gate can walk them all.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral_contract import envs, files
from mistral_contract.envs import Serve
from mistral_contract.keys import Key
from mistral_contract.routes import CHAT, OPEN, WITH_KEY
from mistral_node.callers import Callers
from mistral_node.limits import Meter
from mistral_node.traffic import Traffic

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Refusal = tuple[int, str]

PROBE_HEADER = b"x-mistralctl-probe"
LARGEST_BODY = 32 << 20
BODY_SECONDS = 60.0
MOST_HEADERS, LARGEST_HEADERS = 64, 16 << 10
WATCH_SECONDS = 0.4  # changed keys are taken up, and counts written, also while nobody asks


class _Ended(Exception):
    """Tells the application that no more of the body comes."""


def _bearer(value: bytes) -> bytes:
    """The token of `Authorization: Bearer TOKEN`; nothing for another scheme. A scheme has no case, and spaces follow it (RFC 9110, 11.4);
    spaces and tabs around a header's value are no part of it (5.5)."""
    scheme, _, token = value.strip(b" \t").partition(b" ")
    return token.lstrip(b" ") if scheme.lower() == b"bearer" else b""


def _included(app: Any) -> Iterator[Any]:
    """The routes of an application; of a router that newer versions of FastAPI include as a whole, those in it."""
    for route in getattr(app, "routes", None) or ():
        inside = getattr(route, "effective_route_contexts", None)
        for one in inside() if inside is not None else (route,):
            yield getattr(one, "starlette_route", None) or one


def routes_of(app: Any, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Every route below an application, mounts and what is in them included: its path and its methods.

    `WEBSOCKET` is the method of a websocket, `*` that of a mounted application, which answers any; none: a kind of route that is not
    known here, which no gate lets pass.
    """
    for route in _included(app):
        path = prefix + (getattr(route, "path", None) or "")
        methods = getattr(route, "methods", None)
        if methods:
            yield {"path": path, "methods": sorted(methods)}
        elif getattr(route, "routes", None) is not None:
            yield {"path": path or "/", "methods": ["*"]}
            yield from routes_of(route, path)
        elif hasattr(route, "endpoint"):
            yield {"path": path, "methods": ["WEBSOCKET"]}
        else:
            yield {"path": path or type(route).__name__, "methods": []}


def _address(scope: Scope) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address((scope.get("client") or ("0.0.0.0", 0))[0])  # noqa: S104 - nobody's address


class Guard:
    """Wraps an ASGI application.

    `run_dir` holds what is shared with the launcher; without it MISTRALCTL_RUN_DIR says where that is. The keys lie in the folder `keys`
    beside it; MISTRALCTL_NODE_KEY is the sha256 of the launcher's own.
    """

    def __init__(self, app: App, run_dir: Path | None = None) -> None:
        self.folder = run_dir or Path(os.environ[envs.RUN_DIR])
        self.app = app
        file = self.folder.parent / files.KEYS.name / files.KEYS_FILE.name
        self.callers = Callers(file, self.folder / files.USAGE.name, os.environ.get(envs.NODE_KEY, ""))
        self._watch: asyncio.Task[None] | None = None
        self.traffic = Traffic(self.folder)
        self.chat = envs.value(Serve, "chat_template", os.environ) != "none"
        self.allowed = [ipaddress.ip_network(one) for one in envs.value(Serve, "allow", os.environ)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served"})

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def started_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                text = json.dumps(list(routes_of(scope.get("app"))), indent=1)
                (self.folder / files.ROUTES.name).write_text(text + "\n", "utf-8")
                self._watch = asyncio.get_running_loop().create_task(self._watched())
            await send(message)

        try:
            await self.app(scope, receive, started_send)
        finally:
            if self._watch is not None:
                self._watch.cancel()

    async def _watched(self) -> None:
        while True:
            self.callers.look()
            with suppress(OSError):  # a full disk stops nobody
                self.callers.save()
            await asyncio.sleep(WATCH_SECONDS)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.callers.look()
        route = (scope["method"], scope["path"])
        key = self._key(scope)
        refusal = self._stranger(scope) or self._refusal(route, scope["headers"], key)
        if refusal is not None:
            await _answer(send, *refusal)
        elif route[0] == "GET" or key is None:  # polling is no work: it keeps no machine alive
            await self.app(scope, receive, send)
        elif not self.traffic.is_open:  # the launcher's own questions
            await self._bounded(scope, receive, send)
        else:
            await self._counted(scope, receive, send, key)

    async def _counted(self, scope: Scope, receive: Receive, send: Send, key: Key) -> None:
        """Runs the application within the limits of a key, and counts what was asked."""
        account, meter = self.callers.account(key), Meter()
        if held := account.held(key, time.time()):
            account.refused += 1
            limit, seconds = held
            message = f"the key {key.name} has reached its limit {limit} of {getattr(key, limit)}; try again in {seconds} s"
            return await _answer(send, 429, message, limit, seconds)

        async def metered_receive() -> Message:
            message = await receive()
            meter.received += len(message.get("body", b""))
            return message

        async def metered_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                meter.status = message["status"]
            meter.feed(message.get("body", b""))
            await send(message)

        self.traffic.begin()
        account.begin(time.time())
        try:
            await self._bounded(scope, metered_receive, metered_send)
        finally:
            account.end(time.time(), meter.tokens)
            self.traffic.end()

    def _stranger(self, scope: Scope) -> Refusal | None:
        """Status and reason if this client may not even ask: its address is not allowed, or the guard is closed to it."""
        given = [value for name, value in scope["headers"] if name.lower() == PROBE_HEADER]
        probes = len(given) == 1 and self._launcher(scope, given[0]) is not None
        if self.allowed and not probes:
            address = _address(scope)
            if not any(address in network for network in self.allowed):
                return 403, f"{address} is not an address that may ask"
        if not probes and not self.traffic.is_open:
            return 503, "the server is not open yet; try again later"
        return None

    def _launcher(self, scope: Scope, token: bytes) -> Key | None:
        """The launcher's own key, if that is what is shown: on this machine, while the guard is closed."""
        if self.traffic.is_open or not _address(scope).is_loopback:
            return None
        return self.callers.launcher(token)

    def _key(self, scope: Scope) -> Key | None:
        """Whose key a request shows, in its one header for that."""
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        token = _bearer(given[0]) if len(given) == 1 else b""
        return self.callers.find(token) or self._launcher(scope, token)

    def _refusal(self, route: tuple[str, str], headers: Headers, key: Key | None) -> Refusal | None:
        """Status and reason if the request is not let in."""
        if len(headers) > MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > LARGEST_HEADERS:
            return 431, "the headers are too large"
        if route in OPEN:
            return None
        if key is None:
            return 401, "the API key is missing or wrong"
        if key.expired(time.time()):
            return 401, "the API key has expired"
        if route not in WITH_KEY:
            return 404, "this route is not served"
        if route == CHAT and not self.chat:
            return 404, "this is a base model, which has no chat; use /v1/completions"
        if self.traffic.draining:
            return 503, "the server is ending; try again later"
        lengths = [value for name, value in headers if name.lower() == b"content-length"]
        if len(lengths) > 1 or (lengths and not lengths[0].isdigit()):
            return 400, "the content length is not a number"
        if lengths and (len(lengths[0]) > 12 or int(lengths[0]) > LARGEST_BODY):
            return 413, f"the body is larger than {LARGEST_BODY} bytes"
        return None

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application with a body that ends at LARGEST_BODY bytes and comes within BODY_SECONDS."""
        size, started, whole = 0, False, False
        refusal: Refusal | None = None
        clock = asyncio.get_running_loop().time
        deadline = clock() + BODY_SECONDS

        async def bounded_receive() -> Message:
            nonlocal size, whole, refusal
            if whole:  # the application waits for the client to go away
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - clock()))
            except asyncio.TimeoutError:
                refusal = 408, f"the body did not come within {BODY_SECONDS:.0f} s"
                raise _Ended from None
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                refusal = 413, f"the body is larger than {LARGEST_BODY} bytes"
                raise _Ended
            whole = not message.get("more_body", False)
            return message

        async def noticed_send(message: Message) -> None:
            nonlocal started
            if refusal is None or started:  # else it is what the application makes of _Ended
                started = True
                await send(message)

        with suppress(_Ended):
            await self.app(scope, bounded_receive, noticed_send)
        if refusal is not None and not started:
            await _answer(send, *refusal)


async def _answer(send: Send, status: int, message: str, limit: str = "", seconds: int = 0) -> None:
    """An error in the form of the OpenAI API; `limit` is what holds a key back, for so many seconds.

    Where a request is too large or too slow, the rest of it is not waited for.
    """
    kind = {401: "authentication_error", 429: "rate_limit_exceeded", 503: "server_error"}.get(status, "invalid_request_error")
    body = json.dumps(
        {"error": {"message": message, "type": kind, **({"param": limit} if limit else {}), "code": status}}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if limit:
        headers.append((b"retry-after", str(seconds).encode()))
    if status in (408, 413, 431):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
