"""`mistralctl reap`: finds by the clouds' own listings what nobody will take down any more, and deletes it after a yes.

It needs neither a file of this laptop nor SkyPilot's database; it touches what bears our labels and nothing else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from mistralctl import owners
from mistralctl.clouds import STOPPED, Lacking, NotUsed, Part, Refused, facts, listed_partly, listing, names
from mistralctl.errors import Exit, UserError
from mistralctl.prices import offers

# A server's life begins when its machine is set up; and launcher, wrapper and autostop come first.
GRACE_MINUTES = 45.0
ORPHAN_MINUTES = 30.0  # a disk without a machine that is younger may be on its way to one
GONE_SECONDS = 300.0
AT_ONCE = 8


# What a label may say of a lifetime; `never` and a whole number of minutes, which `int` takes for more.
TTL = re.compile(r"[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True)
class Found:
    """A part with our labels. `due` is why it should go, empty if it should not; `per_day` is in USD; None: unknown.

    `problem` is why nobody can say whether it is due, or why it could not be deleted; empty if there is none.
    """

    cloud: str
    kind: str
    id: str
    place: str
    size: str
    name: str
    state: str
    age_minutes: float | None
    per_day: float | None
    due: str
    deleted: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Asked:
    """Whether a cloud was `asked`, was asked but for some of it (`partly`), is `not used` here, or is `unknown`; and why."""

    cloud: str
    state: Literal["asked", "partly", "not used", "unknown"]
    why: str = ""


@dataclass(frozen=True)
class Reaped:
    """What was found, and of which clouds."""

    clouds: tuple[Asked, ...]
    parts: tuple[Found, ...]


def _per_day(part: Part) -> float | None:
    if part.kind in ("interface", "rule"):
        return 0.0
    if part.kind == "address":
        hour = facts(part.cloud).address_price
        return None if hour is None else round(hour * 24, 2)
    if part.kind == "disk":
        gib = re.match(r"[0-9]+(\.[0-9]+)?(?= GiB$)", part.size)
        return facts(part.cloud).disk_per_day(float(gib[0]) if gib else None)
    if part.state.lower() in STOPPED:
        return facts(part.cloud).disk_per_day(part.disk_gib)
    same = [offer for offer in offers(part.cloud) if offer.instance_type == part.size]
    near = [offer for offer in same if part.place.startswith(offer.region)] or same
    return round(near[0].price * 24, 2) if near else None


def _name(part: Part) -> str:
    return part.labels.get("mistralctl-name", "?")


def _age(part: Part, now: float) -> float | None:
    """Minutes, by the cloud's clock."""
    return None if part.since is None else (now - part.since) / 60


def judge(part: Part, now: float, with_machine: Collection[str] | None = ()) -> str:
    """Why a part should go, empty if it should not; `now` is by this machine's clock. `with_machine` are the names of deployments that have
    one, None where not all of its cloud's machines are known."""
    age = _age(part, now)
    if part.kind == "machine":
        ttl = part.labels.get("mistralctl-ttl", "")
        if age is not None and TTL.fullmatch(ttl) and age > int(ttl) + GRACE_MINUTES:
            return f"its lifetime of {int(ttl)} minutes is over"
        stopped = age is not None and age > ORPHAN_MINUTES and part.state.lower() in STOPPED
        return f"it is {part.state.lower()}, and its disk costs" if stopped else ""
    gone = with_machine is not None and _name(part) not in with_machine if age is None else age > ORPHAN_MINUTES
    return "its machine is gone" if gone else ""


def unreadable(part: Part) -> str:
    """Why nobody can say how long a machine may live; empty if its label says it."""
    ttl = part.labels.get("mistralctl-ttl", "")
    if part.kind != "machine" or ttl == "never" or TTL.fullmatch(ttl):
        return ""
    return f"its label mistralctl-ttl is {ttl[:40]!r}, which is no number of minutes; set it, or delete the machine by hand"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:200]}"


