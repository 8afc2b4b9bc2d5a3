"""`mistralctl extend`: gives a deployment a longer life; the cloud is told first, so that `reap` lets the machine be."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace
from typing import Any

from mistral_contract import files

from mistralctl import durations, reported, runtime, state, tasks
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record
from mistralctl.tasks import env, finetune

HEARD_SECONDS, LOCK_SECONDS = 10.0, 5.0
AT_WORK = ("train", "prove", "publish")  # states of a run of fine-tuning


@dataclass(frozen=True)
class Extended:
    """A deployment with a longer life: its end in seconds since the epoch, and the minutes that are left until then."""

    name: str
    by: str
    ends_at: float
    ttl_left: float


def _minutes(by: str) -> int:
    if by == "never":
        raise UserError("DURATION: never is no length; write for example 2h, or run mistralctl up with --ttl never")
    try:
        return durations.length(by)
    except ValueError as error:
        raise UserError(f"DURATION: {error}") from error


def _launcher(record: Record) -> dict[str, Any]:
    return reported.status(runtime.of(record.cloud).read(record, files.STATUS.of(record.name))) or {}


def _left(record: Record, until: int) -> float:
    """Minutes from now to a new end; UserError beyond the longest life."""
    left = (until - time.time()) / 60
    if left > durations.LONGEST:
        raise UserError(f"DURATION: {record.name} would end in {left / 1440:.0f} days; 365 days is the longest life")
    return left


def _extend_run(record: Record, by: str, minutes: int) -> Extended:
    """Give a run of fine-tuning that is at work more time: its script on the node looks at the file."""
    where, file = runtime.of(record.cloud), files.ENDS_AT.of(record.name)
    if record.state == "down" or _launcher(record).get("state") not in AT_WORK:
        raise UserError(f"{record.name} is not at work; mistralctl status {record.name} says why", Exit.NOT_FOUND)
    end = where.read(record, file).strip()
    if not env(record.task, "ttl_minutes") or not end.isdecimal():
        raise UserError(f"{record.name} has no end (--ttl never), so there is nothing to extend", Exit.CONFLICT)
    until = int(end) + minutes * 60
    left = _left(record, until)
    budget, price = env(record.task, "budget"), env(record.task, "price")
    if budget and price and until > record.created_at + float(budget) / float(price) * 3600:
        raise UserError(f"{record.name}: its budget of {float(budget):.2f} USD is spent before that", Exit.CONFLICT)
    where.extend(record, until)
    where.write(record, file, f"{until}\n")
    with contextlib.suppress(UserError), state.locked(record.name, "extend", seconds=LOCK_SECONDS):  # its machine knows already
        now = state.known(record.name)  # the run may have ended meanwhile
        if now.state != "down":
            state.save(replace(now, ends_at=float(until)))
    return Extended(record.name, by, float(until), round(left, 1))


def _extend(record: Record, by: str, minutes: int) -> Extended:
    if record.state != "up":
        raise UserError(f"{record.name} is not up; run {record.again} first", Exit.NOT_FOUND)
    if not env(record.task, "ttl_minutes"):
        raise UserError(f"{record.name} has no end (--ttl never), so there is nothing to extend", Exit.CONFLICT)
    launcher = _launcher(record)
    if launcher.get("state") != "ready" or launcher.get("ends_at") is None:
        raise UserError(f"{record.name} does not serve now; mistralctl status {record.name} says why", Exit.CONFLICT)
    until = math.ceil(launcher["ends_at"]) + minutes * 60
    left = _left(record, until)
    if (budget := launcher.get("budget")) and until > budget["ends_at"]:
        raise UserError(
            f"{record.name}: its budget of {budget['usd']:.2f} USD is spent before that; give it more: {record.again} --budget USD",
            Exit.CONFLICT,
        )
    where = runtime.of(record.cloud)
    where.extend(record, until)
    where.write(record, files.ENDS_AT.of(record.name), f"{until}\n")
    deadline = time.monotonic() + HEARD_SECONDS
    while _launcher(record).get("ends_at") != until:
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: its launcher has not taken the new end; mistralctl status {record.name} says why", Exit.SERVER
            )
        time.sleep(0.2)
    state.save(replace(record, ends_at=float(until)))
    return Extended(record.name, by, float(until), round(left, 1))


def run(name: str, by: str) -> Extended:
    """Puts the end of a deployment's life off by a duration such as `2h`; UserError if it does not run or never ends."""
    minutes = _minutes(by)
    kind = tasks.kind(state.known(name).kind)
    if kind.name == finetune.KIND.name:  # its command, which follows it, may hold the lock
        return _extend_run(state.known(name), by, minutes)
    kind.require_endpoint(name)
    with state.locked(name, "extend"):
        return _extend(state.known(name), by, minutes)
