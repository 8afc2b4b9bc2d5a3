"""`mistralctl up`: a deployment that answers, or an error and nothing left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mistralctl import adapters, certificates, endpoint, figures, gate, phases, readiness, refusals, state, system
from mistralctl.clouds import LOCAL
from mistralctl.commands import plan as plan_command
from mistralctl.commands import receipt
from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.fit import disk_bytes
from mistralctl.node import local_dir
from mistralctl.phases import Phase, PhaseEvent
from mistralctl.plan import Plan
from mistralctl.state import Record


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


def _from_hub(plan: Plan) -> bool:
    return any(uri.startswith("hf://") for uri, _ in plan.sources)


def _secrets(plan: Plan) -> dict[str, str]:
    """What goes to the node beside the task: the key, the hub's token where the hub is asked, and what is no secret, but came from a
    node: figures for the canary."""
    found = {"api_key": state.api_key(plan.name)}
    if known := figures.known(plan.model.name if plan.model.shape else "custom"):
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

    there = plan.chosen.cloud == LOCAL and weights.is_there(local_dir() / "weights" / plan.weights_id)
    weights.may_pull(plan.sources[1:] if there else plan.sources)


def _result(record: Record, plan: Plan, action: str, answer: str) -> UpResult:
    folder = state.folder(record.name)
    return UpResult(
        record.name, action, record.cloud, record.model, record.served_model_name, record.base_url,
        str(folder / "api_key"), answer, record.chat, plan.spec.idle, plan.spec.ttl,
        tuple(Phase(**phase) for phase in record.phases), str(folder / "up.log"), record.gate,
        str(certificates.bundle_file(record.name)) if record.public else "", record.address, receipt.canary(record.name),
    )  # fmt: skip


def _others_ports(name: str) -> set[int]:
    records = (state.read(other) for other in state.names() if other != name)
    return {record.port for record in records if record is not None and record.state != "down" and not record.public}


def _local(sourced: Sourced, plan: Plan, offline: bool, on_phase: Callable[[PhaseEvent], None]) -> UpResult:
    from mistralctl.runtime import local

    old = state.read(plan.name)
    if old is not None and old.cluster and old.state != "down":
        raise UserError(
            f"{plan.name} runs on {old.cloud}; run mistralctl down {plan.name}, or give another --name", Exit.CONFLICT
        )
    running = old is not None and old.cloud == LOCAL and local.alive(old.pid, old.pid_started)
    place = sourced.place("port") if plan.spec.port else f"port of {plan.name}"
    port = endpoint.choose_port(plan.spec.port, old.port if old else None, _others_ports(plan.name), place=place, ours=running)
    task = plan_command.render_plan(plan, port)
    serving_id = task["envs"]["MISTRALCTL_SERVING_ID"]
    if (
        old is not None and running and old.state == "up" and old.serving_id == serving_id
        and readiness.answers(old)
    ):  # fmt: skip
        return _result(old, plan, "unchanged", "")
    shape = plan.model.shape
    local.check_disk(task, disk_bytes(shape, plan.model.stored) if shape else 0)
    if not offline:
        _check_hub(plan)
    serves = running and old is not None and old.state == "up"
    if old is not None and old.pid is not None and running and not serves:
        local.end(old.pid)  # what an `up` that was killed left: its set-up, or a server that nobody was let into
    action = "replaced" if serves else "started"
    log = local.Log(state.folder(plan.name) / "up.log")
    events: list[PhaseEvent] = []
    record = Record(
        plan.name, LOCAL, "starting", plan.model.name, plan.served_model_name, port, str(local_dir()), serving_id,
        time.time(), plan.model.chat, task=task,
    )  # fmt: skip

    def hear(event: PhaseEvent) -> None:
        events.append(event)
        on_phase(event)

    def remember(pid: int, started: float) -> None:
        nonlocal record
        record = replace(record, pid=pid, pid_started=started)
        state.save(record)

    if old is not None and serves and old.pid is not None:
        local.set_up(task, _secrets(plan), log, hear, lambda pid, started: None)  # while the old server serves
        local.end(old.pid)
    state.save(record)
    try:
        if not serves:
            local.set_up(task, _secrets(plan), log, hear, remember)
        pid = local.serve(task, log, hear, remember)
        try:
            record, answer = gate.pass_through(record, hear)
        except BaseException:
            local.end(pid, drain=3)
            raise
    except BaseException:
        local.remove_run(record.run_dir)
        if old is None:
            state.forget(plan.name)
        else:
            state.save(replace(old, state="down", pid=None, pid_started=None))
        raise
    record = replace(record, state="up", phases=tuple(asdict(phase) for phase in phases.durations(events)))
    state.save(record)
    figures.keep(record, receipt.write(record).canary)
    return _result(record, plan, action, answer)


def _cloud(
    sourced: Sourced, plan: Plan, offline: bool, on_phase: Callable[[PhaseEvent], None], confirm: Callable[[str], bool],
    note: Callable[[str], None],
) -> UpResult:  # fmt: skip
    from mistralctl.commands import launch, preflight
    from mistralctl.runtime import sky

    def check(machine_goes: bool) -> None:
        for right in plan.rights:
            if right.has == "no" or (right.has == "grant" and not sky.own_identity(right.cloud)):
                note(right.line)
        if not offline:
            preflight.check(plan, note, limits_only=machine_goes)

    done = launch.run(sourced, plan, _secrets(plan), _others_ports(plan.name), on_phase, confirm, check)
    record, action, answer = done
    if action != "unchanged":
        figures.keep(record, receipt.write(record).canary)
    launched = action == "started" and any(phase["phase"] == "provision" for phase in record.phases)
    if launched and (told := refusals.on_the_way(state.folder(record.name) / "up.log")):
        note(told)
    return _result(record, plan, action, answer)


def run(
    sourced: Sourced, on_phase: Callable[[PhaseEvent], None], confirm: Callable[[str], bool], note: Callable[[str], None],
    *, offline: bool = False,
) -> UpResult:  # fmt: skip
    """Brings the deployment up; UserError if that fails, and then on this machine nothing is left behind.

    `confirm` is asked before a machine is replaced by another one, `note` is told of what stops nobody; `offline`: neither the hub
    nor the clouds' quotas are asked before anything is rented.
    """
    from filelock import FileLock, Timeout

    system.require_renting("up")
    plan = plan_command.run(sourced, ask=not offline)
    for line in plan.caveats:
        note(line)
    if not offline:
        plan = replace(plan, lora_versions=adapters.asked(plan, note))
    if plan.chosen.cloud != LOCAL and not offline:
        _check_hub(plan)
    folder = state.folder(plan.name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(folder / "lock", timeout=0):
            if plan.chosen.cloud == LOCAL:
                return _local(sourced, plan, offline, on_phase)
            return _cloud(sourced, plan, offline, on_phase, confirm, note)
    except Timeout:
        raise UserError(f"{plan.name} is being brought up or down already; wait for that to end", Exit.CONFLICT) from None
