"""The gate's probe over HTTP, against a real application behind the real guard."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mistral_node.guard as guard_module
import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, WebSocket
from mistral_contract import keys as contract_keys
from mistral_node.guard import Guard, routes_of
from mistral_node.traffic import Traffic
from mistralctl import connection, gate, keys, state
from mistralctl.errors import Exit, UserError
from mistralctl.phases import PhaseEvent
from mistralctl.state import Record

NAME = "gated"


async def mounted(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def application() -> FastAPI:
    """What vLLM's is made of: routes, a router with a parameter, a websocket, a mounted application, one with routes of its own."""
    app, router, inner = FastAPI(), APIRouter(prefix="/v1"), FastAPI(openapi_url=None)
    app.add_api_route("/health", lambda: None)
    app.add_api_route("/version", lambda: {"version": "0.32.0"})
    router.add_api_route("/models", lambda: {"data": []})

    def completions(prompt: str = "", model: str = "") -> dict[str, Any]:
        return {"choices": [{"text": " Paris"}]}

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        return completions()

    router.add_api_route("/completions", ask, methods=["POST"])
    router.add_api_route("/chat/completions", ask, methods=["POST"])
    router.add_api_route("/responses/{response_id}", lambda response_id: {"id": response_id})

    @router.websocket("/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()

    app.include_router(router)
    app.mount("/metrics", mounted)
    router.mount("/inside", mounted)
    inner.add_api_route("/deep", lambda: "deep", methods=["GET", "DELETE"])
    app.mount("/sub", inner)
    return app


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MISTRALCTL_GATE", "probe")
    folder = tmp_path / "node" / "run" / NAME / "shared"
    folder.mkdir(parents=True)
    keys.prepare(NAME, None, running=False)
    contract_keys.write(folder.parent / "keys" / "keys.json", keys.known(NAME))
    Traffic(folder, fresh=True)
    return folder


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Callable[[FastAPI], Record]]:
    """Serves an application on a port of its own; the record by which the laptop knows it."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> Record:
        app.add_middleware(Guard, run_dir=run_dir)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.02)
        return Record(NAME, "local", "starting", "m", "m", port, str(run_dir.parent.parent.parent), "id", 0.0)

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def through(record: Record, run_dir: Path) -> tuple[Record, str, list[PhaseEvent]]:
    """As the laptop does it, with a launcher that takes its word at once."""
    events: list[PhaseEvent] = []
    over = threading.Event()

    def launcher() -> None:
        while not over.wait(0.05):
            if (run_dir.parent / "passed").exists():
                Traffic(run_dir).open()

    thread = threading.Thread(target=launcher)
    thread.start()
    try:
        report = gate.look(record, events.append)
        done = gate.let_in(record, report, events.append)
    finally:
        over.set()
        thread.join()
    return done, report.answer, events


def test_every_route_is_found_mounts_and_what_is_in_them_included() -> None:
    found = list(routes_of(application()))
    assert {"path": "/metrics", "methods": ["*"]} in found
    assert {"path": "/sub", "methods": ["*"]} in found
    assert {"path": "/sub/deep", "methods": ["DELETE", "GET"]} in found
    assert {"path": "/v1/realtime", "methods": ["WEBSOCKET"]} in found
    assert {"path": "/v1/responses/{response_id}", "methods": ["GET"]} in found
    assert {"path": "/inside", "methods": ["*"]} in found
    assert {"path": "/openapi.json", "methods": ["GET", "HEAD"]} in found


def test_a_server_that_lets_in_only_the_short_list_passes(serve: Callable[[FastAPI], Record], run_dir: Path) -> None:
    record = serve(application())
    done, answer, events = through(record, run_dir)
    assert answer == " Paris"
    assert [(event.phase, event.event) for event in events] == [("gate", "start"), ("gate", "end")]
    assert done.gate["let_in"] == {
        "GET /health": [200, 200, 200], "GET /v1/models": [401, 401, 200], "POST /v1/completions": [401, 401, 422],
        "POST /v1/chat/completions": [401, 401, 422],
    }  # fmt: skip
    assert done.gate["routes"] == len(list(routes_of(application())))
    lines = (state.folder(NAME) / "gate.txt").read_text().splitlines()
    assert len(lines) - 1 == done.gate["requests"] / 3
    assert [line.split() for line in lines if "/metrics" in line] == [
        [method, path, "401", "401", "404"]
        for method, path in [("OPTIONS", "/metrics"), ("GET", "/metrics"), ("POST", "/metrics"), ("GET", "/metrics/x"), ("POST", "/metrics/x")]
    ]  # fmt: skip
    assert ["WEBSOCKET", "/v1/realtime", "403", "403", "403"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("way", "path"),
    [(("GET", "/version"), "/version"), (("DELETE", "/sub/deep"), "/sub/deep"), (("GET", "/metrics"), "/metrics")],
)
def test_an_open_route_is_caught(
    way: tuple[str, str], path: str, serve: Callable[[FastAPI], Record], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "OPEN", guard_module.OPEN | {way})
    record = serve(application())
    with pytest.raises(UserError, match=f"the gate found open what should be shut .{way[0]} {path}") as caught:
        through(record, run_dir)
    assert caught.value.code == Exit.SERVER
    assert f"{path}" in caught.value.details
    assert "<- not on the short list" in caught.value.details
    assert not Traffic(run_dir).is_open


def test_a_route_that_is_open_with_the_key_and_a_websocket_that_opens_are_caught(
    serve: Callable[[FastAPI], Record], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "WITH_KEY", guard_module.WITH_KEY | {("GET", "/v1/responses/x")})

    class Careless(Guard):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket":
                await self.app(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)

    monkeypatch.setattr("test_gate.Guard", Careless)
    record = serve(application())
    with pytest.raises(UserError) as caught:
        through(record, run_dir)
    rows = {tuple(line.split()[:2]): line.split()[2:5] for line in caught.value.details.splitlines()}
    assert rows["GET", "/v1/responses/x"] == ["401", "401", "200"]
    assert rows["WEBSOCKET", "/v1/realtime"] == ["101", "101", "101"]


def test_it_is_closed_to_everybody_else_until_it_was_passed(serve: Callable[[FastAPI], Record], run_dir: Path) -> None:
    import httpx

    record = serve(application())
    url, bearer = f"http://127.0.0.1:{record.port}", {"Authorization": f"Bearer {state.api_key(NAME)}"}
    for headers in ({}, bearer, bearer | {connection.PROBE_HEADER: "0" * 64}):
        for path in ("/health", "/v1/models", "/metrics"):
            assert httpx.get(url + path, headers=headers).status_code == 503
    through(record, run_dir)
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/v1/models", headers=bearer).status_code == 200
    token = {connection.PROBE_HEADER: contract_keys.probe_token(state.api_key(NAME))}
    assert httpx.get(f"{url}/v1/models", headers=token).status_code == 401  # it opened the door, and is no key


@pytest.mark.parametrize(
    "routes", ["", "{}", "[{}]", "[]", '[{"path": "X", "methods": []}]', '[{"path": "/other", "methods": ["GET"]}]']
)
def test_routes_that_cannot_be_read_stop_it(routes: str, run_dir: Path) -> None:
    record = Record(NAME, "local", "starting", "m", "m", 1, "/node", "id", 0.0)
    with pytest.raises(UserError) as caught:
        gate.walk(record, routes)
    assert caught.value.code == Exit.SERVER
