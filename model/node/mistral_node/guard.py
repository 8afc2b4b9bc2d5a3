"""The guard: an ASGI middleware in front of all of vLLM's routes.

vLLM's own `--api-key` protects a list of prefixes; this refuses whatever is not on a short list, with a key or without, and
asks for the key on all but `/health`. Give it to vLLM with `--middleware mistral_node.front.Guard`, which puts it outermost and bounds
the HTTP server below it, too.

Where MISTRALCTL_GATE is `probe` it starts closed: until the launcher opens it, it serves only who bears the probe's token. It
says in routes.json which routes the application has, so that the probe can walk them all.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mistral_contract import envs, files
from mistral_contract.envs import Serve
from mistral_node.traffic import Traffic

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Refusal = tuple[int, str]

OPEN = {("GET", "/health")}
CHAT = ("POST", "/v1/chat/completions")
WITH_KEY = {("GET", "/v1/models"), CHAT, ("POST", "/v1/completions")}
PROBE_HEADER = b"x-mistralctl-probe"
LARGEST_BODY = 32 << 20
BODY_SECONDS = 60.0
MOST_HEADERS, LARGEST_HEADERS = 64, 16 << 10


class _Ended(Exception):
    """Tells the application that no more of the body comes."""


def read_key(run_dir: Path) -> bytes:
    """The key in the 0600 file."""
    key = json.loads((run_dir / files.SECRETS.name).read_text("utf-8"))["api_key"]
    if not isinstance(key, str) or len(key) < 16:
        raise ValueError(f"{run_dir / files.SECRETS.name}: api_key should be text of at least 16 characters")
    return key.encode()


@cache
def _handed_over(number: int) -> bytes:
    """The key that whoever started this process put into a pipe for it."""
    with os.fdopen(number, "rb") as pipe:
        return pipe.read()


def _bearer(value: bytes) -> bytes:
    """The token of `Authorization: Bearer TOKEN`; nothing for another scheme. A scheme has no case, and spaces follow it (RFC 9110, 11.4);
    spaces and tabs around a header's value are no part of it (5.5)."""
    scheme, _, token = value.strip(b" \t").partition(b" ")
    return token.lstrip(b" ") if scheme.lower() == b"bearer" else b""


def probe_token(key: str) -> str:
    """What the gate's probe and the launcher show while the guard is closed; of no use to anybody once it is open."""
    return hmac.new(key.encode(), b"mistralctl probe", hashlib.sha256).hexdigest()


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


class Guard:
    """Wraps an ASGI application.

    `run_dir` holds secrets.json and what is shared with the launcher; without it MISTRALCTL_RUN_DIR says where that is, and the
    key may come through the pipe that MISTRALCTL_KEY_FD names.
    """

    def __init__(self, app: App, run_dir: Path | None = None) -> None:
        self.folder = run_dir or Path(os.environ[envs.RUN_DIR])
        self.app = app
        pipe = os.environ.get(envs.KEY_FD) if run_dir is None else None
        key = _handed_over(int(pipe)) if pipe else read_key(self.folder)
        self.key = key
        self.token = probe_token(key.decode()).encode()
        self.traffic = Traffic(self.folder)
        self.chat = envs.value(Serve, "chat_template", os.environ) != "none"
        self.gated = envs.value(Serve, "gate", os.environ) is not None
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
            await send(message)

        await self.app(scope, receive, started_send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = (scope["method"], scope["path"])
        refusal = self._stranger(scope) or self._refusal(route, scope["headers"])
        if refusal is not None:
            await _answer(send, *refusal)
        elif route[0] == "GET":  # polling is no work: it keeps no machine alive
            await self.app(scope, receive, send)
        else:
            self.traffic.begin()
            try:
                await self._bounded(scope, receive, send)
            finally:
                self.traffic.end()

    def _stranger(self, scope: Scope) -> Refusal | None:
        """Status and reason if this client may not even ask: the guard is closed to it, or its address is not allowed."""
        headers: Headers = scope["headers"]
        probes = False
        if self.gated and not self.traffic.is_open:
            given = [value for name, value in headers if name.lower() == PROBE_HEADER]
            probes = len(given) == 1 and hmac.compare_digest(given[0], self.token)
            if not probes:
                return 503, "the server is not open yet; try again later"
        if self.allowed:
            address = ipaddress.ip_address((scope.get("client") or ("0.0.0.0", 0))[0])  # noqa: S104 - nobody's address
            known = any(address in network for network in self.allowed)
            if not known and not (probes and address.is_loopback):  # the launcher's own check, from beside us
                return 403, f"{address} is not an address that may ask"
        return None

    def _refusal(self, route: tuple[str, str], headers: Headers) -> Refusal | None:
        """Status and reason if the request is not let in."""
        if len(headers) > MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > LARGEST_HEADERS:
            return 431, "the headers are too large"
        if route in OPEN:
            return None
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(_bearer(given[0]), self.key):
            return 401, "the API key is missing or wrong"
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


async def _answer(send: Send, status: int, message: str) -> None:
    """An error in the form of the OpenAI API. Where a request is too large or too slow, the rest of it is not waited for."""
    kind = {401: "authentication_error", 503: "server_error"}.get(status, "invalid_request_error")
    body = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413, 431):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
