"""`mistralctl finetune`: chats become an adapter, on a machine that is gone when it is published, or on this one."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mistral_contract import files

from mistralctl import (
    checkpoints,
    node,
    owners,
    reported,
    runtime,
    state,
    stores,
    system,
    tasks,
    training,
    training_data,
)
from mistralctl import plan as planning
from mistralctl.adapters import folder_of
from mistralctl.commands import down, receipt
from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.fields import words
from mistralctl.finetune_spec import FinetuneSpec
from mistralctl.fit import disk_bytes
from mistralctl.models import Model
from mistralctl.phases import Phase, PhaseEvent, durations
from mistralctl.rights import Right, right
from mistralctl.runtime.protocol import Attempt, Runtime, Server
from mistralctl.spec import DeploymentSpec
from mistralctl.state import Record
from mistralctl.tasks import env
from mistralctl.tasks import finetune as kinds
from mistralctl.training import Run

PROGRESS = "mistralctl-progress "
WAIT_SECONDS = 365 * 86400.0  # its own ttl ends a run, not the laptop


@dataclass(frozen=True)
class Talk:
    """How `finetune` speaks with the user: of its phases, of its steps, of what stops nobody."""

    on_phase: Callable[[PhaseEvent], None]
    on_step: Callable[[Step], None]
    note: Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """How far training is. `left_seconds` is None before the first step; `usd` what the machine has cost so far, None on this one."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    left_seconds: float | None
    usd: float | None = None


@dataclass(frozen=True)
class Planned:
    """What would run, and what to show of the chats."""

    run: Run
    examples: str


@dataclass(frozen=True)
class Finetuned:
    """A run that came to its end. `action` is `trained`, or `unchanged` where --out holds its result already.

    `result` is the receipt that lies beside what was published; `usd` what the machine cost by the snapshot's price, None on this machine.
    """

    name: str
    action: str
    cloud: str
    model: str
    method: str
    out: str
    loss: float | None
    usd: float | None
    phases: tuple[Phase, ...]
    up: str
    log: str
    result: dict[str, Any] = field(default_factory=dict)


def _rights(run_out: str, uris: tuple[str, ...], cloud: str, endpoints: dict[str, str]) -> tuple[Right, ...]:
    """What the machine's role needs: to write the result, to read weights and chats."""
    found = [right(run_out, cloud, write=True, endpoints=endpoints), *(right(uri, cloud, endpoints=endpoints) for uri in uris)]
    return tuple(one for one in found if one is not None)


def plan(sourced: Sourced[FinetuneSpec], note: Callable[[str], None], *, show: int = 0, colour: bool = False) -> Planned:
    """The plan of a run, its chats checked; UserError for whatever is known to go wrong. Nothing is rented or written."""
    spec, machine = sourced.spec, None
    cloud = training.place_of(sourced)
    here = training.is_here(cloud)
    if here:
        system.require_serving(sourced.place("cloud"))
        from mistralctl.machine import this_machine

        machine = this_machine()
    asked = Sourced(DeploymentSpec.model_validate({"model": spec.model, "weights": spec.weights}), sourced.sources, sourced.typed)
    model = checkpoints.resolve(asked, ask=True)
    place = _place(spec, model)
    if not here and place.weights.startswith("file://"):
        raise UserError(
            f"{sourced.place('model')}: {place.weights.removeprefix('file://')} is a folder of this machine; mirror it to a bucket (weights mirror), "
            "and name that with --weights"
        )
    read = training_data.read(sourced, model, place, training_data.Talk(note, show, colour))
    uris = tuple(uri for uri in (place.weights, read.data, read.eval_data) if "://" in uri)
    endpoints = stores.endpoints((spec.out or "", *uris), os.environ)
    rights = _rights(spec.out or "", uris, cloud, endpoints)
    for one in rights:
        if one.has == "no":
            option = {spec.out: "out", place.weights: "weights", read.eval_data: "eval_data"}.get(one.uri, "data")
            raise UserError(f"{sourced.place(option)}: {one.line}", Exit.CLOUD)
    wanted = training.Wanted(
        model, place.weights, place.revision, place.weights_id, read.data, read.eval_data, read.tokens, read.contents, endpoints,
        machine, rights,
    )  # fmt: skip
    run = training.make(sourced, wanted)
    return Planned(replace(run, secret=bool(_secrets(run))), read.examples)


def _place(spec: FinetuneSpec, model: Model) -> training_data.Place:
    weights = spec.weights or model.weights
    revision = model.revision if weights == model.weights else ""
    at = stores.endpoints((weights,), os.environ)
    return training_data.Place(weights, revision, planning.weights_id(model, weights, revision, at))


def _secrets(run: Run) -> dict[str, str]:
    if not run.weights.startswith("hf://"):
        return {}
    from mistralctl import weights

    token = weights.hub_token()
    return {"hf_token": token} if token else {}


