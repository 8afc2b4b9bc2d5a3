"""`mistralctl status`: what is up, as its own processes say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mistral_contract import untrusted

from mistralctl import clouds, owners, processes, readiness, reported, runtime, state, sweep, tasks
from mistralctl.clouds import GOING, STOPPED, listing
from mistralctl.errors import Exit, UserError
from mistralctl.phases import WORDS
from mistralctl.runtime import local, rented
from mistralctl.state import Record
from mistralctl.tasks import env

SSH_SECONDS = 6.0  # a node that does not answer holds nobody up for longer
AT_ONCE = 64
UNKNOWN = "unknown"
STUCK = "its engine has answered nothing for a minute; if it stays so, its launcher starts it again"
EARLY = 1  # of the machines while the clouds are asked: more would hold that up, because both want the interpreter's lock


@dataclass(frozen=True)
class Machine:
    """A deployment's machine by its cloud's word: its zone or region, how it is stopped (empty if it is not), its start in seconds since the
    epoch by this machine's clock, of which the cloud's was `ahead` by so many seconds; what its disks hold.

    `estranged` says that it bears another owner's label than the record says, or is in an account that cannot be seen, and what to do.
    """

    place: str
    stopped: str
    created: float | None
    estranged: str = ""
    ahead: float = 0.0
    disk_gib: float | None = None


@dataclass(frozen=True)
class Node:
    """What a deployment's machine says: its launcher's status.json, None where there is none; why it could not be asked; whether its
    server answers from here."""

    launcher: dict[str, Any] | None = None
    unreachable: str = ""
    answers: bool = False


@dataclass(frozen=True)
class Status:
    """A deployment now. `state` is `up`, `starting`, `stopped`, `failed`, `down`, or `lost` (it ended without `down`); `damaged` or `newer` where
    its record cannot be read, `unknown` where neither cloud nor SkyPilot can be asked.

    A run of fine-tuning is `running`, and `failed` if it ended otherwise than it should.
    `idle_left` and `ttl_left` are minutes; None where there is no limit or nothing runs. `launcher` is its status.json.
    `price` is in USD an hour, `cost` what the machine has cost so far by that price; None on this machine. Of a machine that is stopped `price` is
    what its disk costs, and nobody knows what it has cost. `budget` is what the machine may cost, USD; None without one.
    """

    name: str
    state: str
    cloud: str
    model: str
    base_url: str | None
    uptime_minutes: float | None
    idle_left: float | None
    ttl_left: float | None
    why: str
    launcher: dict[str, Any] | None
    region: str = ""
    machine: str = ""
    price: float | None = None
    cost: float | None = None
    budget: float | None = None


def _disk_price(record: Record, machine: Machine) -> float | None:
    """What a stopped machine goes on costing, USD an hour: its disk."""
    known = next((cloud for cloud in clouds.every() if cloud.name == record.cloud), None)
    asked = record.task.get("resources", {}).get("disk_size")
    gib = machine.disk_gib or (float(asked) if untrusted.finite(asked) else None)
    day = known.disk_per_day(gib) if known else None
    return None if day is None else round(day / 24, 4)


def _left(limit: str, since: float | None) -> float | None:
    return None if not limit or since is None else round(max(0.0, int(limit) - (time.time() - since) / 60), 1)


def _ttl_left(record: Record, launcher: dict[str, Any] | None, since: float, ahead: float = 0.0) -> float | None:
    """Minutes of its life that are left: by its launcher, by what `extend` wrote, or by its ttl and its budget from `since` on; the node's
    clock is `ahead` of this machine's."""
    end = (launcher or {}).get("ends_at") or record.ends_at
    if end is not None:
        return round(max(0.0, (end - ahead - time.time()) / 60), 1)
    left = [_left(limit, since) for limit in (env(record.task, "ttl_minutes"), str(tasks.budget_minutes(record.task) or ""))]
    return min((minutes for minutes in left if minutes is not None), default=None)


