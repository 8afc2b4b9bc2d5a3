"""`mistralctl reap`: finds by the clouds' own listings what nobody will take down any more, and deletes it after a yes.

It needs neither a file of this laptop nor SkyPilot's database; it touches machines and disks that bear our labels and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mistralctl.clouds import CLOUDS, DISK_PRICES, Listing, Part, listing
from mistralctl.errors import Exit, UserError
from mistralctl.prices import offers
from mistralctl.task import owner

GRACE_MINUTES = 15.0  # the launcher, its wrapper and autostop come first
ORPHAN_MINUTES = 30.0  # a disk without a machine that is younger may be on its way to one
GONE_SECONDS = 180.0
GIB_MONTH_DAYS = 30.4


@dataclass(frozen=True)
class Found:
    """A machine or disk with our labels. `due` is why it should go, empty if it should not; `per_day` is in USD, None if unknown."""

    cloud: str
    kind: str
    id: str
    place: str
    size: str
    name: str
    state: str
    age_minutes: float
    per_day: float | None
    due: str
    deleted: bool = False


def _per_day(part: Part) -> float | None:
    if part.kind == "disk":
        price = DISK_PRICES.get(part.cloud)
        return None if price is None else round(float(part.size.split()[0]) * price / GIB_MONTH_DAYS, 2)
    if part.state == "stopped":
        return None
    same = [offer for offer in offers(part.cloud) if offer.instance_type == part.size]
    near = [offer for offer in same if part.place.startswith(offer.region)] or same
    return round(near[0].price * 24, 2) if near else None


def judge(part: Part, now: float) -> str:
    """Why a part should go; empty if it should not."""
    age = (now - part.created) / 60
    if part.kind == "disk":
        return "its machine is gone" if age > ORPHAN_MINUTES else ""
    ttl = part.labels.get("mistralctl-ttl", "")
    if ttl.isdigit() and age > int(ttl) + GRACE_MINUTES:
        return f"its lifetime of {int(ttl)} minutes is over"
    return ""


def _found(part: Part, now: float, deleted: bool = False) -> Found:
    return Found(
        part.cloud, part.kind, part.id, part.place, part.size, part.labels.get("mistralctl-name", "?"), part.state,
        round((now - part.created) / 60, 1), _per_day(part), judge(part, now), deleted,
    )  # fmt: skip


def run(clouds: Sequence[str], *, all_owners: bool, dry_run: bool, confirm: Callable[[list[Found]], bool]) -> list[Found]:
    """What bears our labels on these clouds; what is due is deleted after `confirm` said yes. UserError if some of it stays."""
    for cloud in clouds:
        if cloud not in CLOUDS:
            raise UserError(f"--cloud: {cloud} is not one of {', '.join(CLOUDS)}")
        if listing(cloud) is None:
            raise UserError(
                f"--cloud: reap cannot ask {cloud} yet; look at its console for the label mistralctl-owner", Exit.CLOUD
            )
    asked = None if all_owners else owner(os.environ)
    now = time.time()
    parts = [part for cloud in clouds for part in _module(cloud).ours(asked)]
    due = [part for part in parts if judge(part, now)]
    if dry_run or not due or not confirm([_found(part, now) for part in due]):
        return [_found(part, now) for part in parts]
    for cloud in clouds:
        _module(cloud).delete([part for part in due if part.cloud == cloud])
    wanted = {part.id for part in due}
    deadline = time.monotonic() + GONE_SECONDS
    while left := wanted & {part.id for cloud in clouds for part in _module(cloud).ours(asked)}:
        if time.monotonic() > deadline:
            raise UserError(f"still there: {', '.join(sorted(left))}; run reap again, or delete them by hand", Exit.CLOUD)
        time.sleep(2)
    return [_found(part, now, part.id in wanted) for part in parts]


def _module(cloud: str) -> Listing:
    module = listing(cloud)
    if module is None:
        raise ValueError(cloud)
    return module
