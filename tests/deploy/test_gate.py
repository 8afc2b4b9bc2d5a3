"""The gate's two walks over HTTP, against a real application behind the real guard."""

from __future__ import annotations

import http.client
import http.server
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
from mistral_contract import routes
from mistral_node import gate as node_gate
from mistral_node.client import Client
from mistral_node.contract import Code, LaunchError
from mistral_node.guard import Guard, routes_of
from mistral_node.traffic import Traffic
from mistralctl import gate, keys, readiness, state
from mistralctl.errors import Exit, UserError
from mistralctl.phases import PhaseEvent
from mistralctl.state import Record

NAME, NODE_KEY = "gated", "node-0123456789abcdef"


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
    monkeypatch.setenv("MISTRALCTL_NODE_KEY", contract_keys.digest(NODE_KEY))
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
        listening = socket.create_server(("127.0.0.1", 0))
        port = int(listening.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.02)
        return Record(NAME, "local", "starting", "m", "m", port, str(run_dir.parent.parent.parent), "id", 0.0)

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(300)


def on_the_node(record: Record, run_dir: Path) -> routes.Report:
    """The launcher's part: its walk, and then it opens."""
    report = node_gate.pass_through(Client(f"http://127.0.0.1:{record.port}", NODE_KEY), run_dir.parent, run_dir)
    Traffic(run_dir).open()
    return report


def from_outside(record: Record) -> tuple[Record, str, list[PhaseEvent]]:
    """The laptop's part."""
    events: list[PhaseEvent] = []
    done, answer = gate.pass_through(record, events.append)
    return done, answer, events


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
    report = on_the_node(record, run_dir)
    assert routes.read((run_dir.parent / "gate.json").read_text()) == report
    done, answer, events = from_outside(record)
    assert answer == " Paris"
    assert [(event.phase, event.event) for event in events] == [("outside", "start"), ("outside", "end")]
    assert done.gate == report.summary()
    assert done.gate["let_in"] == {
        "GET /health": [200, 200, 200], "GET /v1/models": [401, 401, 200], "POST /v1/completions": [401, 401, 400],
        "POST /v1/chat/completions": [401, 401, 400],
    }  # fmt: skip
    assert done.gate["routes"] == len(list(routes_of(application())))
    lines = (state.folder(NAME) / "gate.txt").read_text().splitlines()
    assert len(lines) - 1 == done.gate["requests"] / 3
    assert [line.split() for line in lines if "/metrics" in line] == [
        [method, path, "401", "401", "404"]
        for method, path in [("OPTIONS", "/metrics"), ("GET", "/metrics"), ("POST", "/metrics"), ("GET", "/metrics/x"), ("POST", "/metrics/x")]
    ]  # fmt: skip
    assert ["WEBSOCKET", "/v1/realtime", "403", "403", "403"] in [line.split() for line in lines]
    assert Traffic(run_dir).read().served == 3  # two empty bodies and a question of the laptop's: the node's walk is no traffic


HOLES = [(("GET", "/version"), "/version"), (("DELETE", "/sub/deep"), "/sub/deep"), (("GET", "/metrics"), "/metrics")]


@pytest.mark.parametrize(("way", "path"), HOLES)
def test_an_open_route_is_caught_on_the_node_before_anybody_is_let_in(
    way: tuple[str, str], path: str, serve: Callable[[FastAPI], Record], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "OPEN", routes.OPEN | {way})
    with pytest.raises(LaunchError, match=f"the gate found open what should be shut .{way[0]} {path} answered ") as caught:
        on_the_node(serve(application()), run_dir)
    assert caught.value.code is Code.GATE
    assert not Traffic(run_dir).is_open
    assert not [row for row in routes.read((run_dir.parent / "gate.json").read_text()).rows if not row.right and row.path != path]


