"""The gate from outside: once a node has opened by its own walk, the laptop repeats that walk through the way that clients take."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from dataclasses import replace

from mistral_contract import files, routes

from mistralctl import connection, readiness, runtime, state
from mistralctl.errors import Exit, UserError
from mistralctl.phases import PhaseEvent
from mistralctl.state import Record

OnPhase = Callable[[PhaseEvent], None]

SECONDS = 30.0


def walk(record: Record, node: routes.Report) -> routes.Report:
    """What the server answers from here in every way that its node has asked; UserError if it stops answering."""
    asked = [(row.method, row.path) for row in node.rows]
    try:
        rows = routes.walk(lambda: connection.plain(record, SECONDS), asked, state.api_key(record.name))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{record.name}: its server at {record.base_url} stopped answering the gate's probe ({error})", Exit.NETWORK
        ) from error
    return replace(node, rows=rows)


def check(seen: routes.Report, node: routes.Report) -> None:
    """UserError with the table if anybody got what the short list does not give, or something else than on the node."""
    if fault := seen.fault():
        raise UserError(fault, Exit.SERVER, seen.table())
    other = [row for row, there in zip(seen.rows, node.rows, strict=True) if row != there]
    if other:
        raise UserError(
            f"the server answers otherwise from here than on its node ({routes.named(other)}; asked with {', '.join(routes.CALLERS)}), so it "
            "was stopped; something between here and there answers in its place",
            Exit.SERVER, replace(seen, rows=tuple(other)).table(),
        )  # fmt: skip


def pass_through(record: Record, on_phase: OnPhase) -> tuple[Record, str]:
    """Walks a server that its node has opened: the record with what was found, and the server's answer to a question.

    The whole table is in gate.txt beside the record. UserError if the two walks differ or anything is open that should not be.
    """
    on_phase(PhaseEvent("outside", "start", time.time()))
    try:
        node = routes.read(runtime.of(record.cloud).read(record, files.GATE.of(record.name)))
    except ValueError as error:
        raise UserError(
            f"{record.name}: its node did not say which routes it has walked ({error}); see mistralctl logs {record.name}",
            Exit.SERVER,
        ) from error
    seen = walk(record, node)
    state.write_private(state.folder(record.name) / "gate.txt", seen.table() + "\n")
    check(seen, node)
    answer = readiness.complete(record)
    on_phase(PhaseEvent("outside", "end", time.time()))
    return replace(record, gate=seen.summary()), answer
