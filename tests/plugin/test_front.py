"""The bounded HTTP server below the guard: uvicorn as vLLM starts it, with an application of three routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from hostile import raw, request
from mistral_contract import files
from mistral_node import front, tls
from mistral_node.connections import HELD, MOST_PIPELINED, Held
from mistral_node.guard import LARGEST_BODY
from mistral_node.traffic import Traffic
from nodes import KEY, free_port, write_keys
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

HEAD = request("POST", "/v1/completions", b"Transfer-Encoding: chunked")
ASK_STREAM, STREAM = b'{"prompt": "stream"}', 600_000
ASK_BIG = b'{"prompt": "big"}'
BIG = 32 << 20  # of an answer: more than any socket keeps
_held: list[Held] = []


def body(size: int) -> bytes:
    """A completion's body of so many bytes."""
    return b'{"prompt": "%b"}' % (b"x" * (size - 14))


@contextlib.contextmanager
def serving(run_dir: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[int]:
    """Such a server, that waits so long for a request; its port."""
    monkeypatch.setattr(front, "HEAD_SECONDS", seconds)
    monkeypatch.setattr("mistral_node.guard.BODY_SECONDS", seconds)
    Traffic(run_dir, fresh=True).open()
    app = FastAPI()
    app.add_api_route("/health", lambda: None)

    async def models(request: Request) -> dict[str, str]:
        return dict(request.headers)

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(STREAM // 1000):
            yield b"x" * 1000
        await asyncio.Event().wait()  # as if the engine went on

    async def size(request: Request) -> Response:
        asked = await request.body()
        if asked == ASK_STREAM:
            return StreamingResponse(stream())
        return Response(b"x" * BIG) if asked == ASK_BIG else Response(json.dumps({"size": len(asked)}))

    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/completions", size, methods=["POST"])
    app.add_middleware(front.Guard, run_dir=run_dir)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_keep_alive=int(2 * seconds)))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    assert server.config.http_protocol_class is front.BoundedProtocol
    _held.append(server.lifespan.state[HELD])
    yield port
    server.should_exit = True
    thread.join(300)


@pytest.fixture
def patient() -> None:
    """The server of this test waits longer than a busy machine takes, where the others wait for a second."""


def waits(request: pytest.FixtureRequest) -> float:
    return 300.0 if "patient" in request.fixturenames else 1.0


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(write_keys(tmp_path), monkeypatch, waits(request)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def secure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[tuple[int, ssl.SSLContext]]:
    """The same with TLS, and what to trust."""
    run_dir = write_keys(tmp_path)
    private, certificate = tls.self_signed(["127.0.0.1"])
    (run_dir / files.PRIVATE_KEY.name).write_text(private)
    (run_dir / files.CERTIFICATE.name).write_text(certificate)
    monkeypatch.setenv("MISTRALCTL_TLS", "self-signed")
    with serving(run_dir, monkeypatch, waits(request)) as port:
        yield port, tls.trusting(certificate)


def test_ordinary_requests_share_a_connection_also_when_it_rests(url: str, patient: None) -> None:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as client:
        for size in (20, 1 << 20, 8 << 20):
            assert client.post("/v1/completions", content=body(size)).json() == {"size": size}
            assert client.get("/health").status_code == 200
        time.sleep(1.5)
        pieces = [body(15000)[at : at + 3] for at in range(0, 15000, 3)]
        assert client.post("/v1/completions", content=iter(pieces)).json() == {"size": 15000}


def test_a_body_in_chunks_of_one_byte_is_taken(url: str, patient: None) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body(60000))
    assert raw(url, [HEAD, chunks, b"0\r\n\r\n"]) == 200


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /health HTTP/1.1\r\nHost: x\r\n", *[b"X: " + b"v" * 60000 + b"\r\n"] * 100],
        [b"GET /health HTTP/1.1\r\nX: ", *[b"v" * 65536] * 100],
        [b"GET /" + b"v" * 65536, *[b"v" * 65536] * 100],
        [HEAD + b"0\r\n", *[b"T: " + b"v" * 60000 + b"\r\n"] * 100],
        [HEAD + b"1;", *[b"e" * 65536] * 100],
    ],
    ids=["many headers", "one header", "a path", "trailers", "an extension of a chunk"],
)
def test_what_never_ends_is_cut_off(pieces: list[bytes], url: str) -> None:
    sent = 0

    def counted() -> Iterator[bytes]:
        nonlocal sent
        for piece in pieces:
            sent += len(piece)
            yield piece

    assert raw(url, counted(), pause=0.02) in ("closed", 400, 413, 414, 431)
    assert sent < 3 << 20, "it took it all"
    assert httpx.get(f"{url}/health", timeout=300).status_code == 200


