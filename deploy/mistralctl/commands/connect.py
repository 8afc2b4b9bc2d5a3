"""`mistralctl connect`: opens the tunnel of a deployment again."""

from __future__ import annotations

from mistralctl import runtime, state, tasks
from mistralctl.commands import env
from mistralctl.commands.env import Client


def run(name: str) -> Client:
    """Open the tunnel to a deployment again, on the same port; what its clients need. UserError if it needs no tunnel."""
    record = state.known(name)
    tasks.kind(record.kind).require_endpoint(name)
    runtime.of(record.cloud).reconnect(record)
    return env.run(name)