def render(run: Run, *, restart: bool = False) -> tasks.Task:
    """The task of a run, as `finetune --dry-run` prints it."""
    if run.local:
        return kinds.render(run, owner="", node=kinds.Node(str(node.local_dir()), node.local_python_version()), restart=restart)
    return kinds.render(run, owner=owners.label(state.read(run.name)), restart=restart)


def _published(run: Run, place: str, *, restart: bool) -> bool:
    """Whether --out holds the result of this very run; UserError if it holds another one's, or files of something else."""
    from mistralctl import weights

    ours = kinds.run_id(run)
    there = weights.sealed_revision(run.out)
    if there is not None:
        if there.startswith(f"{ours}-"):
            return not restart and not (run.spec.merge and weights.sealed_revision(f"{run.out}/merged") != there)
        raise UserError(
            f"{place}: {run.out} holds another run's result ({there or 'no revision'}); name another place", Exit.CONFLICT
        )
    for slot in ("a", "b"):
        there = weights.sealed_revision(f"{run.out}/checkpoints/{slot}")
        if there is not None and not there.startswith(f"{ours}-") and not restart:
            raise UserError(
                f"{place}: {run.out} holds checkpoints of another run (other chats or options); go on with those, name another place, or say "
                "--restart to remove them",
                Exit.CONFLICT,
            )
    folder = folder_of(run.out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"{place}: {folder} is a file; name a new folder", Exit.CONFLICT)
    if others := weights.strangers(run.out, ("checkpoints",)):
        raise UserError(f"{place}: {folder or run.out} holds something else ({others[0]}); name a new folder", Exit.CONFLICT)
    return False


def _checked(run: Run, place: str, note: Callable[[str], None], *, restart: bool) -> bool:
    """Whether the result is there already; what --out holds, and whether it can be written, as far as this machine may see."""
    try:
        if _published(run, place, restart=restart):
            return True
    except UserError as error:
        if run.local or error.code == Exit.CONFLICT:
            raise
        note(f"{place}: whether {run.out} is free is only seen on the machine: {error}")
    from mistralctl import weights

    try:
        weights.may_write(run.out)
    except UserError as error:
        if run.local or error.code == Exit.NOT_FOUND:
            raise UserError(f"{place}: {run.out} cannot be written: {error}", error.code) from None
        note(f"{place}: whether {run.out} can be written is only seen on the machine, before it trains: {error}")
    return False


def run(sourced: Sourced[FinetuneSpec], planned: Planned, talk: Talk, *, restart: bool = False) -> Finetuned:
    """Train, prove and publish; the machine goes. The same call goes on with a run that is at work, or was killed."""
    wanted, where = planned.run, runtime.of(planned.run.chosen.cloud)
    if _checked(wanted, sourced.place("out"), talk.note, restart=restart):
        return _result(wanted, "unchanged", (), None, _known(wanted.name))
    if where.rents:
        owners.make(os.environ)
        from mistralctl import weights

        weights.may_pull([(wanted.weights, wanted.revision)])
    heard = _Heard(talk, None)
    with state.locked(wanted.name, "finetune"):
        try:
            job = _begin(wanted, where, talk, heard, restart=restart)
        except KeyboardInterrupt:
            raise _interrupted(wanted) from None
    with contextlib.closing(job):
        try:
            job.wait("publish", WAIT_SECONDS)
        except UserError as error:
            _keep_failure(wanted.name, error)
            raise UserError(f"{error}; the same command goes on from the last checkpoint", error.code, error.details) from error
        except KeyboardInterrupt:
            raise _interrupted(wanted) from None
    return _end(wanted, where, job, heard)