def _training(launcher: dict[str, Any] | None) -> str:
    """How far a run of fine-tuning says that it is; empty if it says nothing."""
    found = (launcher or {}).get("progress")
    if found is None or (launcher or {}).get("state") != "train":
        return WORDS.get(str((launcher or {}).get("state")), "")
    left = found.get("left_seconds")
    more = f", {left / 60:.0f} minutes left" if left is not None else ""
    return f"step {found.get('step')} of {found.get('steps')}, loss {found.get('loss')}{more}"


def _failure(record: Record) -> str:
    """Why the last `up` came to nothing, and where its log is."""
    log = state.folder(record.name) / "up.log"
    return record.failure if str(log) in record.failure or not log.exists() else f"{record.failure} (log: {log})"


def _again(record: Record) -> str:
    """What brings a deployment back, or goes on with a run."""
    return "run up again" if tasks.kind(record.kind).serves else "the same command goes on"


def _stranger(record: Record) -> str:
    """Who answers in a deployment's place; empty if nobody does."""
    from mistralctl import listeners

    try:
        listeners.check(record)
    except listeners.Stranger as error:
        return str(error)
    except UserError:
        return ""
    return ""


def _here(record: Record) -> Status:
    launcher, serves = local.read_status(record.run_dir), tasks.kind(record.kind).serves
    living = processes.alive(record) or bool(processes.servers(record))
    now: str = record.state
    why = ""
    if record.state != "down" and not living:
        error = (launcher or {}).get("error") or {}
        now, why = "lost", str(error.get("message") or f"its process is gone; {_again(record)}, or down to forget it")
        if not serves and error.get("message"):
            now, why = "failed", f"{why}; {_again(record)}"
    elif not serves and record.state != "down":
        now, why = "running", _training(launcher)
    elif (launcher or {}).get("state") == "stuck":
        now, why = "stuck", STUCK
    elif record.state == "up" and not readiness.answers(record):
        now, why = "starting", _stranger(record) or "it does not answer"
    if now == "down" and record.failure:
        now, why = "failed", _failure(record)
    up = now in ("up", "starting", "stuck", "running")
    launcher = launcher if up or now == "lost" else None
    last = ((launcher or {}).get("requests") or {}).get("last_at") or (launcher or {}).get("ready_at")
    return Status(
        record.name, now, record.cloud, record.model, record.base_url if up and serves else None,
        round((time.time() - record.created_at) / 60, 1) if up else None,
        _left(env(record.task, "idle_minutes"), last) if up else None,
        _ttl_left(record, launcher, record.created_at) if up else None,
        why, launcher,
    )  # fmt: skip


def _listed(cloud: str, records: Sequence[Record]) -> dict[str, Machine]:
    """These deployments' machines by the cloud's own listing, in one question a region; UserError if it does not say."""
    wanted = {record.name: owners.label(record) for record in records}
    found: dict[str, Machine] = {}
    others: dict[str, Machine] = {}
    for part in listing(cloud).machines(None, sorted({record.region for record in records})):
        name, owner = part.labels.get("mistralctl-name", ""), part.labels.get("mistralctl-owner", "")
        if part.state.lower() in GOING or name not in wanted:
            continue
        stopped = part.state.lower() if part.state.lower() in STOPPED else ""
        machine = Machine(part.place, stopped, part.since, ahead=part.ahead, disk_gib=part.disk_gib)
        if owner == wanted[name]:
            found[name] = machine
        elif sweep.rented_here(part):
            others[name] = replace(
                machine,
                estranged=f"{part.id} bears the owner {owner or 'none'}, not {wanted[name]} as its record says; no command of mistralctl "
                "touches it: put the label right, or delete it in the console",
            )
    for record in records:
        if record.name not in found | others and (elsewhere := sweep.other_account(record)):
            others[record.name] = Machine(record.region, "", None, estranged=f"{elsewhere}; sign in to {record.account}")
    return others | found


