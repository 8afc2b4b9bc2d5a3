"""`mistralctl weights`: a set of weights pulled, mirrored, verified, listed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mistral_contract import sets

from mistralctl import checkpoints, node, owners, phases, runtime, state, tasks, weights
from mistralctl.errors import Exit, UserError
from mistralctl.models import MODELS
from mistralctl.phases import PhaseEvent
from mistralctl.runtime.protocol import Attempt
from mistralctl.state import Record
from mistralctl.tasks import mirror as mirrors
from mistralctl.tasks.mirror import LIFETIME_MINUTES, MirrorSpec

MIRROR_SECONDS = LIFETIME_MINUTES * 60.0


@dataclass(frozen=True)
class Mirrored:
    """A mirror that was made on a cloud's machine, which is gone: from where, to where, and the seconds that the bytes took."""

    source: str
    target: str
    cloud: str
    seconds: float


@dataclass(frozen=True)
class Source:
    """Where weights lie, or the row of the table whose weights are meant; `digest` is what they must have, empty: any."""

    where: str
    revision: str = ""
    digest: str = ""

    def pinned(self) -> tuple[str, str]:
        """URI and revision: of a row, at the commit that the table pins. UserError for a digest that is none."""
        if self.digest and not sets.DIGEST.fullmatch(self.digest):
            raise UserError(f"--digest: {self.digest!r} should be sha256: and 64 hexadecimal digits")
        row = MODELS.get(self.where)
        return (row.weights, self.revision or row.revision) if row else (self.where, self.revision)


def pull(source: Source, folder: Path, report: weights.Report, *, full: bool = False) -> weights.Pulled:
    """Brings a set into a folder of this machine."""
    uri, revision = source.pinned()
    with weights.explained():
        return weights.pull(weights.Pull(uri, folder, revision, full_check=full, digest=source.digest), report)


def verify(source: Source, report: weights.Report) -> weights.Verified:
    """Reads and checks every byte of a set, in a store or in a folder."""
    where, revision = source.pinned()
    with weights.explained():
        return weights.verify(weights.Verify(where, revision, digest=source.digest), report)


def ls(uri: str, revision: str) -> weights.Listed:
    """What lies at an address, what of it serving needs, and whether we may read it."""
    with weights.explained():
        return weights.ls(weights.Ls(*Source(uri, revision).pinned()))


def render(spec: MirrorSpec) -> tasks.Task:
    """The task of a mirror, as `weights mirror --dry-run` prints it."""
    return mirrors.render(spec, owner=owners.label(state.read(spec.name)))


def mirror_here(spec: MirrorSpec, stage: Path | None, report: weights.Report) -> weights.Mirrored:
    """Mirrors on this machine, by way of a folder (`stage`; without one it is in the user's cache)."""
    python = node.local_python("cpu") if spec.canary else None
    if python is not None and not python.exists():
        message = (
            f"--canary: torch is not here yet ({python} is missing); make node, or any mistralctl up --cloud local, installs it"
        )
        raise UserError(message, Exit.MACHINE)
    with weights.explained():
        return weights.mirror(weights.Mirror(spec.source, spec.target, spec.revision, stage=stage, canary=python), report)


def mirror_there(
    spec: MirrorSpec, on_phase: Callable[[PhaseEvent], None], note: Callable[[str], None] = lambda text: None
) -> Mirrored:
    """Mirrors on a machine of the target's cloud, which is gone afterwards; UserError, and the machine kept for a look, if that fails."""
    from mistralctl.commands import down

    owners.make(os.environ)
    task = render(spec)
    weights.may_pull([(spec.source, spec.revision)])
    checkpoints.check(spec.source, spec.revision, "SOURCE")
    where = runtime.of(spec.cloud or "")
    state.folder(spec.name).mkdir(parents=True, exist_ok=True, mode=0o700)
    record = Record(
        spec.name, spec.cloud or "", "starting", f"mirror of {spec.source}", "", 0, tasks.NODE_DIR, "", time.time(), False,
        task=task, cluster=where.cluster(spec.name), resources_id=tasks.resources_id(task), kind=mirrors.KIND.name, command=spec.command,
    )  # fmt: skip
    token = weights.hub_token() if spec.source.startswith(weights.HUB) else None
    secrets = {"hf_token": token} if token else {}
    attempt = Attempt(record, secrets, where.observe(None, record), on_phase, state.save, record.created_at, note=note)
    try:
        job = where.start(attempt)
        state.save(job.record)
    except UserError as error:
        where.give_up(attempt, error)
        raise
    except KeyboardInterrupt:
        raise _interrupted(spec.name) from None
    with contextlib.closing(job):
        try:
            job.wait("weights", MIRROR_SECONDS)
        except UserError as error:
            raise UserError(str(error), Exit.WEIGHTS, error.details) from error
        except KeyboardInterrupt:
            raise _interrupted(spec.name) from None
    down.check(down.run([spec.name], everything=False)[1])
    [seconds] = [phase.seconds for phase in phases.durations(job.events) if phase.phase == "weights"]
    return Mirrored(spec.source, spec.target, record.cloud, seconds)


def _interrupted(name: str) -> UserError:
    return UserError(
        f"interrupted; the mirror may go on on its machine, which goes by itself: mistralctl logs {name} says how far it is, mistralctl "
        f"down {name} ends it",
        Exit.INTERRUPTED,
    )


def check(result: weights.Verified) -> None:
    """UserError when a set that was verified is damaged."""
    if result.damages:
        raise UserError(
            f"{result.where} is damaged in {len(result.damages)} of {len(result.files)} files; pull or mirror it again",
            Exit.WEIGHTS,
        )
