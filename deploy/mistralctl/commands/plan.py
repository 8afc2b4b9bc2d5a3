"""`mistralctl plan`: what would run where, and why not elsewhere."""

from __future__ import annotations

import os

from mistralctl import checkpoints, node, state
from mistralctl import plan as planning
from mistralctl import task as tasks
from mistralctl.clouds import LOCAL
from mistralctl.config import Sourced
from mistralctl.endpoint import FIRST_PORT
from mistralctl.plan import Plan


def run(sourced: Sourced) -> Plan:
    """The plan of a spec; reads this machine's memory and GPUs only when it is to serve."""
    machine = None
    if sourced.spec.cloud == (LOCAL,):
        from mistralctl.machine import this_machine

        machine = this_machine()
    return planning.make(sourced, checkpoints.resolve(sourced), machine)


def render(sourced: Sourced, port: int | None = None) -> tasks.Task:
    """The task of a spec, as `up --dry-run` prints it."""
    return render_plan(run(sourced), port)


def render_plan(plan: Plan, port: int | None = None) -> tasks.Task:
    """The task of a plan. On this machine `port` is where the server listens; a node's port is reached by a tunnel."""
    owner = tasks.owner(os.environ)
    if plan.chosen.cloud != LOCAL:
        return tasks.render(plan, owner=owner)
    if port is None:
        record = state.read(plan.name)
        port = plan.spec.port or (record.port if record else FIRST_PORT)
    return tasks.render(plan, owner=owner, node_dir=str(node.local_dir()), port=port, python=node.local_python_version())
