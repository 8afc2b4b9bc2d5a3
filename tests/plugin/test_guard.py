"""The guard over the ASGI interface itself: what reaches the application behind it, and what does not."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mistral_contract import keys
from mistral_node.grammars import Busy, Verdict
from mistral_node.guard import LARGEST_BODY, WITH_KEY, Guard
from mistral_node.traffic import Traffic
from nodes import KEY, write_keys

ASKED = b'{"model": "tiny"}'
BEARER = (b"authorization", b"Bearer " + KEY.encode())
NODE_KEY = "node-0123456789abcdef"
PROBE, NODE_BEARER = (b"x-mistralctl-probe", NODE_KEY.encode()), (b"authorization", b"Bearer " + NODE_KEY.encode())
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
    return write_keys(tmp_path)


@pytest.fixture
def behind(run_dir: Path) -> Behind:
    traffic = Traffic(run_dir, fresh=True)
    traffic.open()
    return Behind(traffic)


@pytest.fixture
def closed(run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> Guard:
    """A guard before its launcher opens it, with `behind` behind it."""
    monkeypatch.setenv("MISTRALCTL_NODE_KEY", keys.digest(NODE_KEY))
    behind.traffic = Traffic(run_dir, fresh=True)
    return Guard(behind, run_dir)


@pytest.fixture
def guard(run_dir: Path, behind: Behind) -> Guard:
    return Guard(behind, run_dir)


def ask(
    app: Callable[[Any, Any, Any], Awaitable[None]], method: str, path: str, *headers: tuple[bytes, bytes],
    body: list[bytes] | None = None, kind: str = "http", client: tuple[str, int] | None = ("127.0.0.1", 5000),
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Status and JSON body of an answer."""
    parts = list(body or [ASKED])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers), "client": client}
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


@pytest.mark.parametrize("header", [b"Bearer %b", b"bearer %b", b"BEARER %b", b"bEaReR   %b", b" \tBearer %b\t ", b"Bearer %b "])
def test_the_scheme_has_no_case_and_spaces_around_do_not_count(header: bytes, guard: Guard) -> None:
    """RFC 9110: section 11.1, 11.4 (1*SP behind the scheme), 5.5 (white space around a value)."""
    assert ask(guard, "GET", "/v1/models", (b"Authorization", header % KEY.encode()))[0] == 200


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", KEY.encode(), b" " + KEY.encode(),
                                    b"Bearer " + KEY.encode() + b" x", b"Bearer " + KEY.encode()[:-1], b"\xff\xfe",
                                    b"Basic " + KEY.encode(), b"Bearer\t" + KEY.encode(), b"Bearer \t" + KEY.encode(),
                                    b"Bearer" + KEY.encode(), b"Bearer Bearer " + KEY.encode(), b"Bearer " + KEY.upper().encode(),
                                    b"Bearer " + KEY.encode() + b"\0", b'Bearer "' + KEY.encode() + b'"'])  # fmt: skip
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


def test_it_is_closed_to_all_but_the_launcher_until_it_is_opened(closed: Guard, behind: Behind) -> None:
    for headers in (
        [],
        [BEARER],
        [NODE_BEARER],
        [BEARER, (PROBE[0], b"wrong")],
        [BEARER, PROBE, PROBE],
        [BEARER, (PROBE[0], b"")],
    ):
        for path in ("/health", "/v1/models", "/metrics"):
            assert ask(closed, "GET", path, *headers)[0] == 503
    assert behind.reached == []
    assert ask(closed, "GET", "/health", PROBE)[0] == 200
    assert ask(closed, "GET", "/v1/models", PROBE)[0] == 401  # it opens nothing but the door
    for bearer in (BEARER, NODE_BEARER):
        assert ask(closed, "GET", "/metrics", PROBE, bearer)[0] == 404
        assert ask(closed, "GET", "/v1/models", PROBE, bearer)[0] == 200
    behind.traffic.open()
    assert ask(closed, "GET", "/v1/models", BEARER)[0] == 200
    assert ask(closed, "GET", "/v1/models", PROBE)[0] == 401


def test_the_launchers_key_is_of_no_use_from_elsewhere_or_once_it_is_open(closed: Guard, behind: Behind) -> None:
    for client in (("203.0.113.9", 1), ("::ffff:203.0.113.9", 1), None):
        assert ask(closed, "GET", "/v1/models", PROBE, NODE_BEARER, client=client)[0] == 503
    assert ask(closed, "GET", "/v1/models", PROBE, NODE_BEARER, client=("::1", 1))[0] == 200
    behind.traffic.open()
    for headers in ([NODE_BEARER], [PROBE, NODE_BEARER]):
        assert ask(closed, "GET", "/v1/models", *headers)[0] == 401
        assert ask(closed, "POST", "/v1/completions", *headers)[0] == 401


def test_what_the_launcher_asks_is_no_traffic(closed: Guard, behind: Behind) -> None:
    assert ask(closed, "POST", "/v1/completions", PROBE, NODE_BEARER)[0] == 200
    assert (behind.running, behind.traffic.read().served, behind.traffic.read().last_at) == ([0], 0, 0.0)
    assert closed.callers.accounts == {}