def _ask(cloud: str, asked: Sequence[owners.Asked]) -> tuple[Asked, list[Part]]:
    refused: Refused = []
    try:
        found = list({part.id: part for owner, name in asked for part in listed_partly(cloud, owner, name, refused)}.values())
    except (NotUsed, Lacking) as error:
        return Asked(cloud, "not used", str(error)), []
    except Exception as error:  # noqa: BLE001 - what one cloud answers must not hide the others
        return Asked(cloud, "unknown", _reason(error)), []
    if refused:
        return Asked(cloud, "partly", "; ".join(dict.fromkeys(map(str, refused)))), found
    return Asked(cloud, "asked"), found


def _delete(due: Sequence[Part], asked: Sequence[owners.Asked], answers: Collection[Asked]) -> dict[str, str]:
    """Delete these, each by itself, and wait until the clouds do not list them any more; why those that stay do, by id.

    A cloud that answers another way than in `answers`, when it listed them, does not say that they are gone.
    """

    def delete(part: Part) -> str:
        try:
            listing(part.cloud).delete([part])
        except Exception as error:  # noqa: BLE001 - what keeps one part must not keep the others
            return _reason(error)
        return ""

    stay: dict[str, str] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for machines in (True, False):  # a machine takes some of the others along
            some = [part for part in due if (part.kind == "machine") is machines]
            stay |= {part.id: why for part, why in zip(some, pool.map(delete, some), strict=True) if why}
    deadline = time.monotonic() + GONE_SECONDS
    while waiting := {part.cloud for part in due if part.id not in stay}:
        now = [_ask(cloud, asked) for cloud in waiting]
        there = {part.id for _, found in now for part in found}
        silent = {one.cloud for one, _ in now if one not in answers}
        left = [part.id for part in due if part.id not in stay and (part.id in there or part.cloud in silent)]
        if not left:
            break
        if time.monotonic() > deadline:
            stay |= dict.fromkeys(left, "it is still there; run reap again, or delete it by hand")
            break
        time.sleep(5)
    return stay


def run(clouds: Sequence[str], *, all_owners: bool, dry_run: bool, confirm: Callable[[list[Found]], bool]) -> Reaped:
    """What bears our labels on these clouds (none: on all); what is due is deleted after `confirm` said yes."""
    for cloud in clouds:
        if cloud not in names():
            raise UserError(f"--cloud: {cloud} is not one of {', '.join(names())}")
    asked = [(None, None)] if all_owners else owners.known(os.environ)
    with ThreadPoolExecutor(len(names())) as pool:
        answers = list(pool.map(lambda cloud: _ask(cloud, asked), dict.fromkeys(clouds or names())))
    now = time.time()
    parts = [part for _, every in answers for part in every]
    partly = {one.cloud for one, _ in answers if one.state == "partly"}
    with_machine = {_name(part) for part in parts if part.kind == "machine"}
    why = {part.id: judge(part, now, None if part.cloud in partly else with_machine) for part in parts}
    due = [part for part in parts if why[part.id]]
    stay: dict[str, str] = {}

    def found(part: Part, deleted: bool = False) -> Found:
        age = _age(part, now)
        return Found(
            part.cloud, part.kind, part.id, part.place, part.size, _name(part), part.state, None if age is None else round(age, 1),
            _per_day(part), why[part.id], deleted, stay.get(part.id) or ("" if deleted else unreadable(part)),
        )  # fmt: skip

    delete = bool(due) and not dry_run and confirm([found(part) for part in due])
    if delete:
        stay = _delete(due, asked, [one for one, _ in answers])
    # A cloud that was named has to be asked, whether or not it is used here.
    states = (Asked(one.cloud, "unknown", one.why) if clouds and one.state == "not used" else one for one, _ in answers)
    return Reaped(tuple(states), tuple(found(part, delete and part in due and part.id not in stay) for part in parts))


def check(result: Reaped) -> None:
    """UserError if a cloud that should have been asked was not (nothing may be left there, or it may not), or if a part could not be judged or
    deleted."""
    problems = [f"{one.cloud}: {one.why}" for one in result.clouds if one.state in ("unknown", "partly")]
    problems += [f"{one.kind} {one.id} on {one.cloud}: {one.problem}" for one in result.parts if one.problem]
    if problems:
        raise UserError("; ".join(problems), Exit.CLOUD)
    if not [one for one in result.clouds if one.state == "asked"]:
        why = "; ".join(f"{one.cloud}: {one.why}" for one in result.clouds)
        raise UserError(f"no cloud could be asked: {why}", Exit.CLOUD)
