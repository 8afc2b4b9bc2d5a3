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
import re
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_contract import envs, files
from mistral_contract.engines import VLLM
from mistral_contract.envs import Serve
from mistral_contract.keys import Key
from mistral_contract.routes import CHAT, COMPLETIONS, OPEN, WITH_KEY
from mistral_node import bodies, grammars, pulse, tls
from mistral_node.admission import RETRY_SECONDS, Admission, Full
from mistral_node.bodies import Refused
from mistral_node.callers import Callers
from mistral_node.connections import HELD, Held, allowed_files, let_in
from mistral_node.grammars import COMPILE_SECONDS, Busy, Grammars, Verdict
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
LARGEST_BODY = bodies.LARGEST  # of any deployment; that of one follows from its longest prompt
LONG_BODY = 64 << 10  # takes a few milliseconds to read, for which others would wait
BODY_SECONDS = 60.0
MOST_HEADERS, LARGEST_HEADERS = 64, 16 << 10
FORCED = "--enable-force-include-usage"  # with this argument vLLM says usage in every event, to every client
WATCH_SECONDS = 0.4  # changed keys are taken up, and counts written, also while nobody asks
# What the application is shown of a request's headers: no key, and nothing else that steers vLLM (its priority, its rank of data).
PASSED = frozenset((b"accept", b"content-length", b"content-type", b"expect", b"host", b"transfer-encoding", b"user-agent"))
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


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


def _passed(headers: Headers) -> Headers:
    """The headers that the application sees."""
    return [
        (name, value)
        for name, value in headers
        if name.lower() in PASSED or (name.lower() == b"x-request-id" and REQUEST_ID.fullmatch(value))
    ]


