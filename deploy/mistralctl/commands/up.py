"""`mistralctl up`: a deployment that answers, or an error and nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_contract import files

from mistralctl import (
    certificates,
    endpoint,
    figures,
    key_places,
    keys,
    lifecycle,
    owners,
    processes,
    refusals,
    runtime,
    state,
    system,
)
from mistralctl.apply import Up
from mistralctl.commands import plan as plan_command
from mistralctl.commands import preflight, receipt
from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.fields import words
from mistralctl.fit import disk_bytes
from mistralctl.lifecycle import Do, Step
from mistralctl.node import local_dir
from mistralctl.phases import Phase, PhaseEvent
from mistralctl.plan import Plan
from mistralctl.runtime import sky
from mistralctl.runtime.protocol import Attempt
from mistralctl.state import Record
from mistralctl.tasks import env, resources_id, serving_name
from mistralctl.tasks.serve import node_port


@dataclass(frozen=True)
class UpResult:
    """An endpoint that answered. `action` says what was done: `started`, `replaced` or `unchanged`."""

    name: str
    action: str
    cloud: str
    model: str
    served_model_name: str
    base_url: str
    key_file: str
    answer: str
    chat: bool
    idle: str
    ttl: str
    phases: tuple[Phase, ...]
    log: str
    gate: dict[str, Any]
    ssl_cert_file: str
    address: str
    canary: dict[str, Any]
    budget: float | None = None


def _from_hub(plan: Plan) -> bool:
    return any(uri.startswith("hf://") for uri, _ in plan.sources)


def _secrets(plan: Plan, note: Callable[[str], None]) -> dict[str, str]:
    """What goes to the node beside the task: the hub's token where the hub is asked, the user's own certificate with its key, and what is no
    secret, but came from a node: figures for the canary."""
    found = {}
    if known := figures.known(plan.model.name if plan.model.shape else "custom", note):
        found["figures"] = json.dumps(known)
    if plan.spec.cert:
        certificate = certificates.own(plan.spec)
        found |= {"tls_certificate": certificate.chain, "tls_key": certificate.key}
    if _from_hub(plan):
        from mistralctl import weights

        token = weights.hub_token()
        if token:
            found["hf_token"] = token
    return found


def _check_hub(plan: Plan) -> None:
    """UserError, naming the page to open, when the hub does not let this user at the model; before anything is rented."""
    if not _from_hub(plan):
        return
    from mistralctl import weights

    there = plan.local and weights.is_there(local_dir() / files.WEIGHTS.name / plan.weights_id)
    weights.may_pull(plan.sources[1:] if there else plan.sources)


def _result(record: Record, plan: Plan, action: str, answer: str) -> UpResult:
    folder = state.folder(record.name)
    return UpResult(
        record.name, action, record.cloud, record.model, record.served_model_name, record.base_url,
        str(folder / "api_key"), answer, record.chat, plan.spec.idle, plan.spec.ttl,
        tuple(Phase(**phase) for phase in record.phases), str(folder / "up.log"), record.gate,
        str(certificates.bundle_file(record.name)) if record.public else "", record.address, receipt.canary(record.name),
        plan.spec.budget,
    )  # fmt: skip


def _others_ports(name: str) -> set[int]:
    records = (record for record in state.every()[0] if record.name != name)
    return {record.port for record in records if record.state != "down" and not record.public}


@dataclass(frozen=True)
class Talk:
    """How `up` speaks with the user: of its phases, a question before a machine goes, a note on what stops nobody."""

    on_phase: Callable[[PhaseEvent], None]
    confirm: Callable[[str], bool]
    note: Callable[[str], None]


def _port(sourced: Sourced, plan: Plan, old: Record | None) -> int:
    """The port of the endpoint: the node's own where it is public, otherwise one of this machine."""
    if plan.spec.public:
        return node_port(plan)
    held = old is not None and bool(processes.of(old))  # by its server, or by the tunnel to it
    remembered = old.port if old is not None and not old.public else None
    place = sourced.place("port") if plan.spec.port else f"port of {plan.name}"
    return endpoint.choose_port(plan.spec.port, remembered, _others_ports(plan.name), place=place, ours=held)


def _command(plan: Plan) -> str:
    """The command line that brings the same up on the same cloud."""
    return shlex.join(["mistralctl", "up", *words(plan.spec.model_copy(update={"cloud": (plan.chosen.cloud,)}))])


def _wanted(plan: Plan, port: int, old: Record | None, secrets: Collection[str]) -> Record:
    """The record of the deployment as it will be; a machine that stays keeps its age and its set-up."""
    task = plan_command.render_plan(plan, port, secrets)
    cluster = runtime.of(plan.chosen.cloud).cluster(plan.name)
    if cluster:
        task["name"] = serving_name(task)
    record = Record(
        plan.name, plan.chosen.cloud, "starting", plan.model.name, plan.served_model_name, port, env(task, "node_dir"),
        env(task, "serving_id"), time.time(), plan.model.chat, task=task, cluster=cluster,
        resources_id=resources_id(task), public=plan.spec.public, host=certificates.own(plan.spec).host if plan.spec.cert else "",
        weights_digest=plan.weights_digest, command=_command(plan),
    )  # fmt: skip
    stays = old is not None and old.state != "down" and old.cluster and old.resources_id == record.resources_id
    if old is None or not stays:
        return record
    return replace(record, created_at=old.created_at, setup_id=old.setup_id, account=old.account)