@pytest.mark.parametrize(("way", "path"), HOLES)
def test_a_route_that_is_open_from_outside_alone_is_caught_by_the_laptop(
    way: tuple[str, str], path: str, serve: Callable[[FastAPI], Record], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = serve(application())
    on_the_node(record, run_dir)
    monkeypatch.setattr(guard_module, "OPEN", routes.OPEN | {way})
    with pytest.raises(UserError, match=f"the gate found open what should be shut .{way[0]} {path} ") as caught:
        from_outside(record)
    assert caught.value.code == Exit.SERVER
    assert f"{path}" in caught.value.details
    assert "<- not on the short list" in caught.value.details


def test_an_answer_that_is_another_one_from_outside_is_an_error(serve: Callable[[FastAPI], Record], run_dir: Path) -> None:
    record = serve(application())
    on_the_node(record, run_dir)
    file = run_dir.parent / "gate.json"
    file.write_text(file.read_text().replace("400", "422"))
    with pytest.raises(UserError, match="answers otherwise from here than on its node") as caught:
        from_outside(record)
    assert caught.value.code == Exit.SERVER
    assert "POST      /v1/completions" in caught.value.details


def test_a_route_that_is_open_with_the_key_and_a_websocket_that_opens_are_caught(
    serve: Callable[[FastAPI], Record], run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard_module, "WITH_KEY", routes.WITH_KEY | {("GET", "/v1/responses/x")})

    class Careless(Guard):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket":
                await self.app(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)

    monkeypatch.setattr("test_gate.Guard", Careless)
    with pytest.raises(LaunchError):
        on_the_node(serve(application()), run_dir)
    rows = {tuple(line.split()[:2]): line.split()[2:5] for line in capsys.readouterr().out.splitlines()}
    assert rows["GET", "/v1/responses/x"] == ["401", "401", "200"]
    assert rows["WEBSOCKET", "/v1/realtime"] == ["101", "101", "101"]


def test_it_is_closed_to_everybody_else_until_the_node_has_walked(serve: Callable[[FastAPI], Record], run_dir: Path) -> None:
    import httpx

    record = serve(application())
    url, bearer = f"http://127.0.0.1:{record.port}", {"Authorization": f"Bearer {state.api_key(NAME)}"}
    for headers in ({}, bearer, bearer | {"x-mistralctl-probe": state.api_key(NAME)}):
        for path in ("/health", "/v1/models", "/metrics"):
            assert httpx.get(url + path, headers=headers, timeout=300).status_code == 503
    assert readiness.reached(record)
    assert not readiness.answers(record)
    on_the_node(record, run_dir)
    assert httpx.get(f"{url}/health", timeout=300).status_code == 200
    assert readiness.answers(record)
    for node in (
        {"Authorization": f"Bearer {NODE_KEY}"},
        {"Authorization": f"Bearer {NODE_KEY}", "x-mistralctl-probe": NODE_KEY},
    ):
        assert httpx.get(f"{url}/v1/models", headers=node, timeout=300).status_code == 401  # it opened the door, and is no key


@pytest.mark.parametrize(
    "said", ["", "{}", "[{}]", "[]", '[{"path": "X", "methods": []}]', '[{"path": "/other", "methods": ["GET"]}]']
)
def test_routes_that_cannot_be_read_stop_it(said: str, run_dir: Path) -> None:
    (run_dir / "routes.json").write_text(said)
    with pytest.raises(LaunchError) as caught:
        node_gate.pass_through(Client("http://127.0.0.1:9", NODE_KEY), run_dir.parent, run_dir)
    assert caught.value.code is Code.GATE


@pytest.mark.parametrize("report", ["", "[]", '{"routes": 1, "rows": [{"method": "GET"}]}'])
def test_a_node_without_a_report_stops_it(report: str, run_dir: Path) -> None:
    (run_dir.parent / "gate.json").write_text(report)
    record = Record(NAME, "local", "starting", "m", "m", 1, str(run_dir.parent.parent.parent), "id", 0.0)
    with pytest.raises(UserError, match="did not say which routes it has walked") as caught:
        gate.pass_through(record, lambda event: None)
    assert caught.value.code == Exit.SERVER


def test_a_server_that_stops_answering_is_named_on_both_sides(run_dir: Path) -> None:
    (run_dir / "routes.json").write_text('[{"path": "/health", "methods": ["GET"]}]')
    with pytest.raises(LaunchError, match="stopped answering the gate's probe"):
        node_gate.pass_through(Client("http://127.0.0.1:9", NODE_KEY), run_dir.parent, run_dir)
    (run_dir.parent / "gate.json").write_text(routes.Report(1, (routes.Row("GET", "/health", (200, 200, 200)),)).text())
    record = Record(NAME, "local", "starting", "m", "m", 9, str(run_dir.parent.parent.parent), "id", 0.0)
    with pytest.raises(UserError, match="stopped answering the gate's probe") as caught:
        gate.pass_through(record, lambda event: None)
    assert caught.value.code == Exit.NETWORK


class OneAnswer(http.server.BaseHTTPRequestHandler):
    """Answers the first request of a connection, and closes it without a word when the next has come."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if getattr(self, "answered", False):
            self.close_connection = True
            return
        self.answered = True
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_connection_belongs_to_one_thread_and_may_be_closed_at_any_time() -> None:
    users: dict[int, set[int]] = {}

    class Noted(http.client.HTTPConnection):
        def request(self, *arguments: Any, **options: Any) -> None:
            users.setdefault(id(self), set()).add(threading.get_ident())
            super().request(*arguments, **options)

    kept: list[Noted] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneAnswer) as server:
        threading.Thread(target=server.serve_forever).start()

        def connect() -> Noted:
            kept.append(Noted("127.0.0.1", server.server_address[1], timeout=300))
            return kept[-1]

        asked = [("GET", f"/{number}") for number in range(50)]
        try:
            rows = routes.walk(connect, asked, "key")
        finally:
            server.shutdown()
    assert [(row.method, row.path, row.answers) for row in rows] == [("GET", path, (401, 401, 401)) for _, path in asked]
    assert len(users) == len(kept) == routes.AT_ONCE
    assert all(len(threads) == 1 for threads in users.values())
