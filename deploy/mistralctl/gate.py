"""The gate: before `up` says ready it asks, from outside, for every route that the running application has, and lets nothing pass
that is not on the short list."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mistral_contract import files

from mistralctl import connection, readiness, runtime, state
from mistralctl.errors import Exit, UserError
from mistralctl.phases import PhaseEvent
from mistralctl.state import Record

Answers = tuple[int, int, int]
OnPhase = Callable[[PhaseEvent], None]

CALLERS = ("no key", "wrong key", "right key")
WRONG_KEY = "mctl-0000000000000000000000000000000000000000000"
# The short list of docs/security.md: the status that each of the three callers may get. An empty body asks the model nothing.
SHORT_LIST: dict[tuple[str, str], tuple[set[int], set[int], set[int]]] = {
    ("GET", "/health"): ({200}, {200}, {200}),
    ("GET", "/v1/models"): ({401}, {401}, {200}),
    ("POST", "/v1/completions"): ({401}, {401}, {400, 422}),
    ("POST", "/v1/chat/completions"): ({401}, {401}, {400, 404, 422}),
}
REFUSED = ({401}, {401}, {404})
REFUSED_WEBSOCKET = ({403}, {403}, {403})
UPGRADE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "bWlzdHJhbGN0bC1wcm9iZQ==",
}  # fmt: skip
AT_ONCE = 8
SECONDS = 30.0
OPEN_SECONDS = 30.0


@dataclass(frozen=True)
class Row:
    """One way to ask for one route: what came back without a key, with a wrong one, with the right one."""

    method: str
    path: str
    answers: Answers

    @property
    def let_in(self) -> bool:
        """Whether the short list has it."""
        return (self.method, self.path) in SHORT_LIST

    @property
    def right(self) -> bool:
        """Whether each caller got what the short list says, or a refusal where it says nothing."""
        allowed = SHORT_LIST.get((self.method, self.path), REFUSED_WEBSOCKET if self.method == "WEBSOCKET" else REFUSED)
        return all(answer in expected for answer, expected in zip(self.answers, allowed, strict=True))


@dataclass(frozen=True)
class Report:
    """What the probe found: every row, how many routes the application has, and what it answered to a question."""

    routes: int
    rows: tuple[Row, ...]
    answer: str = ""

    def summary(self) -> dict[str, Any]:
        """What the record keeps: counts, and the rows of what was let in."""
        inside = {f"{row.method} {row.path}": list(row.answers) for row in self.rows if row.let_in}
        return {"routes": self.routes, "requests": len(self.rows) * len(CALLERS), "let_in": inside}


def ways(routes: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Every method and path to ask for: each route with its methods and OPTIONS, a mounted application also below its path.

    >>> list(ways([{"path": "/a/{id}", "methods": ["GET"]}]))
    [('GET', '/a/x'), ('OPTIONS', '/a/x')]
    """
    seen = set()
    for route in routes:
        path = re.sub(r"\{[^{}]*\}", "x", str(route["path"])) or "/"
        methods = [str(method) for method in route["methods"]]
        if not methods:
            raise ValueError(f"{path} is of a kind that is not known")
        asked = [(method, path) for method in methods if method != "*"]
        if "WEBSOCKET" not in methods:
            asked.append(("OPTIONS", path))
        if "*" in methods:
            asked += [(method, below) for below in (path, f"{path.rstrip('/')}/x") for method in ("GET", "POST")]
        for way in asked:
            if way not in seen:
                seen.add(way)
                yield way


def walk(record: Record, routes_json: str) -> Report:
    """Asks for all of it, as three callers. UserError if the routes cannot be read or the server cannot be reached."""
    import httpx

    try:
        routes = json.loads(routes_json)
        asked = list(ways(routes))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record.name}: its server did not say which routes it has ({error}); see mistralctl logs", Exit.SERVER
        ) from error
    if not set(SHORT_LIST) & set(asked):
        raise UserError(
            f"{record.name}: none of the routes that its server names is one of ours; see mistralctl logs", Exit.SERVER
        )
    callers = [connection.client(record, SECONDS, key=key) for key in ("", WRONG_KEY, state.api_key(record.name))]

    def ask(way: tuple[str, str]) -> Row:
        method, path = way
        headers = UPGRADE if method == "WEBSOCKET" else {"Content-Type": "application/json"}
        codes = [client.request(method.replace("WEBSOCKET", "GET"), path, headers=headers).status_code for client in callers]
        return Row(method, path, (codes[0], codes[1], codes[2]))

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return Report(len(routes), tuple(pool.map(ask, asked)))
    except httpx.HTTPError as error:
        raise UserError(
            f"{record.name}: its server at {record.base_url} stopped answering the gate's probe ({error})", Exit.NETWORK
        ) from error
    finally:
        for client in callers:
            client.close()


def table(rows: tuple[Row, ...]) -> str:
    """A line for each way to ask, and what each caller got."""
    wide = max((len(row.path) for row in rows), default=4)
    head = f"{'METHOD':9} {'PATH':{wide}}  {'NO KEY':>9} {'WRONG KEY':>9} {'RIGHT KEY':>9}"
    marks = {True: "", False: "  <- not on the short list"}
    return "\n".join(
        [
            head,
            *(
                f"{row.method:9} {row.path:{wide}}  " + " ".join(f"{code:9}" for code in row.answers) + marks[row.right]
                for row in rows
            ),
        ]
    )


def check(report: Report) -> None:
    """UserError with the table if anybody got what the short list does not give."""
    wrong = [row for row in report.rows if not row.right]
    if wrong:
        named = ", ".join(f"{row.method} {row.path}" for row in wrong[:5]) + (
            f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        )
        raise UserError(
            f"the gate found open what should be shut ({named}), so the server was stopped; this is a fault of this version of mistralctl, "
            "please report it",
            Exit.SERVER, table(report.rows),
        )  # fmt: skip


def look(record: Record, on_phase: OnPhase) -> Report:
    """Walks a server that is open to the probe only; UserError if anything is open to others that should not be, or it does not answer.

    The whole table is in gate.txt beside the record.
    """
    on_phase(PhaseEvent("gate", "start", time.time()))
    report = walk(record, runtime.of(record.cloud).read(record, files.ROUTES.of(record.name)))
    state.write_private(state.folder(record.name) / "gate.txt", table(report.rows) + "\n")
    check(report)
    return replace(report, answer=readiness.complete(record))


def let_in(record: Record, report: Report, on_phase: OnPhase) -> Record:
    """Opens a server that was walked and has answered to all that its short list lets in; its record. UserError if it does not open."""
    runtime.of(record.cloud).write(record, files.PASSED.of(record.name), "yes\n")
    deadline = time.monotonic() + OPEN_SECONDS
    while not readiness.answers(record):
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: its server did not open after the gate; see mistralctl logs {record.name}", Exit.SERVER
            )
        time.sleep(0.1)
    on_phase(PhaseEvent("gate", "end", time.time()))
    return replace(record, gate=report.summary())
