"""The guard over the ASGI interface itself: what reaches the application behind it, and what does not."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_mistral.guard import LARGEST_BODY, WITH_KEY, Guard
from vllm_mistral.traffic import Traffic

KEY = "mctl-0123456789abcdef"
BEARER = (b"authorization", b"Bearer " + KEY.encode())
ROUTES = ["/", "/metrics", "/version", "/tokenize", "/detokenize", "/invocations", "/ping", "/load", "/docs", "/openapi.json",
          "/v1/models/", "/v1/models/../../metrics", "//v1/models", "/V1/models", "/v1/embeddings", "/health/", "/%68ealth",
          "/scale_elastic_ep", "/v1/load_lora_adapter", "/collective_rpc", "/mistralctl"]  # fmt: skip


class Behind:
    """The application behind the guard: notes what reaches it, reads the whole body, answers in pieces."""

    def __init__(self, traffic: Traffic) -> None:
        self.reached: list[tuple[str, str]] = []
        self.traffic = traffic
        self.running: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append((scope.get("method", scope["type"]), scope.get("path", "")))
        self.running.append(self.traffic.read().running)
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    file = tmp_path / "secrets.json"
    file.write_text(json.dumps({"api_key": KEY}))
    file.chmod(0o600)
    return tmp_path


@pytest.fixture
def behind(run_dir: Path) -> Behind:
    return Behind(Traffic(run_dir, fresh=True))


@pytest.fixture
def guard(run_dir: Path, behind: Behind) -> Guard:
    return Guard(behind, run_dir)


def ask(
    app: Callable[[Any, Any, Any], Awaitable[None]], method: str, path: str, *headers: tuple[bytes, bytes],
    body: list[bytes] | None = None, kind: str = "http",
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Status and JSON body of an answer."""
    parts = list(body or [b""])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    if kind == "websocket":
        return sent[0]["code"], {}
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(text) if text.startswith(b"{") else {}


def test_the_short_list_is_served_with_the_key_and_health_without(guard: Guard, behind: Behind) -> None:
    for method, path in sorted(WITH_KEY):
        assert ask(guard, method, path, BEARER)[0] == 200
    assert ask(guard, "GET", "/health")[0] == 200
    assert behind.reached == [*sorted(WITH_KEY), ("GET", "/health")]


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer wrong", b"bearer " + KEY.encode(), KEY.encode(),
                                    b"Bearer " + KEY.encode() + b" ", b"Bearer " + KEY.encode()[:-1], b"\xff\xfe"])  # fmt: skip
def test_without_the_key_nothing_reaches_the_application(header: bytes | None, guard: Guard, behind: Behind) -> None:
    headers = [] if header is None else [(b"authorization", header)]
    for method, path in WITH_KEY:
        status, body = ask(guard, method, path, *headers)
        assert status == 401
        assert body["error"]["type"] == "authentication_error"
        assert KEY not in json.dumps(body)
    assert ask(guard, "GET", "/v1/models", BEARER, BEARER)[0] == 401  # two headers: whose is it?
    assert behind.reached == []


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"])
def test_no_other_route_is_served_with_a_key_or_without(method: str, guard: Guard, behind: Behind) -> None:
    for path in ROUTES:
        assert ask(guard, method, path)[0] == 401
        assert ask(guard, method, path, BEARER)[0] == 404
    for path in ("/v1/models", "/v1/completions", "/health"):
        if (method, path) not in WITH_KEY | {("GET", "/health")}:
            assert ask(guard, method, path, BEARER)[0] == 404
    assert behind.reached == []


def test_websockets_are_closed_before_they_open(guard: Guard, behind: Behind) -> None:
    assert ask(guard, "GET", "/v1/realtime", BEARER, kind="websocket")[0] == 1008
    assert behind.reached == []


def test_lifespan_passes(guard: Guard, behind: Behind) -> None:
    asyncio.run(guard({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert behind.reached == [("lifespan", "")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"content-length", b"abc")], 400),
        ([(b"content-length", b"-1")], 400),
        ([(b"content-length", b"1"), (b"content-length", b"2")], 400),
        ([(b"content-length", str(LARGEST_BODY + 1).encode())], 413),
        ([(b"content-length", b"9" * 4000)], 413),
        ([(b"x", b"y")] * 100, 431),
        ([(b"x", b"y" * 20_000)], 431),
    ],
)
def test_hostile_lengths_and_headers(headers: list[tuple[bytes, bytes]], status: int, guard: Guard, behind: Behind) -> None:
    assert ask(guard, "POST", "/v1/completions", BEARER, *headers)[0] == status
    assert behind.reached == []


def test_a_body_without_a_length_ends_at_the_limit(guard: Guard) -> None:
    piece = bytes(1 << 20)
    pieces = [piece] * (LARGEST_BODY // len(piece))
    assert ask(guard, "POST", "/v1/completions", BEARER, body=pieces)[0] == 200
    assert ask(guard, "POST", "/v1/completions", BEARER, body=[*pieces, b"x"])[0] == 413


def test_requests_are_counted_also_when_the_application_fails(guard: Guard, behind: Behind) -> None:
    ask(guard, "POST", "/v1/completions", BEARER)
    ask(guard, "POST", "/v1/completions")
    ask(guard, "GET", "/v1/models", BEARER)  # polling is no work
    ask(guard, "GET", "/health")
    assert behind.running == [1, 0, 0]
    count = behind.traffic.read()
    assert (count.served, count.running) == (1, 0)

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    guard.app = broken
    with pytest.raises(RuntimeError):
        ask(guard, "POST", "/v1/completions", BEARER)
    assert (behind.traffic.read().served, behind.traffic.read().running) == (2, 0)


def test_a_server_that_ends_takes_no_more_requests(guard: Guard, behind: Behind) -> None:
    behind.traffic.drain()
    assert ask(guard, "POST", "/v1/completions", BEARER)[0] == 503
    assert ask(guard, "POST", "/v1/completions")[0] == 401
    assert ask(guard, "GET", "/health")[0] == 200
    assert behind.reached == [("GET", "/health")]


def test_a_base_model_has_no_chat(run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_CHAT_TEMPLATE", "none")
    guard = Guard(behind, run_dir)
    assert ask(guard, "POST", "/v1/chat/completions", BEARER)[0] == 404
    assert ask(guard, "POST", "/v1/completions", BEARER)[0] == 200


def test_a_short_or_missing_key_stops_the_server_from_starting(run_dir: Path, behind: Behind) -> None:
    (run_dir / "secrets.json").write_text('{"api_key": "short"}')
    with pytest.raises(ValueError, match="at least 16 characters"):
        Guard(behind, run_dir)
    (run_dir / "secrets.json").write_text("{}")
    with pytest.raises(KeyError):
        Guard(behind, run_dir)


def test_the_folder_comes_from_the_environment(run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MISTRALCTL_RUN_DIR", str(run_dir))
    assert ask(Guard(behind), "GET", "/v1/models", BEARER)[0] == 200
