"""The bounded HTTP server below the guard: uvicorn as vLLM starts it, with an application of two routes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from hostile import raw, request
from mistral_node import front
from mistral_node.guard import LARGEST_BODY
from mistral_node.traffic import Traffic
from nodes import KEY, free_port, write_keys
from starlette.requests import Request

HEAD = request("POST", "/v1/completions", b"Transfer-Encoding: chunked")


def body(size: int) -> bytes:
    """A completion's body of so many bytes."""
    return b'{"prompt": "%b"}' % (b"x" * (size - 14))


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(front, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr("mistral_node.guard.BODY_SECONDS", 1.0)
    run_dir = write_keys(tmp_path)
    Traffic(run_dir, fresh=True).open()
    app = FastAPI()
    app.add_api_route("/health", lambda: None)

    async def size(request: Request) -> dict[str, int]:
        return {"size": len(await request.body())}

    app.add_api_route("/v1/completions", size, methods=["POST"])
    app.add_middleware(front.Guard, run_dir=run_dir)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    assert server.config.http_protocol_class is front.BoundedProtocol
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def test_ordinary_requests_share_a_connection_also_when_it_rests(url: str) -> None:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        for size in (20, 1 << 20, 8 << 20):
            assert client.post("/v1/completions", content=body(size)).json() == {"size": size}
            assert client.get("/health").status_code == 200
        time.sleep(1.5)
        pieces = [body(15000)[at : at + 3] for at in range(0, 15000, 3)]
        assert client.post("/v1/completions", content=iter(pieces)).json() == {"size": 15000}


def test_a_body_in_chunks_of_one_byte_is_taken(url: str) -> None:
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

    assert raw(url, counted(), pause=0.02) in ("closed", 400, 413, 431)
    assert sent < 3 << 20, "it took it all"
    assert httpx.get(f"{url}/health").status_code == 200


def test_too_large_a_body_is_cut_off(url: str) -> None:
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
    began = time.monotonic()
    assert raw(url, pieces, pause=0.2, wait=5) == answer
    assert time.monotonic() - began < 5
