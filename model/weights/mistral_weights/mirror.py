"""From one store to another, by way of a folder of this machine: pulled and checked, then pushed, manifest last."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import canary
from .address import Address, parse
from .disk import explained
from .errors import Kind, WeightsError
from .events import Report, silent
from .lock import locked
from .patience import Patience
from .pull import Pull, pull
from .push import Push, push
from .retrying import tried
from .secrets import Secrets
from .stores import Opening, open_store


@dataclass(frozen=True)
class Mirror:
    """What to bring from where to where. `stage` is a folder with room for the set, which stays there.

    Without one it is a folder of the user's cache, the same for the same source, so that a later run continues; it is
    removed once the target is complete. `canary` is a Python with torch that computes the canary's figures for the set.
    """

    source: str
    target: str
    revision: str = ""
    secrets: Secrets = field(default_factory=Secrets)
    form: str = "auto"
    stage: Path | None = None
    patience: Patience = field(default_factory=Patience)
    canary: Path | None = None


@dataclass(frozen=True)
class Mirrored:
    """A set that the target now holds. `fetched` and `sent` count the bytes of this run."""

    source: str
    target: str
    revision: str
    license: str
    files: tuple[str, ...]
    bytes: int
    fetched: int
    sent: int
    seconds: float


def mirror(request: Mirror, report: Report = silent) -> Mirrored:
    """Mirrors a set; run again after any failure, it continues where it was."""
    begun = time.monotonic()
    source, target = parse(request.source, request.revision), parse(request.target)
    if target.scheme in ("hf", "pypi"):
        raise WeightsError(Kind.USAGE, f"weights cannot be written to {target.scheme}://; name a bucket or a folder")
    if target.file:
        raise WeightsError(Kind.USAGE, f"{target} is a file; name the bucket's folder that it goes to")
    if str(source) == str(target):
        raise WeightsError(Kind.USAGE, f"{source} is both source and target; name another target")
    to_folder = target.scheme == "file"
    if not to_folder:
        _require_target(target, request, report)
    stage = Path(target.root) if to_folder else request.stage or _stage(str(source))
    wanted = Pull(
        request.source,
        stage,
        request.revision,
        request.secrets,
        request.form,
        full_check=True,
        patience=request.patience,
    )
    stage = stage.expanduser().resolve()
    with explained(stage.parent):
        stage.parent.mkdir(parents=True, exist_ok=True)
    # Another mirror of this source would take the stage away under the push, or add its canary to it.
    with locked(stage.with_name(f".{stage.name}.mirror.lock"), request.patience.lock, report):
        pulled = pull(wanted, report)
        if request.canary is not None:
            added = canary.add(stage, request.canary)
            if added:
                pulled = replace(pulled, files=tuple(sorted((*pulled.files, canary.FILE))), bytes=pulled.bytes + added)
        sent = pulled.fetched
        if not to_folder:
            sent = push(Push(stage, request.target, request.secrets, patience=request.patience), report).sent
            if request.stage is None:
                shutil.rmtree(stage)
    return Mirrored(
        source=pulled.source,
        target=str(target),
        revision=pulled.revision,
        license=pulled.license,
        files=pulled.files,
        bytes=pulled.bytes,
        fetched=pulled.fetched,
        sent=sent,
        seconds=time.monotonic() - begun,
    )


def _require_target(target: Address, request: Mirror, report: Report) -> None:
    """Asks for what the target holds: a bucket that is not there, or not ours, is said before anything is fetched."""
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(target, Opening(request.secrets, Path(scratch), request.patience))
        try:
            tried(str(target), request.patience, report, store.list)
        except WeightsError as error:
            if error.kind is not Kind.NOT_FOUND:  # nothing there yet
                raise


def _stage(source: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mistralctl" / "mirror" / hashlib.sha256(source.encode()).hexdigest()[:16]
