"""`mistralctl weights`: a set of weights pulled, mirrored, verified, listed."""

from __future__ import annotations

import os
from pathlib import Path

from mistralctl import mirror as mirrors
from mistralctl import task as tasks
from mistralctl import weights
from mistralctl.errors import Exit, UserError
from mistralctl.mirror import MirrorSpec
from mistralctl.models import MODELS


def _pinned(uri: str, revision: str) -> tuple[str, str]:
    """A row of the table of models stands for its weights, at the commit that the table pins."""
    row = MODELS.get(uri)
    return (row.weights, revision or row.revision) if row else (uri, revision)


def pull(uri: str, folder: Path, revision: str, report: weights.Report, *, full: bool = False) -> weights.Pulled:
    """Brings a set into a folder of this machine."""
    with weights.explained():
        uri, revision = _pinned(uri, revision)
        return weights.pull(weights.Pull(uri, folder, revision, full_check=full), report)


def verify(where: str, revision: str, report: weights.Report) -> weights.Verified:
    """Reads and checks every byte of a set, in a store or in a folder."""
    with weights.explained():
        return weights.verify(weights.Verify(*_pinned(where, revision)), report)


def ls(uri: str, revision: str) -> weights.Listed:
    """What lies at an address, what of it serving needs, and whether we may read it."""
    with weights.explained():
        return weights.ls(weights.Ls(*_pinned(uri, revision)))


def render(spec: MirrorSpec) -> tasks.Task:
    """The task of a mirror, as `weights mirror --dry-run` prints it."""
    return mirrors.render(spec, owner=tasks.owner(os.environ))


def mirror_here(spec: MirrorSpec, stage: Path | None, report: weights.Report) -> weights.Mirrored:
    """Mirrors on this machine, by way of a folder (`stage`; without one it is in the user's cache)."""
    with weights.explained():
        return weights.mirror(weights.Mirror(spec.source, spec.target, spec.revision, stage=stage), report)


def mirror_there(spec: MirrorSpec) -> None:
    """Mirrors on a machine of the target's cloud."""
    render(spec)  # what cannot be a task is said first
    raise UserError(
        "running a mirror on a cloud is not part of this version yet; add --here to run it on this machine, or write the task "
        "with --dry-run > mirror.yaml and give it to sky launch",
        Exit.CLOUD,
    )


def check(result: weights.Verified) -> None:
    """UserError when a set that was verified is damaged."""
    if result.damages:
        raise UserError(
            f"{result.where} is damaged in {len(result.damages)} of {len(result.files)} files; pull or mirror it again",
            Exit.WEIGHTS,
        )
