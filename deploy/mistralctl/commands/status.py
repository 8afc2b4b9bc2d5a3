"""`mistralctl status`: what is up, as its own processes say."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from mistralctl import readiness, state


@dataclass(frozen=True)
class Status:
    """A deployment now. `state` is `up`, `starting`, `down`, or `lost` (it ended without `down`: idle, ttl or a crash).

    `idle_left` and `ttl_left` are minutes; None where there is no limit or nothing runs. `launcher` is its status.json.
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


def _left(limit: str, since: float | None) -> float | None:
    return None if not limit or since is None else round(max(0.0, int(limit) - (time.time() - since) / 60), 1)


def _one(name: str) -> Status:
    from mistralctl.runtime import local

    record = state.known(name)
    launcher = local.read_status(record.run_dir)
    living = local.alive(record.pid, record.pid_started)
    now: str = record.state
    why = ""
    if record.state != "down" and not living:
        error = (launcher or {}).get("error") or {}
        now, why = "lost", str(error.get("message") or "its process is gone; run up again, or down to forget it")
    elif record.state == "up" and not readiness.answers(record.base_url, state.api_key(name)):
        now, why = "starting", "it does not answer"
    up = now in ("up", "starting")
    envs = record.task.get("envs", {})
    launcher = launcher if up or now == "lost" else None
    last = ((launcher or {}).get("requests") or {}).get("last_at") or (launcher or {}).get("ready_at")
    return Status(
        name, now, record.cloud, record.model, record.base_url if up else None,
        round((time.time() - record.created_at) / 60, 1) if up else None,
        _left(envs.get("MISTRALCTL_IDLE_MINUTES", ""), last) if up else None,
        _left(envs.get("MISTRALCTL_TTL_MINUTES", ""), record.created_at) if up else None,
        why, launcher,
    )  # fmt: skip


def run(name: str | None) -> list[Status]:
    """One deployment, or all that are known."""
    return [_one(one) for one in ([name] if name is not None else state.names())]