def _begin(wanted: Run, where: Runtime, talk: Talk, heard: _Heard, *, restart: bool) -> Server:
    """Follow the run that is at work, or start it: as much as is there is gone on with."""
    old = state.read(wanted.name)
    if old is not None and old.kind != kinds.KIND.name:
        raise UserError(f"{wanted.name} is {tasks.kind(old.kind).what}; give the run another --name", Exit.CONFLICT)
    live = old if old is not None and old.state != "down" else None
    if live is not None and bool(live.cluster) != where.rents:
        raise UserError(
            f"{wanted.name} runs on {live.cloud}; run mistralctl down {wanted.name} first, or give another --name", Exit.CONFLICT
        )
    task = render(wanted, restart=restart)
    record = Record(
        wanted.name, wanted.chosen.cloud, "starting", wanted.model.name, "", 0, env(task, "node_dir"), "", time.time(), False,
        task=task, cluster=where.cluster(wanted.name), resources_id=tasks.resources_id(task), kind=kinds.KIND.name, spot=wanted.spec.spot,
        command=shlex.join(["mistralctl", "finetune", *words(wanted.spec.model_copy(update={"cloud": (wanted.chosen.cloud,)}))]),
    )  # fmt: skip
    if live is not None and where.rents:
        record = replace(record, created_at=live.created_at, account=live.account)
    if live is not None and live.request:
        where.cancel(live)
        live = replace(live, request="")
        state.save(live)
    attempt = Attempt(
        record, _secrets(wanted), where.observe(live, record), talk.on_phase, heard.keep, time.time(), live,
        disk_bytes(wanted.model.shape, wanted.model.stored) if wanted.model.shape else 0, talk.note, heard.line,
    )  # fmt: skip
    job = where.attach(attempt)
    if job is not None:
        if live is not None and env(live.task, "run_id") != env(task, "run_id"):
            job.close()
            raise UserError(
                f"{wanted.name} is at work with other chats or options; run mistralctl down {wanted.name} first, or give another --out and --name",
                Exit.CONFLICT,
            )
        heard.keep(job.record)
        talk.note(f"{wanted.name} is at work already; this command follows it")
        return job
    if live is not None and live.cluster and live.resources_id != record.resources_id:
        where.remove(live)
        state.save(where.forget(live))
        attempt = replace(attempt, old=None, observed=where.observe(None, record))
    elif live is not None and not live.cluster:
        where.stop(live)  # what a set-up or a training that lost its script left
    where.check(attempt)
    try:
        job = where.start(attempt)
    except UserError as error:
        if where.rents:
            where.give_up(attempt, error)
        _keep_failure(wanted.name, error)
        raise
    heard.keep(replace(job.record, failure=""))
    return job


@dataclass
class _Heard:
    """What a run says while it is followed; the record as it was last saved."""

    talk: Talk
    record: Record | None
    last: Step | None = None

    def keep(self, record: Record) -> None:
        """Save the record."""
        self.record = record
        state.save(record)

    def line(self, text: str) -> None:
        """Take a line of the log."""
        start = text.find(PROGRESS)
        if start < 0:
            return
        try:
            data = json.loads(text[start + len(PROGRESS) :])
            step = Step(
                int(data["step"]),
                int(data["steps"]),
                float(data["loss"]),
                float(data["tokens_per_second"]),
                data.get("left_seconds"),
            )
        except (ValueError, KeyError, TypeError):
            return
        self.last = replace(step, usd=self.usd())
        self.talk.on_step(self.last)

    def usd(self) -> float | None:
        """What the machine has cost so far."""
        record = self.record
        if record is None or record.price is None:
            return None
        return round(record.price * (time.time() - record.created_at) / 3600, 3)


def _keep_failure(name: str, error: UserError) -> None:
    with contextlib.suppress(UserError):
        now = state.read(name)
        if now is not None:
            state.save(replace(now, failure=str(error)))


def _known(name: str) -> dict[str, Any]:
    """What the receipt here says of a result; empty if another machine made it."""
    with contextlib.suppress(UserError):
        return receipt.training(name).result
    return {}


def _end(wanted: Run, where: Runtime, job: Server, heard: _Heard) -> Finetuned:
    """Keep the receipt of a run that was published, and let its machine go."""
    record = heard.record or job.record
    result: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        result = reported.training(where.read(record, f"{files.TUNE.of(record.name)}/published/receipt.json"))
    phases = tuple(durations(job.events))
    receipt.write_training(record, result, phases, heard.usd())
    state.save(replace(record, failure=""))
    down.check(down.run([record.name], everything=False)[1])
    return _result(wanted, "trained", phases, heard, result)


def _result(wanted: Run, action: str, phases: tuple[Phase, ...], heard: _Heard | None, result: dict[str, Any]) -> Finetuned:
    spec = wanted.spec
    served = f"--weights {wanted.out}" if spec.method == "full" else f"--lora {wanted.name}={wanted.out}"
    here = " --cloud local" if wanted.local else ""
    return Finetuned(
        wanted.name, action, wanted.chosen.cloud, wanted.model.name, spec.method, wanted.out, heard.last.loss if heard and heard.last else None,
        heard.usd() if heard else None, phases, f"mistralctl up {spec.model} {served}{here}", str(state.folder(wanted.name) / "up.log"), result,
    )  # fmt: skip


def _interrupted(wanted: Run) -> UserError:
    now = state.read(wanted.name)
    if now is None or now.state == "down":
        return UserError("interrupted; nothing was left half-done", Exit.INTERRUPTED)
    where = "on this machine" if wanted.local else "on its machine, which goes by itself when it is published"
    return UserError(
        f"interrupted; the run may go on {where}: the same command follows it, mistralctl status {wanted.name} says how far it is, mistralctl down "
        f"{wanted.name} ends it",
        Exit.INTERRUPTED,
    )