def test_too_large_a_body_is_cut_off(url: str, patient: None) -> None:
    piece = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
    assert raw(url, [HEAD, *[piece] * (LARGEST_BODY // (1 << 20) + 1)]) in ("closed", 413)
    assert raw(url, [request("POST", "/v1/completions", b"Content-Length: %d" % (LARGEST_BODY + 1))]) == 413


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        ([b""], "closed"), ([b"GET /health HTTP/1.1\r\nX: ", *[b"v"] * 20], "closed"),
        ([request("POST", "/v1/completions", b"Content-Length: 1000"), *[b"x"] * 20], 408),
        ([request("GET", "/health") + b"GET /health HTTP/1.1\r\n", *[b"v"] * 20], 200),
    ],
    ids=["nothing", "a slow head", "a slow body", "a slow head after a whole request"],
)  # fmt: skip
def test_what_comes_too_slowly_is_not_waited_for(pieces: list[bytes], answer: int | str, url: str) -> None:
    assert raw(url, pieces, pause=0.2, wait=60) == answer


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Held:
    """What the server of this test says of its connections."""
    request.getfixturevalue("secure" if "secure" in request.fixturenames else "url")
    return _held[-1]


def connected(url: str, said: bytes = b"") -> socket.socket:
    wire = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 300)
    wire.sendall(said)
    return wire


