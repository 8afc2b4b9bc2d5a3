"""`mistralctl reap`: finds by the clouds' own listings what nobody will take down any more, and deletes it after a yes.

It needs neither a file of this laptop nor SkyPilot's database; it touches what bears our labels and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from mistralctl import owners
from mistralctl.clouds import STOPPED, Lacking, NotUsed, Part, facts, listing, names
from mistralctl.errors import Exit, UserError
from mistralctl.prices import offers

# A server's life begins when its machine is set up; and launcher, wrapper and autostop come first.
GRACE_MINUTES = 45.0
ORPHAN_MINUTES = 30.0  # a disk without a machine that is younger may be on its way to one
GONE_SECONDS = 300.0
GIB_MONTH_DAYS = 30.4


@dataclass(frozen=True)
class Found:
    """A part with our labels. `due` is why it should go, empty if it should not; `per_day` is in USD; None: unknown."""

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


@dataclass(frozen=True)
class Asked:
    """Whether a cloud was `asked`, is `not used` here, or is `unknown`; and why."""

    cloud: str
    state: Literal["asked", "not used", "unknown"]
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
        price = facts(part.cloud).disk_price
        return None if price is None else round(float(part.size.split()[0]) * price / GIB_MONTH_DAYS, 2)
    if part.state.lower() in STOPPED:
        return None
    same = [offer for offer in offers(part.cloud) if offer.instance_type == part.size]
    near = [offer for offer in same if part.place.startswith(offer.region)] or same
    return round(near[0].price * 24, 2) if near else None


def _name(part: Part) -> str:
    return part.labels.get("mistralctl-name", "?")


def judge(part: Part, now: float, with_machine: Collection[str] = ()) -> str:
    """Why a part should go, empty if it should not; `with_machine` are the names of deployments that have one."""
    age = None if part.created is None else (now - part.created) / 60
    if part.kind == "machine":
        ttl = part.labels.get("mistralctl-ttl", "")
        over = age is not None and ttl.isdigit() and age > int(ttl) + GRACE_MINUTES
        return f"its lifetime of {int(ttl)} minutes is over" if over else ""
    gone = _name(part) not in with_machine if age is None else age > ORPHAN_MINUTES
    return "its machine is gone" if gone else ""


def _listed(cloud: str, asked: Sequence[owners.Asked]) -> list[Part]:
    module = listing(cloud)
    return list({part.id: part for owner, name in asked for part in module.ours(owner, name)}.values())


def _ask(cloud: str, asked: Sequence[owners.Asked]) -> tuple[Asked, list[Part]]:
    try:
        return Asked(cloud, "asked"), _listed(cloud, asked)
    except (NotUsed, Lacking) as error:
        return Asked(cloud, "not used", str(error)), []
    except UserError as error:
        return Asked(cloud, "unknown", str(error)), []


def _delete(due: Sequence[Part], asked: Sequence[owners.Asked]) -> None:
    """Deletes these and waits until the clouds do not list them any more; UserError if some of it stays."""
    modules = {part.cloud: listing(part.cloud) for part in due}
    for cloud, module in modules.items():
        module.delete([part for part in due if part.cloud == cloud])
    wanted, deadline = {part.id for part in due}, time.monotonic() + GONE_SECONDS
    while left := wanted & {part.id for cloud in modules for part in _listed(cloud, asked)}:
        if time.monotonic() > deadline:
            raise UserError(f"still there: {', '.join(sorted(left))}; run reap again, or delete them by hand", Exit.CLOUD)
        time.sleep(5)


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
    with_machine = {_name(part) for part in parts if part.kind == "machine"}
    due = {part.id: part for part in parts if judge(part, now, with_machine)}

    def found(part: Part, deleted: bool = False) -> Found:
        age = None if part.created is None else round((now - part.created) / 60, 1)
        why = judge(part, now, with_machine)
        return Found(
            part.cloud, part.kind, part.id, part.place, part.size, _name(part), part.state, age, _per_day(part), why, deleted
        )

    delete = bool(due) and not dry_run and confirm([found(part) for part in due.values()])
    if delete:
        _delete(list(due.values()), asked)
    # A cloud that was named has to be asked, whether or not it is used here.
    states = (Asked(one.cloud, "unknown", one.why) if clouds and one.state != "asked" else one for one, _ in answers)
    return Reaped(tuple(states), tuple(found(part, delete and part.id in due) for part in parts))


def check(result: Reaped) -> None:
    """UserError if a cloud that should have been asked was not: nothing may be left there, or it may not."""
    unknown = [one for one in result.clouds if one.state == "unknown"]
    if unknown:
        raise UserError("; ".join(f"{one.cloud}: {one.why}" for one in unknown), Exit.CLOUD)
    if not [one for one in result.clouds if one.state == "asked"]:
        why = "; ".join(f"{one.cloud}: {one.why}" for one in result.clouds)
        raise UserError(f"no cloud could be asked: {why}", Exit.CLOUD)
