"""`mistralctl down`: takes a deployment away and makes sure of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mistralctl import apply, key_places, lifecycle, runtime, state
from mistralctl.commands import receipt
from mistralctl.errors import Exit, UserError
from mistralctl.runtime import leftovers
from mistralctl.state import Record, Unreadable

LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class DownResult:
    """A deployment that is gone: `was` is `up` or `down`, `failed` where it never came up, `damaged` where its record could
    not be read.

    `left` says what of it others have to take away.
    """

    name: str
    was: str
    left: str = ""


def _one(name: str) -> DownResult:
    try:
        record = state.known(name)
    except Unreadable as error:
        return _unreadable(name, error)
    left = key_places.leave(record)
    there = _take_down(record)
    if record.failure and record.state == "down" and not there and not receipt.path(name).exists():
        state.forget(name)
        return DownResult(name, "failed", left)
    if record.failure:
        state.save(replace(state.known(name), failure=""))
    return DownResult(name, "up" if there else "down", left)


def _take_down(record: Record) -> bool:
    where = runtime.of(record.cloud)
    return apply.down(lifecycle.take_down(record, where.observe(record, None)), where, record)


def _unreadable(name: str, error: Unreadable) -> DownResult:
    """Take away what a deployment's name alone says; its record is kept beside the new one."""
    if error.state == "newer" or not state.is_name(name):
        raise error
    left = leftovers.take_down(name, error)
    state.set_aside(name)
    state.save(left)
    return DownResult(name, "damaged")


def check(failures: Sequence[UserError]) -> None:
    """UserError if something could not be taken away."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise UserError(
            "; ".join(map(str, failures)), failures[0].code, "\n".join(one.details for one in failures if one.details)
        )


def run(names: Sequence[str], *, everything: bool) -> tuple[list[DownResult], list[UserError]]:
    """Takes the named deployments away (or all that are known), one after the other; what went wrong with one stops no other."""
    if everything and names:
        raise UserError("--all: names are given as well; leave one of the two out")
    if not everything and not names:
        raise UserError("NAME: none is given; name a deployment or say --all (mistralctl status lists them)")
    wanted = state.names() if everything else list(dict.fromkeys(names))
    done: list[DownResult] = []
    failures: list[UserError] = []
    for name in wanted:
        try:
            state.known(name)
        except Unreadable:
            continue
    for name in wanted:
        try:
            with state.locked(name, "down", seconds=LOCK_SECONDS):
                done.append(_one(name))
                receipt.close(name)  # before the next `up` writes another
        except UserError as error:
            failures.append(error)
        except KeyboardInterrupt:
            rest = wanted[wanted.index(name) :]
            raise UserError(
                f"interrupted; {name} may be half taken away, and what was begun may still end: mistralctl down {' '.join(rest)} goes on",
                Exit.INTERRUPTED,
            ) from None
    return done, failures