def _known_to_skypilot(records: Sequence[Record]) -> dict[str, Machine]:
    """These deployments' machines by SkyPilot, which asks the cloud for one after the other."""
    from mistralctl.runtime import sky

    names = {record.cluster: record.name for record in records}
    found = sky.clusters(list(names), refresh=True)
    return {
        names[key]: Machine(one.zone or one.region, "stopped" if one.status == "STOPPED" else "", one.launched_at)
        for key, one in found.items()
    }


def _machines(records: Sequence[Record]) -> tuple[dict[str, Machine], dict[str, UserError]]:
    """What the clouds say of these deployments' machines: all clouds at once, SkyPilot where a cloud cannot be listed; and of which nobody
    could be asked."""
    by_cloud: dict[str, list[Record]] = {}
    silent: list[Record] = []
    for record in records:
        if record.cluster and record.state != "down":
            if record.region:
                by_cloud.setdefault(record.cloud, []).append(record)
            else:  # of a launch that nobody saw the end of SkyPilot alone knows where it went
                silent.append(record)
    found: dict[str, Machine] = {}
    with ThreadPoolExecutor(max(1, len(by_cloud))) as pool:
        asked = {cloud: pool.submit(_listed, cloud, group) for cloud, group in by_cloud.items()}
    for cloud, answer in asked.items():
        try:
            found |= answer.result()
        except UserError:
            silent += by_cloud[cloud]
    try:
        return found | (_known_to_skypilot(silent) if silent else {}), {}
    except UserError as error:
        return found, {record.name: error for record in silent}


def _node(record: Record, *, shared: bool = False) -> Node:
    """What a machine says, over a new connection if need be; `shared`: over the tunnel's or not at all."""
    from mistralctl.runtime import ssh

    try:
        text = ssh.read_status(record.name, seconds=SSH_SECONDS, shared=shared)
    except UserError as error:
        return Node(unreachable=str(error))
    launcher = reported.status(text)
    return Node(launcher, "", (launcher or {}).get("state") == "ready" and readiness.answers(record))


def _cloud(record: Record, machine: Machine | None, node: Node) -> Status:
    """A deployment on a cloud: the cloud's word on the machine, the launcher's on the server."""
    launcher, unreachable = node.launcher, node.unreachable
    said = str((launcher or {}).get("state") or "")
    why, now = "", str(record.state)
    if record.state == "down":
        pass
    elif machine is None:
        taken = (
            "the cloud took its spot machine away" if record.spot else "its machine is gone (idle, lifetime, or by other hands)"
        )
        now, why = "lost", f"{taken}; {_again(record)}, or down to forget it"
    elif machine.estranged:
        now, why = "lost", machine.estranged
    elif machine.stopped:
        stopped = "the cloud took its spot machine away; it" if record.spot else "its machine"
        price = _disk_price(record, machine)
        day = "" if price is None else f" {price * 24:.2f} USD a day"
        now, why = "stopped", f"{stopped} is {machine.stopped} and its disk still costs{day}; {_again(record)}, or down"
    elif said in ("failed", "stopped"):
        error = (launcher or {}).get("error") or {}
        now = "failed" if said == "failed" else "lost"
        rented.keep_log(record)
        why = str(error.get("message") or f"its server ended ({(launcher or {}).get('ended_because', 'see logs')})")
    elif (launcher or {}).get("serving_id", record.serving_id) != record.serving_id:
        why = "another task than this laptop's last up runs on its machine; run up again, or from here on leave it to the other"
    elif said == "ready" and not node.answers:
        mend = f"cannot be reached at {record.address}:{record.port} from here" if record.public else "tunnel is not open"
        why = _stranger(record) or f"its {mend}; run mistralctl {'up again' if record.public else f'connect {record.name}'}"
    elif said == "stuck":
        now, why = "stuck", STUCK
    elif said and said != "ready":
        now = "starting"
    elif said in ("train", "prove", "publish", "published"):
        now, why = "running", _training(launcher)
    elif not said and record.state == "starting" and not tasks.kind(record.kind).serves:
        why = f"{tasks.kind(record.kind).what}: mistralctl logs {record.name} says how far it is"
    elif not said and record.state == "starting":
        why = "its machine is half made; run up again to go on, or down"
    elif unreachable:
        now, why = "lost", f"{unreachable}, though the cloud says that it runs; run down, then up again"
    elif not said and record.state == "up":
        now, why = "lost", "its machine is there without a server of ours; run up again"
    if record.failure and not said and record.state != "up":
        here = (
            ""
            if machine is None
            else f"; its machine is there: {record.again} goes on with it, mistralctl down {record.name} takes it away"
        )
        now, why = now if record.state == "down" else "failed", _failure(record) + here
    up = machine is not None
    ahead = machine.ahead if machine is not None else 0.0
    last = ((launcher or {}).get("requests") or {}).get("last_at") or (launcher or {}).get("ready_at")
    last = None if last is None else last - ahead
    since = (machine.created if machine is not None else None) or record.created_at
    hours = (time.time() - since) / 3600
    running = machine is not None and not machine.stopped
    price = record.price if running else None if machine is None else _disk_price(record, machine)
    return Status(
        record.name, now, record.cloud, record.model, record.base_url if up else None, round(hours * 60, 1) if up else None,
        _left(env(record.task, "idle_minutes"), last) if up else None,
        _ttl_left(record, launcher, since, ahead) if up else None,
        why, launcher,
        region=machine.place if machine is not None else record.region,
        machine=f"{record.machine}{' spot' if record.spot else ''}", price=price,
        cost=round(price * hours, 3) if price is not None and running else None,
        budget=float(budget) if (budget := env(record.task, "budget")) else None,
    )  # fmt: skip


