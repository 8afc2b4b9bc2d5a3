"""Which routes a server answers and whom, and the gate's walk: every route of a running application, asked as three callers.

The node walks its own server before it opens it; the laptop walks it again from outside. Both ask and judge by this file.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from mistral_contract import untrusted

Route = tuple[str, str]
Answers = tuple[int, int, int]
Connect = Callable[[], http.client.HTTPConnection]

CALLERS = ("no key", "wrong key", "right key")
WRONG_KEY = "mctl-0000000000000000000000000000000000000000000"
HEALTH, MODELS = ("GET", "/health"), ("GET", "/v1/models")
COMPLETIONS, CHAT = ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")
# The short list of docs/security.md: the statuses that each of the three callers may get. An empty body asks the model nothing.
SHORT_LIST: dict[Route, tuple[set[int], set[int], set[int]]] = {
    HEALTH: ({200}, {200}, {200}),
    MODELS: ({401}, {401}, {200}),
    COMPLETIONS: ({401}, {401}, {400, 422}),
    CHAT: ({401}, {401}, {400, 404, 422}),
}
OPEN = frozenset({HEALTH})
WITH_KEY = frozenset(SHORT_LIST) - OPEN
REFUSED = ({401}, {401}, {404})
REFUSED_WEBSOCKET = ({403}, {403}, {403})
UPGRADE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "bWlzdHJhbGN0bC1wcm9iZQ==",
}  # fmt: skip
AT_ONCE = 8


@dataclass(frozen=True)
class Row:
    """One way to ask for one route: the status that each of the three callers got."""

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

    def __str__(self) -> str:
        return f"{self.method} {self.path} answered " + ", ".join(map(str, self.answers))


@dataclass(frozen=True)
class Report:
    """What a walk found: how many routes the application has, and a row for each way to ask for one."""

    routes: int
    rows: tuple[Row, ...]

    def summary(self) -> dict[str, Any]:
        """Counts, and the rows of what was let in."""
        inside = {f"{row.method} {row.path}": list(row.answers) for row in self.rows if row.let_in}
        return {"routes": self.routes, "requests": len(self.rows) * len(CALLERS), "let_in": inside}

    def fault(self) -> str:
        """What is wrong, in one line; empty after a clean walk."""
        wrong = [row for row in self.rows if not row.right]
        return (
            (
                f"the gate found open what should be shut ({named(wrong)}; asked with {', '.join(CALLERS)}), so the server was stopped; this is "
                "a fault of this version of mistralctl, please report it"
            )
            if wrong
            else ""
        )

    def table(self) -> str:
        """A line for each way to ask, and what each caller got."""
        wide = max((len(row.path) for row in self.rows), default=4)
        lines = [f"{'METHOD':9} {'PATH':{wide}}  {'NO KEY':>9} {'WRONG KEY':>9} {'RIGHT KEY':>9}"]
        for row in self.rows:
            codes = " ".join(f"{code:9}" for code in row.answers)
            lines.append(f"{row.method:9} {row.path:{wide}}  {codes}{'' if row.right else '  <- not on the short list'}")
        return "\n".join(lines)

    def text(self) -> str:
        """The report as the file gate.json of a run folder holds it."""
        return json.dumps({"schema": 1, **asdict(self)}) + "\n"


def read(text: str) -> Report:
    """The report in gate.json; ValueError if it is none."""
    try:
        data = untrusted.read(text)
        rows = tuple(Row(str(row["method"]), str(row["path"]), (*map(int, row["answers"]),)) for row in data["rows"])  # type: ignore[arg-type]
        return Report(int(data["routes"]), rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no report of a gate ({type(error).__name__}: {error})") from error


def named(rows: Sequence[Row], most: int = 5) -> str:
    """The first of some rows, and how many more there are."""
    return "; ".join(map(str, rows[:most])) + (f"; and {len(rows) - most} more" if len(rows) > most else "")


def ways(routes: Iterable[Mapping[str, Any]]) -> Iterator[Route]:
    """Every method and path to ask for: each route with its methods and OPTIONS, a mounted application also below its path.

    ValueError for a kind of route that is not known.

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


def walk(connect: Connect, asked: Sequence[Route], key: str, also: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """Asks in each of these ways without a key, with a wrong one, and with `key`; `also` are headers of every request.

    Each thread has a connection of its own. OSError or HTTPException if the server stops answering.
    """
    callers = [{**(also or {}), **({"Authorization": f"Bearer {one}"} if one else {})} for one in ("", WRONG_KEY, key)]

    def some(share: Sequence[Route]) -> list[Row]:
        with closing(connect()) as connection:
            found = []
            for way in share:
                codes = [_asked(connection, way, headers) for headers in callers]
                found.append(Row(*way, (codes[0], codes[1], codes[2])))
            return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        shares = pool.map(some, [asked[first::AT_ONCE] for first in range(AT_ONCE)])
        rows = {(row.method, row.path): row for share in shares for row in share}
    return tuple(rows[way] for way in asked)


def _asked(connection: http.client.HTTPConnection, way: Route, headers: Mapping[str, str]) -> int:
    """The status of an answer; where the server closed the connection meanwhile, over a new one."""
    try:
        return _status(connection, way, headers)
    except ConnectionError:
        connection.close()
        return _status(connection, way, headers)


def _status(connection: http.client.HTTPConnection, way: Route, headers: Mapping[str, str]) -> int:
    method, path = way
    websocket = method == "WEBSOCKET"
    kind = UPGRADE if websocket else {"Content-Type": "application/json"}
    connection.request("GET" if websocket else method, path, headers={**kind, **headers})
    answer = connection.getresponse()
    if answer.length is None or websocket:  # a stream would not end
        connection.close()
    else:
        answer.read()
    return answer.status
