"""What `up` and `down` do: steps, decided from what is there and what is wanted, and from nothing else.

    record, task -> Runtime.observe -> decide -> steps -> apply

Pure: no clock, no network, no file. What `plan` and `up --dry-run` show is what `up` runs (apply.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

from mistralctl.tasks import Task, env, resources_id, serving_name, setup_id

if TYPE_CHECKING:
    from mistralctl.state import Record

Machine = Literal["none", "half made", "up", "stopped"]


class Do(str, Enum):
    """The kinds of steps."""

    REFUSE = "refuse"
    KEEP = "keep"
    CANCEL = "cancel"
    LOOK = "look"
    CHECK = "check"
    END_MACHINE = "end_machine"
    STOP = "stop"
    RENT = "rent"
    SET_UP = "set_up"
    START = "start"
    REPLACE = "replace"
    ADOPT = "adopt"
    CONNECT = "connect"
    WALK = "walk"
    SWEEP = "sweep"
    FORGET = "forget"


@dataclass(frozen=True)
class Step:
    """One thing to do, and the line that says so. `ask` is what the user must say yes to before any step is taken."""

    do: Do
    text: str
    ask: str = ""


@dataclass(frozen=True)
class Observed:
    """What is there, by the machine's, the cloud's and the server's own words.

    `jobs` are the names of the servers that run or wait on the machine, with their ids; None if the machine cannot be asked. `answers`:
    the server of the record's task takes its key now. `interrupted`: an earlier `up` that was killed may still be at work.
    `beside`: the next server can be set up while this one serves.
    """

    machine: Machine = "none"
    jobs: Mapping[str, int] | None = None
    answers: bool = False
    interrupted: bool = False
    beside: bool = False
    cloud: str = ""
    region: str = ""


def serves(record: Record | None, task: Task) -> bool:
    """Return whether a record says that this very task was up."""
    if record is None or record.state != "up":
        return False
    same = record.serving_id == env(task, "serving_id") and record.resources_id == resources_id(task)
    return same and _same_weights(record, task)


def _same_weights(record: Record | None, task: Task) -> bool:
    """Return whether a record's weights are those that a task asks for by their digest."""
    wanted = env(task, "weights_digest")
    return not wanted or (record is not None and wanted in (record.weights_digest, env(record.task, "weights_digest")))


def remembered(record: Record | None, task: Task) -> Observed:
    """Return what is there if all is as the record says; asks nobody."""
    known = record if record is not None and record.state != "down" else None
    rented = bool(task["resources"])
    if known is None:
        return Observed() if rented else Observed("up", {}, beside=True)
    if known.state == "starting":
        return (
            Observed("half made", interrupted=bool(known.request))
            if rented
            else Observed("up", {}, interrupted=True, beside=True)
        )
    return Observed("up", {f"{known.name}-{known.serving_id}": 0}, answers=True, beside=not rented)


def decide(record: Record | None, task: Task, observed: Observed) -> tuple[Step, ...]:
    """Return the steps from what is there to a server of this task that answers; after a last step `look`, observe and decide again."""
    old = record if record is not None and record.state != "down" else None
    rented = bool(task["resources"])
    if old is not None and bool(old.cluster) != rented:
        where = f"on {old.cloud}" if old.cluster else "on this machine"
        return (Step(Do.REFUSE, f"{old.name} runs {where}; run mistralctl down {old.name}, or give another --name"),)
    if observed.answers and serves(old, task):
        return (Step(Do.KEEP, "nothing to do: it answers"),)
    if old is not None and rented and old.resources_id != resources_id(task):
        machine = f"{old.machine or 'its machine'} in {old.region or old.cloud}"
        question = f"{old.name}: what was changed needs another machine; {machine} and what is on its disk go away"
        gone = Step(Do.END_MACHINE, f"end {machine}, with what is on its disk", question)
        return (_check(task, rents=True), gone, _rent(task), *_open(task))
    if observed.interrupted:
        return (
            Step(Do.CANCEL, "end what an interrupted up left at work"),
            Step(Do.LOOK, "look at what it left, and go on from there"),
        )
    start = _start(old, task, observed)
    return (_check(task, rents=start[-1].do is Do.RENT), *start, *_open(task))


def _start(old: Record | None, task: Task, observed: Observed) -> tuple[Step, ...]:
    """Return how the server comes to run on what is there."""
    if observed.machine == "none":
        return (_rent(task),)
    same = _same_weights(old, task)
    ready = observed.beside or (old is not None and old.setup_id == setup_id(task) and same)
    jobs = observed.jobs
    if jobs and serving_name(task) in jobs and same:
        return (Step(Do.ADOPT, "go on with the server that starts there already"),)
    if jobs and ready:
        return (Step(Do.REPLACE, "replace the server on its machine"),)
    if jobs is not None and ready and not observed.beside:
        return (Step(Do.START, "start the server again on its machine, which is set up"),)
    if jobs:
        return (Step(Do.STOP, "stop the server on its machine"), _set_up(task, observed))
    return (_set_up(task, observed),)


def _set_up(task: Task, observed: Observed) -> Step:
    machine = {
        "stopped": "start its machine, which is stopped, and set it up",
        "half made": "go on with its machine, which is half made",
    }
    where = "set its machine up" if task["resources"] else "set this machine up"
    return Step(Do.SET_UP, f"{machine.get(observed.machine, where)}, then start the server")


def _check(task: Task, *, rents: bool) -> Step:
    room = (
        "see that the disk has room and"
        if not task["resources"]
        else "ask whether the quotas allow it and"
        if rents
        else "ask whether"
    )
    return Step(Do.CHECK, f"{room} the weights may be read")


def places(task: Task) -> list[str]:
    """Return where a task's machine may be rented, each as SkyPilot writes it: `aws/us-east-1 L4:1`."""
    resources = task["resources"]
    return [
        " ".join(str(part) for part in (one["infra"], one.get("accelerators", "")) if part)
        for one in resources.get("any_of") or resources.get("ordered") or [resources]
    ]


def _rent(task: Task) -> Step:
    where = places(task)
    machine = f"the cheapest of {', '.join(where)}" if len(where) > 1 else f"a machine ({where[0]})"
    return Step(Do.RENT, f"rent {machine}, set it up, start its server")


def _open(task: Task) -> tuple[Step, ...]:
    """Return how a server that starts is checked and opened."""
    public = bool(task["resources"].get("ports"))
    reach = "keep its certificate, and open its port to those that --allow names" if public else "open the tunnel to it"
    return (
        *((Step(Do.CONNECT, reach),) if task["resources"] else ()),
        Step(Do.WALK, "wait until its node has walked every route and opened, and walk them again from here"),
    )


def take_down(record: Record, observed: Observed) -> tuple[Step, ...]:
    """Return the steps to nothing being left of a deployment."""
    forget = Step(Do.FORGET, f"forget where {record.name} was; its receipt and logs stay")
    if not record.cluster:
        return (*((Step(Do.STOP, "stop its server, which drains first"),) if observed.jobs else ()), forget)
    if record.state == "down" and observed.machine == "none":
        return (forget,)
    return (
        Step(Do.END_MACHINE, "end its machine"),
        Step(Do.SWEEP, f"wait until {record.cloud} lists nothing of it, and delete what outlives the machine"),
        forget,
    )
