"""`mistralctl plan`: what would run where, and why not elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import replace

from mistral_contract.envs import PREFIX, variable

from mistralctl import adapters, certificates, checkpoints, keys, lifecycle, node, owners, runtime, state, stores, system, tasks
from mistralctl import plan as planning
from mistralctl.clouds import LOCAL
from mistralctl.config import Sourced
from mistralctl.endpoint import FIRST_PORT
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Do, Step
from mistralctl.plan import Plan
from mistralctl.state import Record
from mistralctl.tasks import env, serve
from mistralctl.tasks.serve import Node

# No option of a deployment: they follow from the others, from this machine, or from what `keys` did.
NOT_SHOWN = set(map(variable, ("serving_id", "port", "node_dir", "python", "keys", "secrets")))


def run(sourced: Sourced, *, ask: bool = False) -> Plan:
    """The plan of a spec; reads this machine's memory and GPUs only when it is to serve, and weights elsewhere only if `ask`."""
    machine = None
    if sourced.spec.cloud == (LOCAL,):
        system.require_serving(sourced.place("cloud"))
        from mistralctl.machine import this_machine

        machine = this_machine()
    model = checkpoints.resolve(sourced, ask=ask)
    spec = sourced.spec.model_copy(update={"lora": adapters.resolve(sourced, model)})
    sourced = replace(sourced, spec=spec)
    endpoints = stores.endpoints((spec.weights or model.weights, *spec.lora.values(), spec.keys_uri or ""), os.environ)
    plan = planning.make(sourced, model, machine, endpoints, adapters.rank(spec.lora))
    record = state.read(plan.name)
    plan = replace(plan, weights_digest=spec.weights_digest or _kept_digest(plan, record))
    if plan.weights_digest and model.stored.digest not in ("", plan.weights_digest):
        raise UserError(
            f"{plan.weights} holds weights with the digest {model.stored.digest}, and {plan.weights_digest} is pinned; if the other weights are "
            f"meant, say --weights-digest {model.stored.digest}",
            Exit.WEIGHTS,
        )
    return replace(plan, lora_versions=adapters.versions(spec.lora, record.task.get("envs", {}) if record else {}))


def refreshed(sourced: Sourced, note: Callable[[str], None]) -> Plan:
    """The plan of a spec with a look at weights and adapters where they lie; `note` is told of an adapter that this machine cannot read."""
    plan = run(sourced, ask=True)
    return replace(plan, lora_versions=adapters.asked(plan, note))


def _kept_digest(plan: Plan, record: Record | None) -> str:
    """The digest of the weights that this name served before; empty for other weights, and for a folder of this machine."""
    if record is None or plan.weights.startswith("file://"):
        return ""
    same = (env(record.task, "weights"), env(record.task, "revision")) == (plan.weights, plan.revision)
    return record.weights_digest if same else ""


def render(sourced: Sourced, port: int | None = None) -> tasks.Task:
    """The task of a spec, as `up --dry-run` prints it."""
    return render_plan(run(sourced), port)


def render_plan(plan: Plan, port: int | None = None, secrets: Collection[str] = ()) -> tasks.Task:
    """The task of a plan, with the keys that are known here. On this machine `port` is where the server listens; a node's is reached by a tunnel.

    `secrets` are the names of those that go to the node beside the task.
    """
    if not plan.local:
        owner = owners.label(state.read(plan.name))
        task = serve.render(plan, owner=owner, node=Node(certificate_id=certificates.own(plan.spec).id if plan.spec.cert else ""))
    else:
        if port is None:
            record = state.read(plan.name)
            port = plan.spec.port or (record.port if record else FIRST_PORT)
        task = serve.render(plan, owner="", node=Node(str(node.local_dir()), port, node.local_python_version()))
    task["envs"] |= {variable("keys"): keys.sent(plan.name), variable("secrets"): json.dumps(awaited(plan, secrets))}
    return task


def awaited(plan: Plan, secrets: Collection[str]) -> list[str]:
    """What the node waits for: of these names those without which it cannot serve, and its address where its certificate names that."""
    found = {"hf_token", "tls_certificate", "tls_key"} & set(secrets)
    return sorted(found | ({"address"} if plan.spec.public and not plan.spec.cert else set()))


def _drift(record: Record) -> str:
    """How what is up differs from what this laptop's last `up` left, by the cloud's and the server's own words; empty if it does not."""
    from mistralctl.commands import status

    [now] = status.run(record.name)
    if now.state == record.state and not now.why:
        return ""
    return f"{now.state} ({now.why})" if now.why else now.state


def steps(plan: Plan, *, refresh: bool = False) -> tuple[Step, ...]:
    """What `up` would do: by this laptop's record alone; with `refresh` cloud and server are asked what is there."""
    record, task = state.read(plan.name), render_plan(plan)
    found = lifecycle.decide(record, task, lifecycle.remembered(record, task))
    if not refresh or found[0].do is Do.REFUSE or record is None or record.state == "down":
        return found
    return lifecycle.decide(record, task, runtime.of(plan.chosen.cloud).observe(record, replace(record, task=task)))


def difference(plan: Plan, *, refresh: bool = False) -> list[str]:
    """What `up` would change of what is up under this name, by this laptop's record; empty if nothing is.

    Asks nobody; with `refresh` its cloud and its server are asked whether it is still as it was, and the steps go on from there.
    """
    record = state.read(plan.name)
    if record is None or record.state == "down":
        return []
    drift = _drift(record) if refresh else ""
    old, new = dict(record.task.get("envs", {})), render_plan(plan)["envs"]
    old[variable("weights_digest")] = record.weights_digest or old.get(variable("weights_digest"), "")
    if not plan.weights_digest:
        old[variable("weights_digest")] = ""
    changed = [
        f"{key.removeprefix(PREFIX).lower()}: {old.get(key) or 'not set'} -> {new.get(key) or 'not set'}"
        for key in sorted({*old, *new} - NOT_SHOWN)
        if old.get(key, "") != new.get(key, "")
    ]
    found = steps(plan, refresh=refresh)
    done = {step.do for step in found}
    if Do.REFUSE in done:
        what = f"it is up on {record.cloud}: run down first, or give another --name"
    elif Do.END_MACHINE in done:
        what = f"another machine is needed: {record.machine} in {record.region} would go, after a yes"
    elif changed or old.get(variable("serving_id")) != new[variable("serving_id")]:
        what = "the server would be replaced on its machine"
    elif refresh:
        what = "nothing would change, and it is as it was" if done == {Do.KEEP} else "up would bring it back"
    else:
        what = "nothing would change; --refresh asks whether it is still as it was"
    taken = [f"would {step.text}" for step in found if refresh and not done & {Do.REFUSE, Do.KEEP}]
    return [*([drift] if drift else []), what, *changed, *taken]