def _check(plan: Plan, old: Record | None, talk: Talk, *, offline: bool) -> Callable[[Sequence[Step]], None]:
    """What is asked first: whether the weights may be read, which rights a rented machine's role lacks, the clouds' quotas."""

    def check(steps: Sequence[Step]) -> None:
        if not offline and old is not None:
            _check_hub(plan)
        if not any(step.do is Do.RENT for step in steps):
            return
        for right in plan.rights:
            if right.has == "no" or (right.has == "grant" and not sky.own_identity(right.cloud)):
                talk.note(right.line)
        if not offline:  # what is in use may be our own machine, which goes or went
            preflight.check(plan, talk.note, limits_only=old is not None and old.state != "down")

    return check


def _endless_is_accepted(plan: Plan, steps: Sequence[Step], talk: Talk) -> bool:
    """Whether steps start a server, and the user was asked if it may cost for ever; UserError on a no."""
    starts = steps[0].do is not Do.KEEP
    if starts and plan.endless and not talk.confirm(plan.endless):
        raise UserError(f"{plan.endless}; add --budget USD or a --ttl, or say --yes", Exit.USAGE)
    return starts


def _bring_up(sourced: Sourced, plan: Plan, talk: Talk, *, offline: bool) -> UpResult:
    """Observe, decide, apply, until the steps end with a server that answers."""
    where = runtime.of(plan.chosen.cloud)
    if where.rents:
        owners.make(os.environ)
    began, shape, secrets, accepted = time.time(), plan.model.shape, _secrets(plan, talk.note), False
    while True:
        old = state.read(plan.name)
        record = _wanted(plan, _port(sourced, plan, old), old, secrets)
        steps = lifecycle.decide(old, record.task, lifecycle.remembered(old, record.task))
        if steps[0].do is Do.REFUSE:
            raise UserError(steps[0].text, Exit.CONFLICT)
        accepted = accepted or _endless_is_accepted(plan, steps, talk)
        if not offline and old is None:  # before SkyPilot takes its time to start
            _check_hub(plan)
        observed = where.observe(old, record)
        steps = lifecycle.decide(old, record.task, observed)
        if steps[0].do is Do.KEEP and old is not None:
            return _result(old, plan, "unchanged", "")
        for question in (step.ask for step in steps if step.ask):
            if not talk.confirm(question):
                raise UserError(f"{question}; say --yes to do that, or give the new one another --name", Exit.CONFLICT)
        accepted = accepted or _endless_is_accepted(plan, steps, talk)
        attempt = Attempt(
            record,
            secrets,
            observed,
            talk.on_phase,
            state.save,
            began,
            old,
            disk_bytes(shape, plan.model.stored) if shape else 0,
            talk.note,
        )
        up = Up(where, attempt, _check(plan, old, talk, offline=offline))
        up.run(steps)
        if steps[-1].do is not Do.LOOK:
            return _done(plan, up, steps, talk)


def _done(plan: Plan, up: Up, steps: Sequence[Step], talk: Talk) -> UpResult:
    """The result of an `up` that came to its end, its receipt written."""
    written = receipt.write(up.record)
    figures.keep(up.record, written.canary)
    if written.weights_digest and written.weights_digest != up.record.weights_digest:
        state.save(replace(up.record, weights_digest=written.weights_digest))
    done = {step.do for step in steps}
    launched = any(phase["phase"] == "provision" for phase in up.record.phases)
    if launched and (told := refusals.on_the_way(state.folder(plan.name) / "up.log")):
        talk.note(told)
    return _result(up.record, plan, "replaced" if done & {Do.STOP, Do.REPLACE} else "started", up.answer)


def run(sourced: Sourced, talk: Talk, *, offline: bool = False, key_file: Path | None = None) -> UpResult:
    """Bring the deployment up; UserError if that fails, and then on this machine nothing is left behind.

    `offline`: neither the hub nor the clouds' quotas are asked before anything is rented. `key_file` holds a key that the user brings.
    """
    system.require_renting("up")
    plan = plan_command.run(sourced) if offline else plan_command.refreshed(sourced, talk.note)
    for line in [*plan.caveats, *plan.bought]:
        talk.note(line)
    with state.locked(plan.name, "up"):
        old = state.read(plan.name)
        keys.prepare(plan.name, key_file, running=old is not None and old.state != "down")
        if plan.spec.keys_uri:
            key_places.join(plan.name, plan.spec.keys_uri)
        try:
            return _bring_up(sourced, plan, talk, offline=offline)
        except UserError as error:
            if error.code != Exit.INTERRUPTED:
                _keep_failure(plan.name, error)
            raise
        except KeyboardInterrupt:
            raise UserError(_interrupted(plan.name), Exit.INTERRUPTED) from None


def _keep_failure(name: str, error: UserError) -> None:
    """Note in the record why an `up` came to nothing, unless a server that was up before is still."""
    with suppress(UserError):
        now = state.read(name)
        if now is not None and now.state != "up":
            state.save(replace(now, failure=str(error)))


def _interrupted(name: str) -> str:
    """What still goes on of an `up` that was interrupted."""
    now = state.read(name)
    if now is None or (now.state == "down" and not processes.of(now)):
        return "interrupted; nothing was left half-done"
    if now.state == "up":
        return f"interrupted; {name} serves as before, or will again after {now.again}: mistralctl status {name}"
    return (
        f"interrupted; something of {name} may be there by now: {now.again} goes on with it, mistralctl down {name} takes it away"
    )
