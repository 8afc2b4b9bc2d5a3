"""`mistralctl down`: takes a deployment away and makes sure of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mistralctl import endpoint, state
from mistralctl.clouds import GOING, Part, listing
from mistralctl.commands import receipt
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record
from mistralctl.tasks import owner

GONE_SECONDS = 300.0
CLOCKS_SECONDS = 120.0  # by which a cloud's clock may differ from this machine's
PROMISE_SECONDS = 15.0  # after which a machine that is not on its way out was not taken away by SkyPilot


@dataclass(frozen=True)
class DownResult:
    """A deployment that is gone: `was` is `up` or `down`."""

    name: str
    was: str


def wait_until_gone(record: Record, *, promised: bool, since: float = 0.0) -> list[Part]:
    """Waits until the cloud's own listing has nothing of this deployment any more (`since`: nothing that was made since then), and says
    what stays of it; UserError with the list if that does not come.

    What SkyPilot does not take away is deleted here: what outlived its machine, and the machine too if SkyPilot has not
    `promised` to delete it or has promised what does not come.
    """
    module = listing(record.cloud)
    began, asked = time.monotonic(), set[str]()
    while True:
        found = module.ours(owner(os.environ), record.name, [record.region] if record.region else None)
        left = [part for part in found if not since or (part.created or 0.0) > since - CLOCKS_SECONDS]
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
        try:
            module.delete(alone)
        except UserError as error:
            raise UserError(f"{record.name}: {len(left)} of it stay on {record.cloud}: {error}", Exit.CLOUD, rows) from error
        asked |= {part.id for part in alone}
        time.sleep(2)


def _cloud(record: Record) -> DownResult:
    from mistralctl.runtime import sky, ssh

    ssh.end_tunnel(record.pid, record.pid_started)
    there = sky.down(record.cluster, state.folder(record.name) / "down.log")
    if there or record.state != "down":
        wait_until_gone(record, promised=there)
    state.save(replace(record, state="down", pid=None, pid_started=None))
    ssh.config_file(record.name).unlink(missing_ok=True)
    return DownResult(record.name, "up" if there else "down")


def _one(name: str) -> DownResult:
    from filelock import FileLock, Timeout

    from mistralctl.runtime import local

    state.known(name)
    try:
        with FileLock(state.folder(name) / "lock", timeout=60):
            record = state.known(name)
            if record.cluster:
                return _cloud(record)
            living = local.alive(record.pid, record.pid_started)
            rest = local.members(record.pid) if record.pid is not None and not living and record.state != "down" else []
            if record.pid is not None and (living or rest):
                local.end(record.pid)
            local.remove_run(record.run_dir)
            state.save(replace(record, state="down", pid=None, pid_started=None))
            left = local.members(record.pid) if record.pid is not None and (living or rest) else []
            if left or (living and not endpoint.is_free(record.port)):
                raise UserError(
                    f"{name}: processes {', '.join(str(p.pid) for p in left) or '?'} still hold port {record.port}; end them "
                    "by hand",
                    Exit.MACHINE,
                )
            return DownResult(name, "up" if living else "down")
    except Timeout:
        raise UserError(f"{name} is being brought up; press Ctrl-C there, then run down again", Exit.CONFLICT) from None


def run(names: Sequence[str], *, everything: bool) -> list[DownResult]:
    """Takes the named deployments away (or all that are known), one after the other."""
    if everything and names:
        raise UserError("--all: names are given as well; leave one of the two out")
    if not everything and not names:
        raise UserError("NAME: none is given; name a deployment or say --all (mistralctl status lists them)")
    wanted = state.names() if everything else list(dict.fromkeys(names))
    for name in wanted:
        state.known(name)
    done = []
    for name in wanted:
        done.append(_one(name))
        receipt.close(name)
    return done