def test_without_a_launcher_it_stays_closed(run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MISTRALCTL_NODE_KEY", raising=False)
    Traffic(run_dir, fresh=True)
    for token in (b"", b"x"):
        assert ask(Guard(behind, run_dir), "GET", "/v1/models", (PROBE[0], token), BEARER)[0] == 503


@pytest.mark.parametrize(
    ("client", "status"),
    [(("203.0.113.9", 1), 200), (("203.0.114.9", 1), 403), (("2001:db8::5", 1), 200), (("2001:db9::5", 1), 403), (("127.0.0.1", 1), 403),
     (None, 403)],
)  # fmt: skip
def test_only_allowed_addresses_may_ask(
    client: tuple[str, int] | None, status: int, run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRALCTL_ALLOW", '["203.0.113.0/24", "2001:db8::/32"]')
    guard = Guard(behind, run_dir)
    for path in ("/health", "/v1/models"):
        assert ask(guard, "GET", path, BEARER, client=client)[0] == status
    Traffic(run_dir, fresh=True)  # while it is closed, the launcher asks from beside it
    monkeypatch.setenv("MISTRALCTL_NODE_KEY", keys.digest(NODE_KEY))
    beside = client is not None and client[0] == "127.0.0.1"
    expected = 200 if beside else 503 if status == 200 else 403
    assert ask(Guard(behind, run_dir), "GET", "/v1/models", BEARER, PROBE, client=client)[0] == expected


def test_a_body_that_does_not_come_is_not_waited_for(guard: Guard, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_node.guard.BODY_SECONDS", 0.2)
    sent: list[dict[str, Any]] = []
    given = [{"type": "http.request", "body": b"x", "more_body": True}]

    async def receive() -> dict[str, Any]:
        if not given:
            await asyncio.sleep(60)
        return given.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [BEARER], "client": ("127.0.0.1", 1)}
    asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert behind.traffic.read().running == 0


def test_a_body_that_is_too_large_does_not_reach_the_application(guard: Guard, behind: Behind) -> None:
    assert ask(guard, "POST", "/v1/completions", BEARER, body=[bytes(LARGEST_BODY), b"x"])[0] == 413
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
    whole = b'{"prompt": "%b"}' % (b"x" * (LARGEST_BODY - 14))
    pieces = [whole[at : at + (1 << 20)] for at in range(0, len(whole), 1 << 20)]
    assert ask(guard, "POST", "/v1/completions", BEARER, body=pieces)[0] == 200
    assert ask(guard, "POST", "/v1/completions", BEARER, body=[*pieces, b" "])[0] == 413


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


def test_keys_that_are_missing_or_damaged_stop_the_server_from_starting(run_dir: Path, behind: Behind) -> None:
    file = run_dir.parent / "keys" / "keys.json"
    file.write_text('{"version": 1}')
    with pytest.raises(ValueError, match="should be an object with version, serial and keys"):
        Guard(behind, run_dir)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        Guard(behind, run_dir)


def test_the_folder_comes_from_the_environment(run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MISTRALCTL_RUN_DIR", str(run_dir))
    assert ask(Guard(behind), "GET", "/v1/models", BEARER)[0] == 200


def test_a_body_that_asks_too_much_is_refused_by_the_name_of_its_field(guard: Guard, behind: Behind) -> None:
    status, answer = ask(guard, "POST", "/v1/completions", BEARER, body=[b'{"prompt": "a", ', b'"n": 16384}'])
    assert (status, behind.reached) == (400, [])
    assert answer == {
        "error": {
            "message": "n should be a whole number from 1 to 192",
            "type": "invalid_request_error",
            "param": "n",
            "code": 400,
        }
    }


def test_a_long_body_is_judged_beside_the_loop(guard: Guard, behind: Behind) -> None:
    long = b'{"prompt": "%b", "n": 7%b}'
    assert ask(guard, "POST", "/v1/completions", BEARER, body=[long % (b"x" * 100_000, b"")])[0] == 200
    assert ask(guard, "POST", "/v1/completions", BEARER, body=[long % (b"x" * 100_000, b"777")])[0] == 400
    assert len(behind.reached) == 1


def test_the_largest_body_follows_from_the_longest_prompt(run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_MAX_MODEL_LEN", "1000")
    guard, largest = Guard(behind, run_dir), 32 * 1000 + (256 << 10)
    fits = b'{"prompt": "%b"}' % (b"x" * (largest - 14))
    assert ask(guard, "POST", "/v1/completions", BEARER, body=[fits])[0] == 200
    assert ask(guard, "POST", "/v1/completions", BEARER, body=[fits + b" "])[0] == 413
    assert ask(guard, "POST", "/v1/completions", BEARER, (b"content-length", str(largest + 1).encode()))[0] == 413


async def settled() -> None:
    """Waits until nobody has anything to do but to wait."""
    for _ in range(300):
        await asyncio.sleep(0)


class Holding(Behind):
    """An application that answers when it is told."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__(traffic)
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        self.reached.append((scope["method"], scope["path"]))
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def asked(guard: Guard, gone: asyncio.Event | None = None) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of a completion; its client stays until it is `gone`."""
    sent: list[Any] = []
    given = [{"type": "http.request", "body": ASKED, "more_body": False}]

    async def receive() -> Any:
        if not given:
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        return given.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [BEARER], "client": ("127.0.0.1", 1)}
    await guard(scope, receive, send)  # type: ignore[arg-type]
    return (sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]) if sent else (0, {}, b"")


def test_when_the_queue_is_full_others_are_told_to_come_again(
    run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRALCTL_MAX_NUM_SEQS", "4")

    async def run() -> None:
        guard = Guard(holding := Holding(behind.traffic), run_dir)
        others = [asyncio.create_task(asked(guard)) for _ in range(5 + 3 * 4)]
        await settled()
        assert len(holding.reached) == 5
        status, headers, body = await asked(guard)
        assert (status, headers[b"retry-after"]) == (429, b"2")
        assert json.loads(body)["error"]["type"] == "rate_limit_exceeded"
        holding.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*others)] == [200] * 17
        assert (await asked(guard))[0] == 200
        assert behind.traffic.read().running == 0

    asyncio.run(run())


def test_a_client_that_goes_while_it_waits_is_not_served(run_dir: Path, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_MAX_NUM_SEQS", "1")

    async def run() -> None:
        guard, gone = Guard(holding := Holding(behind.traffic), run_dir), asyncio.Event()
        served = [asyncio.create_task(asked(guard)) for _ in range(2)]
        await settled()
        waiting = asyncio.create_task(asked(guard, gone))
        await settled()
        gone.set()
        assert (await waiting)[0] == 0
        holding.go_on.set()
        await asyncio.gather(*served)
        assert len(holding.reached) == 2

    asyncio.run(run())


def test_the_engine_is_asked_for_a_token_while_nobody_else_is(
    guard: Guard, behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_node.pulse.SECONDS", 0.01)
    bodies: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
            while len(bodies) < 3:
                await asyncio.sleep(0.01)
        else:
            bodies.append(json.loads((await receive())["body"]))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})

    async def nowhere(message: Any) -> None:
        pass

    guard.app = app
    asyncio.run(guard({"type": "lifespan"}, None, nowhere))  # type: ignore[arg-type]
    assert behind.traffic.beats == len(bodies) >= 3
    assert bodies[0] == {"prompt": [1], "max_tokens": 1, "temperature": 0}
    assert (behind.traffic.read().served, behind.traffic.read().last_at, guard.callers.accounts) == (0, 0.0, {})


def test_an_answer_of_the_engine_is_a_sign_of_life_and_an_error_is_none(guard: Guard, behind: Behind) -> None:
    assert ask(guard, "POST", "/v1/completions", BEARER)[0] == 200
    assert behind.traffic.beats == 1
    ask(guard, "GET", "/v1/models", BEARER)
    ask(guard, "GET", "/health")
    assert behind.traffic.beats == 1


@pytest.mark.parametrize(
    ("verdict", "status"), [(Verdict.GOOD, 200), (Verdict.WRONG, 200), (Verdict.SLOW, 400), (Verdict.EMPTY, 400), (Busy(), 429)]
)
def test_a_grammar_is_tried_before_the_engine_sees_it(verdict: Any, status: int, guard: Guard, behind: Behind) -> None:
    tried: list[tuple[str, str]] = []

    async def judge(key: str, kind: str, text: str) -> Verdict:
        tried.append((kind, text))
        if isinstance(verdict, Exception):
            raise verdict
        return Verdict(verdict)

    guard.grammars.verdict = judge  # type: ignore[method-assign]
    found, answer = ask(
        guard, "POST", "/v1/completions", BEARER, body=[b'{"prompt": "a", "structured_outputs": {"regex": "(a+)+"}}']
    )
    assert (found, tried) == (status, [("regex", "(a+)+")])
    assert len(behind.reached) == (status == 200)
    if verdict is Verdict.SLOW:
        assert answer["error"]["param"] == "response_format or structured_outputs"
        assert answer["error"]["message"].startswith("a grammar of this regex of 5 characters takes more than ")
    assert ask(guard, "POST", "/v1/completions", BEARER)[0] == 200
    assert len(tried) == 1


@pytest.mark.parametrize(("backend", "tried"), [("xgrammar", []), ("guidance", ["tools"])])
def test_tools_that_may_be_called_are_tried_where_vllm_makes_a_grammar_of_them(
    backend: str, tried: list[str], guard: Guard, behind: Behind
) -> None:
    found: list[str] = []

    async def judge(key: str, kind: str, text: str) -> Verdict:
        found.append(kind)
        return Verdict.SLOW

    guard.grammars.verdict = judge  # type: ignore[method-assign]
    guard._application = SimpleNamespace(
        state=SimpleNamespace(vllm_config=SimpleNamespace(structured_outputs_config=SimpleNamespace(backend=backend)))
    )
    body = {"messages": [], "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}
    status = ask(guard, "POST", "/v1/chat/completions", BEARER, body=[json.dumps(body).encode()])[0]
    assert (status, found) == (400 if tried else 200, tried)