@dataclass(frozen=True)
class Turn:
    """One request: whose key it shows, and what counts its tokens, if that is done."""

    key: Key
    meter: Meter | None = None


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
        self.bounds = bodies.bounds(os.environ)
        self.grammars = Grammars(self._vocabulary, lambda: self.callers.count > 1)
        self._application: Any = None
        self.admission = Admission(self.bounds, lambda: self.callers.count > 1)
        self._long = ThreadPoolExecutor(1)  # one: long bodies take no more than one core
        self._tasks: list[asyncio.Task[None]] = []
        self.traffic = Traffic(self.folder)
        self._asks_usage = FORCED not in envs.value(Serve, "vllm_args", os.environ)
        self.chat = envs.value(Serve, "chat_template", os.environ) != "none"
        self.allowed = [ipaddress.ip_network(one) for one in envs.value(Serve, "allow", os.environ)]
        self.held = Held(allowed_files(), tls.served(self.folder) if os.environ.get(envs.variable("tls")) else None)
        self.held.refused.update(self.callers.refused)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            scope.setdefault("state", {})[HELD] = self.held  # for the connections below
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
                self._application = scope.get("app")
                loop = asyncio.get_running_loop()
                self._tasks = [loop.create_task(self._watched()), loop.create_task(self._pulses(scope))]
            await send(message)

        try:
            await self.app(scope, receive, started_send)
        finally:
            for task in self._tasks:
                task.cancel()
            self.grammars.end()

    def _vocabulary(self) -> str:
        config = self._application.state.vllm_config
        return grammars.vocabulary(config.model_config, config.structured_outputs_config.backend)

    def _tried(self, kind: str) -> str:
        """What a constraint is tried as; empty where the engine makes no grammar of it."""
        if envs.value(Serve, "engine", os.environ) != VLLM:
            return ""
        if kind != bodies.STRICT_TOOLS:
            return kind
        backend = self._application.state.vllm_config.structured_outputs_config.backend
        return "tools" if backend == grammars.GUIDANCE else ""

    async def _watched(self) -> None:
        while True:
            self.callers.look()
            with suppress(OSError):  # a full disk stops nobody
                self.callers.save(self.held.refused)
            await asyncio.sleep(WATCH_SECONDS)

    async def _pulses(self, scope: Scope) -> None:
        """Asks the engine for one token whenever nobody else got one for a while: the launcher sees whether one comes.

        That is no request of anybody: it comes from no network, shows no key, is counted nowhere and keeps no machine alive.
        """
        asked = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": COMPLETIONS[0], "path": COMPLETIONS[1],
            "raw_path": COMPLETIONS[1].encode(), "root_path": "", "scheme": "http", "query_string": b"", "server": None,
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 0),
        }  # fmt: skip
        body = json.dumps({"prompt": [1], "max_tokens": 1, "temperature": 0}).encode()
        while True:
            before = self.traffic.beats
            await asyncio.sleep(pulse.SECONDS)
            if self.traffic.is_open and self.traffic.beats == before:
                with suppress(Exception):  # what is wrong with the engine the launcher says, by what does not come
                    state = {"state": dict(scope.get("state", {})), "app": scope.get("app")}
                    await self.app(
                        asked | state, _once(body, asyncio.get_running_loop().create_future()), self._beating(_nowhere)
                    )

    def _beating(self, send: Send) -> Send:
        """Sends on, and tells the launcher of each piece of an answer that the engine makes."""
        good = False

        async def beating(message: Message) -> None:
            nonlocal good
            if message["type"] == "http.response.start":
                good = message["status"] == 200
            elif good and message.get("body"):
                self.traffic.beat()
            await send(message)

        return beating

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.callers.look()
        route = (scope["method"], scope["path"])
        key = self._key(scope)
        refusal = self._stranger(scope) or self._refusal(route, scope["headers"], key)
        if refusal is not None:
            await self._refuse(send, *refusal)
            return
        scope["headers"] = _passed(scope["headers"])
        if key is not None:
            let_in(scope)
        if route[0] == "GET" or key is None:  # polling is no work: it keeps no machine alive
            await self.app(scope, receive, send)
        elif not self.traffic.is_open:  # the launcher's own questions
            await self._checked(scope, receive, send, Turn(key))
        else:
            await self._counted(scope, receive, send, key)

    async def _refuse(self, send: Send, status: int, message: str, param: str = "", seconds: int = 0) -> None:
        """Answers a refusal, and counts it: a line in the log for each would be a stranger's to write."""
        self.held.refused[str(status)] += 1
        await _answer(send, status, message, param, seconds)

    async def _counted(self, scope: Scope, receive: Receive, send: Send, key: Key) -> None:
        """Runs the application within the limits of a key, and counts what was asked."""
        account, meter = self.callers.account(key), Meter()
        if held := account.held(key, time.time()):
            account.refused += 1
            limit, seconds = held
            message = f"the key {key.name} has reached its limit {limit} of {getattr(key, limit)}; try again in {seconds} s"
            return await self._refuse(send, 429, message, limit, seconds)

        async def metered_receive() -> Message:
            message = await receive()
            meter.received += len(message.get("body", b""))
            return message

        async def metered_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                meter.status = message["status"]
            if piece := message.get("body", b""):
                meter.feed(piece)
                message = {**message, "body": meter.shown(piece)}
            await send(message)

        self.traffic.begin()
        account.begin(time.time())
        try:
            await self._checked(scope, metered_receive, metered_send, Turn(key, meter))
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
        if lengths and (len(lengths[0]) > 12 or int(lengths[0]) > self.bounds.body):
            return self._too_large()
        return None

    def _too_large(self) -> Refusal:
        return 413, (
            f"the body is larger than {self.bounds.body} bytes, which is what a prompt of {self.bounds.max_model_len} tokens needs at most; "
            "make it shorter, or send several requests"
        )

    async def _body(self, receive: Receive) -> bytes | Refusal | None:
        """The whole body, within its limits of size and time; why it is not taken, or None if the client went."""
        clock = asyncio.get_running_loop().time
        deadline, pieces, size = clock() + BODY_SECONDS, [], 0
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - clock()))
            except asyncio.TimeoutError:
                return 408, f"the body did not come within {BODY_SECONDS:.0f} s"
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.bounds.body:
                return self._too_large()
            if not message.get("more_body", False):
                return b"".join(pieces)

    async def _grammar(self, key: Key, kind: str, text: str) -> tuple[int, str, str, int] | None:
        """Why the engine is not asked to make a grammar of this: status, message, field and seconds to wait."""
        try:
            verdict = await self.grammars.verdict(key.id, kind, text)
        except Busy:
            return (
                429,
                "too many schemas and grammars that are new here wait to be tried; try again later",
                "grammars",
                RETRY_SECONDS,
            )
        if verdict not in (Verdict.SLOW, Verdict.EMPTY):
            return None  # of a wrong one vLLM says best what is wrong
        slow = (
            f"a grammar of this {kind} of {len(text)} characters takes more than {COMPILE_SECONDS:.0f} s of a core to make; "
            "make it simpler: fewer and shorter enums, no large minLength, maxLength or repeats"
        )
        message = (
            slow if verdict is Verdict.SLOW else f"by this {kind} no text is right; look for a rule that only refers to itself"
        )
        return 400, message, "tools" if kind == "tools" else "response_format or structured_outputs", 0

    async def _checked(self, scope: Scope, receive: Receive, send: Send, turn: Turn) -> None:
        """Runs the application with a body that is whole and asks for nothing out of bounds, when there is a place for it."""
        body = await self._body(receive)
        if body is None:
            return None
        if isinstance(body, tuple):
            return await self._refuse(send, *body)
        try:
            if len(body) > LONG_BODY:
                loop = asyncio.get_running_loop()
                asked = await loop.run_in_executor(self._long, bodies.check, scope["path"], body, self.bounds)
            else:
                asked = bodies.check(scope["path"], body, self.bounds)
            for kind, text in asked.grammars:
                if (tried := self._tried(kind)) and (refusal := await self._grammar(turn.key, tried, text)):
                    return await self._refuse(send, *refusal)
            place = self.admission.enter(turn.key.id, asked.sequences, len(body))
        except Refused as error:
            return await self._refuse(send, 400, error.message, error.param)
        except Full:
            return await self._refuse(send, 429, "too many requests wait already; try again later", "queue", RETRY_SECONDS)
        if asked.uncounted and turn.meter is not None and self._asks_usage:
            body, turn.meter.asked = bodies.counted(body), True
            size = str(len(body)).encode()
            scope["headers"] = [(name, size if name.lower() == b"content-length" else value) for name, value in scope["headers"]]
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((place.let_in, gone), return_when=asyncio.FIRST_COMPLETED)
            if place.let_in.done():
                await self.app(scope, _once(body, gone), self._beating(send))
        finally:
            gone.cancel()
            self.admission.leave(place)


def _once(body: bytes, then: Awaitable[Message]) -> Receive:
    """Gives a whole body, and afterwards what the server says next: that the client went."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.shield(then)

    return receive


async def _nowhere(message: Message) -> None:
    """Sends nothing."""


def error_body(status: int, message: str, param: str = "") -> bytes:
    """An error in the form of the OpenAI API; `param` is the field that is wrong, or what holds a key back."""
    kind = {401: "authentication_error", 429: "rate_limit_exceeded", 503: "server_error"}.get(status, "invalid_request_error")
    return json.dumps(
        {"error": {"message": message, "type": kind, **({"param": param} if param else {}), "code": status}}
    ).encode()


async def _answer(send: Send, status: int, message: str, param: str = "", seconds: int = 0) -> None:
    """A refusal, of a key for so many seconds. The connection goes on only where the request was read and is a key's to mend."""
    body = error_body(status, message, param)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if seconds:
        headers.append((b"retry-after", str(seconds).encode()))
    if not param:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