def check(found: Sequence[Status]) -> None:
    """UserError if a record could not be read, or nobody could be asked what became of a machine."""
    if unreadable := [one.why for one in found if one.state in ("damaged", "newer")]:
        raise UserError("; ".join(unreadable), Exit.CONFLICT)
    if unknown := list(dict.fromkeys(one.why for one in found if one.state == UNKNOWN)):
        raise UserError("; ".join(unknown), Exit.CLOUD)


def run(name: str | None) -> list[Status]:
    """One deployment, or all that are known; the clouds are asked once for all of them. What cannot be read is a row, and stops no other."""
    records, unreadable = ([state.known(name)], {}) if name is not None else state.every()
    rows = [Status(one, error.state, "", "", None, None, None, None, str(error), None) for one, error in unreadable.items()]
    return sorted([*_read(records), *rows], key=lambda one: one.name)


def _read(records: Sequence[Record]) -> list[Status]:
    from mistralctl.runtime import ssh

    with ThreadPoolExecutor(AT_ONCE) as pool, ThreadPoolExecutor(EARLY) as few:
        asked = pool.submit(_machines, records)
        # Those that have a tunnel most likely have a machine, which can be asked while the clouds still are.
        tunnelled = [record for record in records if record.cluster and record.state != "down" and ssh.has_tunnel(record.name)]
        early = {record.name: few.submit(_node, record, shared=True) for record in tunnelled}
        try:
            machines, unasked = asked.result()
            if unasked and len(unasked) == len(records):
                raise next(iter(unasked.values()))
        except BaseException:
            few.shutdown(wait=False, cancel_futures=True)
            raise

        def one(record: Record) -> Status:
            if not runtime.of(record.cloud).rents:
                return _here(record)
            if record.name in unasked:
                return replace(_cloud(record, None, Node()), state=UNKNOWN, why=str(unasked[record.name]))
            machine, node = machines.get(record.name), early.get(record.name)
            begun = node is not None and not node.cancel()
            if machine is None or machine.stopped or machine.estranged:
                return _cloud(record, machine, Node())
            said = node.result() if node is not None and begun else Node(unreachable="not asked yet")
            return _cloud(record, machine, _node(record) if said.unreachable else said)

        return list(pool.map(one, records))
