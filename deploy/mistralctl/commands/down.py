"""`mistralctl down`: takes a deployment away and makes sure of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mistralctl import apply, lifecycle, runtime, state
from mistralctl.commands import receipt
from mistralctl.errors import Exit, UserError


@dataclass(frozen=True)
class DownResult:
    """A deployment that is gone: `was` is `up` or `down`."""

    name: str
    was: str


def _one(name: str) -> DownResult:
    from filelock import FileLock, Timeout

    state.known(name)
    try:
        with FileLock(state.folder(name) / "lock", timeout=60):
            record = state.known(name)
            where = runtime.of(record.cloud)
            there = apply.down(lifecycle.take_down(record, where.observe(record, None)), where, record)
            return DownResult(name, "up" if there else "down")
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
