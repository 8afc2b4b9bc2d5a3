"""The guard: an ASGI middleware in front of all of vLLM's routes.

vLLM's own `--api-key` protects a list of prefixes; this refuses whatever is not on a short list, with a key or without, and
asks for the key on all but `/health`. Give it to vLLM with `--middleware vllm_mistral.guard.Guard`, which puts it outermost.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from vllm_mistral.traffic import Traffic

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = {("GET", "/health")}
CHAT = ("POST", "/v1/chat/completions")
WITH_KEY = {("GET", "/v1/models"), CHAT, ("POST", "/v1/completions")}
LARGEST_BODY = 32 << 20
MOST_HEADERS, LARGEST_HEADERS = 64, 16 << 10


class _TooLarge(Exception):
    pass


def read_key(run_dir: Path) -> bytes:
    """The key in the 0600 file."""
    key = json.loads((run_dir / "secrets.json").read_text("utf-8"))["api_key"]
    if not isinstance(key, str) or len(key) < 16:
        raise ValueError(f"{run_dir / 'secrets.json'}: api_key should be text of at least 16 characters")
    return key.encode()


class Guard:
    """Wraps an ASGI application. `run_dir` holds secrets.json; without it MISTRALCTL_RUN_DIR says where that is."""

    def __init__(self, app: App, run_dir: Path | None = None) -> None:
        folder = run_dir or Path(os.environ["MISTRALCTL_RUN_DIR"])
        self.app = app
        self.authorization = b"Bearer " + read_key(folder)
        self.traffic = Traffic(folder)
        self.chat = os.environ.get("MISTRALCTL_CHAT_TEMPLATE") != "none"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = (scope["method"], scope["path"])
        refusal = self._refusal(route, scope["headers"])
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

    def _refusal(self, route: tuple[str, str], headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Status and reason if the request is not let in."""
        if len(headers) > MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > LARGEST_HEADERS:
            return 431, "the headers are too large"
        if route in OPEN:
            return None
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], self.authorization):
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
        """Runs the application with a body that ends at LARGEST_BODY bytes."""
        size, started = 0, False

        async def bounded_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise _TooLarge
            return message

        async def noticed_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, bounded_receive, noticed_send)
        except _TooLarge:
            if not started:
                await _answer(send, 413, f"the body is larger than {LARGEST_BODY} bytes")


async def _answer(send: Send, status: int, message: str) -> None:
    """An error in the form of the OpenAI API."""
    kind = {401: "authentication_error", 503: "server_error"}.get(status, "invalid_request_error")
    body = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
