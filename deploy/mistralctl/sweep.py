"""What the clouds list of a deployment: its machine's lifetime, and that nothing of it is left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from mistralctl import owners, state
from mistralctl.clouds import GOING, NotUsed, Part, account, labelling, listing, part_by_part
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record
from mistralctl.tasks import budget_minutes

GONE_SECONDS = 300.0
CLOCKS_SECONDS = 120.0  # by which a cloud's clock may differ from this machine's
CLUSTER_TAGS = ("ray-cluster-name", "skypilot-cluster-name")  # SkyPilot's name of a machine's cluster on its cloud
PROMISE_SECONDS = 15.0  # after which a machine that is not on its way out was not taken away by SkyPilot


def lifetime_label(part: Part, until: float | None, most: int | None = None) -> str:
    """The machine's mistralctl-ttl: minutes from its start to the end of its life, by its cloud's clock, `most` of them at most; `never` where
    nothing ends it."""
    until_then = None if until is None else math.ceil((until - (part.created or time.time() + part.ahead)) / 60)
    found = min((minutes for minutes in (until_then, most) if minutes is not None), default=None)
    return "never" if found is None else str(max(0, found))


def _within(record: Record) -> list[str] | None:
    return [record.region] if record.region else None


def _listed(record: Record) -> list[Part]:
    """What the record's cloud lists with the owner and the name that its machine was rented with."""
    return listing(record.cloud).ours(owners.label(record), record.name, _within(record))


def rented_here(part: Part) -> bool:
    """Return whether this user's SkyPilot rented a machine, by its name of the machine's cluster."""
    user = owners.skypilot_user()
    return bool(user) and any(part.labels.get(tag, "").endswith(f"-{user}") for tag in CLUSTER_TAGS)


def estranged(record: Record) -> list[Part]:
    """Machines of this name that this user's SkyPilot rented and that bear another owner than the record says."""
    return [
        part
        for part in listing(record.cloud).ours(None, record.name, _within(record))
        if part.kind == "machine" and part.state.lower() not in GOING
        and part.labels.get("mistralctl-owner") != owners.label(record) and rented_here(part)
    ]  # fmt: skip


def other_account(record: Record) -> str:
    """Return that these credentials are of another account than the one in which the machine was rented; empty if they are not, or nobody knows."""
    now = account(record.cloud) if record.account else record.account
    if now == record.account:
        return ""
    return f"its machine was rented in the {record.cloud} account {record.account}, and these credentials are of {now}, where it cannot be seen"


def not_found(record: Record) -> str:
    """Return what is known of a machine that should be there and that the cloud does not list."""
    if elsewhere := other_account(record):
        return f"{record.name}: {elsewhere}; sign in to {record.account}"
    wanted = f"{record.cloud} lists no machine with the labels mistralctl-name={record.name} and mistralctl-owner={owners.label(record)}"
    others = ", ".join(f"{part.id} ({part.labels.get('mistralctl-owner', 'no owner')})" for part in estranged(record))
    seen = (
        f"it lists {others}, which bears another owner"
        if others
        else "its labels were taken away, or these credentials see another account"
    )
    return f"{record.name}: {wanted}; {seen}"


def leave_no_other(record: Record) -> None:
    """UserError if a machine of this deployment runs that does not bear its record's label, and so was not taken away, or may run elsewhere."""
    if other_account(record):
        raise UserError(f"{not_found(record)}, then run mistralctl down {record.name} again", Exit.CLOUD)
    if left := estranged(record):
        rows = "\n".join(f"  {part.kind:8} {part.id} {part.place} {part.state} {part.labels}" for part in left)
        raise UserError(
            f"{not_found(record)}: it was not touched; if it is yours, delete it in the cloud's console or put the label right",
            Exit.CLOUD, rows,
        )  # fmt: skip