def until(true: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def answer(wire: socket.socket) -> bytes:
    """All that a server says until it hangs up."""
    said = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while block := wire.recv(65536):
            said += block
    return bytes(said)


LONG = b"GET /?" + b"q" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: bWlzdHJhbGN0bC1wcm9iZQ==",
)
REFUSED = {
    "no key": (request("POST", "/v1/completions", b"Content-Length: 9999999", key="wrong"), 401),
    "no key, in chunks": (request("POST", "/v1/completions", b"Transfer-Encoding: chunked", key="wrong") + b"5\r\nab", 401),
    "no such route": (request("POST", "/nothing", b"Content-Length: 9999999"), 404),
    "a head request": (request("HEAD", "/health"), 404),
    "options": (request("OPTIONS", "/v1/models", b"Origin: http://x", key="wrong"), 401),
    "a length that is none": (request("POST", "/v1/completions", b"Content-Length: x"), 400),
    "too large": (request("POST", "/v1/completions", b"Content-Length: %d" % (LARGEST_BODY + 1)), 413),
    "too large a head": (request("GET", "/health", *[b"X-%d: y" % n for n in range(100)]), 431),
    "too long a path": (LONG, 414),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a websocket": (request("GET", "/v1/realtime", *UPGRADE), 403),
    "HTTP/1.0": (b"GET /v1/models HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 401),
    "connect": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "one of many": (request("GET", "/v1/models", key="wrong") * 5, 401),
}


@pytest.mark.parametrize("what", REFUSED)
def test_after_a_refusal_nothing_more_is_read_and_the_connection_ends(what: str, url: str, server: Held) -> None:
    """Whatever comes behind it: one byte was enough to keep the connection for ever, and 15 GB of a refused body were read."""
    said, status = REFUSED[what]
    before = server.refused[str(status)]
    with connected(url, said) as wire:
        wire.settimeout(300)
        until(lambda: server.refused[str(status)] > before)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 64 << 20:
                sent += wire.send(b"x" * 65536)
        assert sent < 16 << 20, "it read on"
        head, _, rest = answer(wire).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in head.lower()
        assert b"HTTP/1.1" not in rest, "it answered a second time"
    until(lambda: not len(server))


def test_a_connection_that_rests_is_closed_whatever_comes(url: str, server: Held) -> None:
    with contextlib.ExitStack() as stack:
        for first in (
            request("GET", "/v1/models", key="wrong"),
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
            request("GET", "/v1/models"),
        ):
            for more in (b"", b"x", b"\r\n", b"\r\n\r\n\r\n", b"5\r\nab", b"GET /hea"):
                wire = stack.enter_context(connected(url, first))
                assert wire.recv(65536).startswith(b"HTTP/1.1 ")
                with contextlib.suppress(OSError):
                    wire.sendall(more)
        until(lambda: not len(server))


@pytest.mark.parametrize("first", [request("GET", "/health"), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["key", "no key"])
def test_a_body_that_no_route_reads_is_not_read_after_the_answer(first: bytes, url: str, server: Held) -> None:
    with connected(url, first[:-2] + b"Content-Length: 9999999999\r\n\r\n") as wire:
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 64 << 20:
                sent += wire.send(b"x" * 65536)
        assert sent < 16 << 20
    until(lambda: not len(server))


def test_a_bearer_in_a_trailer_is_none(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n"
    assert raw(url, [head + b"1\r\nx\r\n0\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n"]) == 401


def test_requests_that_do_not_wait_for_answers_are_few(url: str) -> None:
    with connected(url, request("GET", "/health") * 4) as wire:
        until(lambda: wire.recv(1 << 20, socket.MSG_PEEK).count(b"200 OK") == 4)
    with connected(url, request("GET", "/health") * 5000) as wire:
        assert answer(wire).count(b"HTTP/1.1 200") <= MOST_PIPELINED + 1


def test_the_oldest_strangers_go_and_whoever_asks_is_answered(
    url: str, server: Held, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_strangers", 50)
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300))
        assert good.get("/v1/models").status_code == 200
        wires = [stack.enter_context(connected(url)) for _ in range(200)]
        until(lambda: server.refused["too many connections"] >= 150)
        assert len(server) <= 51
        assert httpx.get(f"{url}/health", timeout=300).status_code == 200
        assert wires[0].recv(1) == b""  # the first has gone
        wires[-1].sendall(request("GET", "/health"))  # the last has not
        assert wires[-1].recv(100).startswith(b"HTTP/1.1 200")
        assert good.get("/v1/models").status_code == 200  # nor who has shown a key


def test_an_answer_that_nobody_reads_ends(url: str, server: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "STALLED_SECONDS", 0.5)
    for close in (b"", b"Connection: close"):
        said = request("POST", "/v1/completions", b"Content-Length: %d" % len(ASK_BIG), *filter(None, [close]), body=ASK_BIG)
        with connected(url) as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.sendall(said)
            until(lambda: server.refused["an answer that was not read"] > 0)
        until(lambda: not len(server))
        server.refused.clear()


def test_a_stream_that_nobody_reads_ends_before_the_kernel_has_kept_it_all(
    url: str, server: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "STALLED_SECONDS", 0.5)
    with connected(url, request("POST", "/v1/completions", b"Content-Length: %d" % len(ASK_STREAM), body=ASK_STREAM)):
        until(lambda: server.refused["an answer that was not read"] == 1)
    until(lambda: not len(server))


def test_a_large_answer_that_is_read_slowly_comes_as_a_whole(
    url: str, server: Held, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "LINGER_SECONDS", 0.1)
    said = request("POST", "/v1/completions", b"Content-Length: %d" % len(ASK_BIG), b"Connection: close", body=ASK_BIG)
    with connected(url, said) as wire:
        time.sleep(1.5)  # longer than it lingers
        assert len(answer(wire)) > BIG
    assert not server.refused["an answer that was not read"]


def test_what_steers_vllm_beside_the_body_does_not_reach_it(url: str) -> None:
    odd = {"X-VLLM-Priority": "9" * 5000, "X-Request-Priority": "x", "Priority": "1e99", "X-data-parallel-rank": "7", "X-Request-Id": "a\tb",
           "endpoint-load-metrics-format": "x", "Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}  # fmt: skip
    seen = httpx.get(f"{url}/v1/models", headers=odd, timeout=300).json()
    assert set(seen) <= {"accept", "content-type", "host", "user-agent"}
    assert seen["content-type"] == "application/json"
    assert httpx.get(f"{url}/v1/models", headers=odd | {"X-Request-Id": "mine-1"}, timeout=300).json()["x-request-id"] == "mine-1"


def test_refusals_are_counted_and_not_logged(url: str, server: Held, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").propagate = True
    before = server.refused.copy()
    for said, _ in REFUSED.values():
        raw(url, [said])
    assert server.refused - before == Counter(str(status) for _, status in REFUSED.values())
    assert not [record for record in caplog.records if record.name != "httpx"]
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=300).status_code == 200
    assert ["/v1/models" in record.getMessage() for record in caplog.records if record.name == "uvicorn.access"] == [True]
    usage = tmp_path / "shared" / "usage.json"
    until(lambda: json.loads(usage.read_text())["refused"] == dict(server.refused))


def test_a_handshake_that_does_not_end_is_not_waited_for(secure: tuple[int, ssl.SSLContext], server: Held) -> None:
    port, context = secure
    for said in (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), 300) as wire:
            wire.sendall(said)
            answer(wire)
        until(lambda: not len(server))
    with socket.create_connection(("127.0.0.1", port), 300) as plain, context.wrap_socket(plain) as wire:
        wire.sendall(request("GET", "/v1/models", key="wrong"))
        assert wire.recv(65536).startswith(b"HTTP/1.1 401")
        until(lambda: not len(server))


def test_ordinary_requests_pass_over_tls(secure: tuple[int, ssl.SSLContext], patient: None) -> None:
    port, context = secure
    with httpx.Client(
        base_url=f"https://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, verify=context, timeout=300
    ) as client:
        for size in (20, 1 << 20, 8 << 20):
            assert client.post("/v1/completions", content=body(size)).json() == {"size": size}
        assert len(client.post("/v1/completions", content=ASK_BIG).text) == BIG
        assert client.get("/nothing").status_code == 404
        assert client.get("/health").status_code == 200
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", port), 300) as plain, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(plain)


def test_a_connection_that_is_gone_when_its_answer_has_left_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transport has no socket any more."""

    class Gone:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    loop = asyncio.new_event_loop()
    one = front.BoundedProtocol(_loop=loop, app_state={})
    one._raw, one._inner, one._begun = Gone(), Gone(), True  # type: ignore[assignment]
    one.transport, one.flow = Gone(), Gone()  # type: ignore[assignment]
    one._linger()
    assert one._timer is not None
    loop.close()