def label_others(record: Record) -> Record:
    """Label what SkyPilot made beside a deployment's new machine; the record with the machine's account.

    UserError if the cloud does not list that machine with its labels. Nothing happens where the cloud cannot be asked.
    """
    module = labelling(record.cloud)
    if module is None or not record.region:
        return record
    try:
        there = module.label_others(owners.label(record), record.name, record.region)
        record = replace(record, account=account(record.cloud))
    except NotUsed:
        return record
    except UserError as error:
        raise UserError(
            f"{record.name}: {error}; its machine runs: {record.again} goes on with it then, mistralctl down {record.name} takes it away",
            error.code, error.details,
        ) from error  # fmt: skip
    if there == 0:
        raise UserError(f"{not_found(record)}; mistralctl down {record.name} takes it away", Exit.CLOUD)
    return record


def tell_cloud(record: Record, until: float | None, *, here: bool = False) -> int:
    """Writes to the machine's label how long it may live (None: always); the number of machines that have it now.

    `until` is by the node's clock, which its cloud sets; with `here` by this machine's.
    """
    module = listing(record.cloud)
    machines = [part for part in _listed(record) if part.kind == "machine"]
    for part in machines:
        ends = until + part.ahead if here and until is not None else until
        module.relabel(part, {"mistralctl-ttl": lifetime_label(part, ends, budget_minutes(record.task))})
    return len(machines)


def wait_until_gone(record: Record, *, promised: bool, since: float = 0.0) -> list[Part]:
    """Waits until the cloud's own listing has nothing of this deployment any more (`since`: nothing that was made since then), and says
    what stays of it; UserError with the list if that does not come.

    What SkyPilot does not take away is deleted here: what outlived its machine, and the machine too if SkyPilot has not
    `promised` to delete it or has promised what does not come.
    """
    module = listing(record.cloud)
    began, asked = time.monotonic(), set[str]()
    while True:
        found = _listed(record)
        left = [part for part in found if not since or (part.since or 0.0) > since - CLOCKS_SECONDS]
        if not left:
            return found
        rows = "\n".join(f"  {part.kind:8} {part.id} {part.place} {part.state} {part.size}" for part in left)
        waited = time.monotonic() - began
        if waited > GONE_SECONDS:
            raise UserError(
                f"{record.name}: {record.cloud} still lists {len(left)} of it after {GONE_SECONDS / 60:.0f} minutes; run down again, "
                "or delete them by hand",
                Exit.CLOUD, rows,
            )  # fmt: skip
        others = "machine" if promised and waited < PROMISE_SECONDS else ""
        alone = [part for part in left if part.id not in asked and part.kind != others and part.state.lower() not in GOING]
        errors: list[UserError] = []
        for part in alone:  # what one refuses must not keep the others
            with part_by_part(errors, part.id.rpartition("/")[2]):
                module.delete([part])
        if errors:
            why = "; ".join(map(str, errors))
            raise UserError(f"{record.name}: {len(errors)} of it stay on {record.cloud}: {why}", Exit.CLOUD, rows)
        asked |= {part.id for part in alone}
        time.sleep(2)


def after_refusal(record: Record, clouds: Sequence[str], since: float, refused: UserError) -> None:
    """Makes sure that a launch since then which came to no machine has left nothing on these clouds; the record says how that went.

    What is older stays, though nobody here knows it. UserError with both reasons and tables if something of the launch stays as well, or
    a cloud cannot be asked.
    """
    unsure: list[tuple[str, UserError | None]] = []
    try:
        for cloud in clouds:
            try:
                if wait_until_gone(replace(record, cloud=cloud, region=""), promised=False, since=since):
                    unsure.append((cloud, None))
            except NotUsed:
                continue
            except UserError as error:
                unsure.append((cloud, error))
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; something of {record.name} may be left: mistralctl down {record.name} takes it away", Exit.INTERRUPTED
        ) from None
    state.save(replace(record, cloud=unsure[0][0]) if unsure else replace(record, state="down"))
    if errors := [error for _, error in unsure if error is not None]:
        every = [refused, *errors]
        raise UserError("; and ".join(map(str, every)), refused.code, "\n".join(filter(None, (one.details for one in every))))
