"""Checkpoints that are whole or not used: sealed on this disk, kept in two slots of the store of which one is whole at any time."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from mistral_weights.seal import seal, sealed

from mistral_tune import log
from mistral_tune.errors import TuneError
from mistral_tune.job import Job
from mistral_tune.store import Store, StoreError, finish

SLOTS = ("a", "b")
STEP = re.compile(r"checkpoint-(\d+)")
# What the Trainer keeps an optimizer in: one file, or a folder of shards.
OPTIMIZER = re.compile(r"optimizer\.pt|optimizer_\d+/.+")


def revision(identity: str, step: int) -> str:
    """Return the revision under which a checkpoint is sealed.

    >>> revision("9f3c", 12)
    '9f3c-step-00000012'
    """
    return f"{identity}-step-{step:08d}"


def step_of(found: str, identity: str) -> int:
    """Return the step of a checkpoint by its revision; -1 if it is none of this run.

    >>> step_of("9f3c-step-00000012", "9f3c")
    12
    """
    match = re.fullmatch(re.escape(identity) + r"-step-(\d{8})", found)
    return int(match[1]) if match else -1


@dataclass
class Checkpoints:
    """The checkpoints of one run, here and in the store. One upload runs at a time, beside the training."""

    job: Job
    store: Store
    _upload: subprocess.Popen[str] | None = None
    _newest_slot: str = ""
    _failures: list[str] = field(default_factory=list)

    @property
    def uri(self) -> str:
        """Where the slots lie."""
        return f"{self.job.wanted.out.rstrip('/')}/checkpoints"

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint, brought from the store where that has a newer one; None to begin anew.

        TuneError if it lacks its optimizer: training would go on as another run. What lies here and is not whole is taken away.
        """
        here = self._here()
        there = self._there()
        if there and max(there) > max(here, default=-1):
            here = self._bring(there) or here
        if not here:
            return None
        folder = here[max(here)]
        found = sealed(folder)
        if found is None or not any(OPTIMIZER.fullmatch(file.name) for file in found.manifest.files):
            raise TuneError(
                f"the checkpoint of step {max(here)} has no optimizer, and training would go on as another run; begin anew with --restart"
            )
        return folder

    def _here(self) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for folder in sorted(self.job.checkpoints.glob("checkpoint-*")):
            if (installed := sealed(folder)) is None:
                log.line(f"{folder.name} on this disk is not whole: it is not used")
                shutil.rmtree(folder)
                continue
            step = step_of(installed.manifest.revision, self.job.identity)
            if step < 0:
                raise self._another(str(folder.parent))
            found[step] = folder
        return found

    def _there(self) -> dict[int, str]:
        found = {}
        for slot in SLOTS:
            if there := self.store.look(f"{self.uri}/{slot}")[0]:
                step = step_of(there, self.job.identity)
                if step < 0:
                    raise self._another(self.uri)
                found[step] = slot
        if found:
            self._newest_slot = found[max(found)]
        return found

    def _bring(self, there: dict[int, str]) -> dict[int, Path] | None:
        for step in sorted(there, reverse=True):
            folder = self.job.checkpoints / f"checkpoint-{step}"
            try:
                self.store.ask("pull", f"{self.uri}/{there[step]}", folder, "--format", "folder")
            except StoreError as error:
                log.line(f"the checkpoint of step {step} at {self.uri}/{there[step]} is not used: {error}")
                continue
            self._newest_slot = there[step]
            return {step: folder}
        return None

    def _another(self, place: str) -> TuneError:
        return TuneError(f"{place} holds checkpoints of another run; name another --out, or begin anew with --restart")

    def begin(self) -> Path | None:
        """Return the checkpoint to go on from, None to begin. What `restart` asks to take away is taken away once."""
        job = self.job
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        if job.wanted.restart and not job.begun.exists() and not self._began_elsewhere():
            self.clear()
            shutil.rmtree(job.result, ignore_errors=True)
            job.checkpoints.mkdir()
        found = self.newest()
        if job.wanted.restart:
            job.begun.touch()
        else:
            job.begun.unlink(missing_ok=True)
        return found

    def _began_elsewhere(self) -> bool:
        """Whether this beginning has left a checkpoint in the store: another machine goes on with it."""
        mark = self.job.began_with
        return bool(mark) and any(self.store.look(f"{self.uri}/{slot}")[1].endswith(f"#{mark}") for slot in SLOTS)

    def clear(self) -> None:
        """Take away all checkpoints of this address, here and there: the run begins anew, or has ended."""
        self.wait()
        for slot in SLOTS:
            self.store.ask("remove", f"{self.uri}/{slot}")
        shutil.rmtree(self.job.checkpoints, ignore_errors=True)

    def keep(self, folder: Path, step: int) -> None:
        """Seal a checkpoint and begin to upload it to the slot that does not hold the newest."""
        self.wait()
        self._seal(folder, step)
        slot = next(slot for slot in SLOTS if slot != self._newest_slot)
        self._upload = self.store.start("push", folder, f"{self.uri}/{slot}")
        self._newest_slot = slot

    def _seal(self, folder: Path, step: int) -> None:
        mark = f"#{self.job.began_with}" if self.job.began_with else ""
        seal(folder, self.job.wanted.out + mark, revision(self.job.identity, step))

    def wait(self) -> None:
        """Wait for the upload that runs. One that fails does not end the training: the next is tried."""
        if self._upload is None:
            return
        upload, self._upload = self._upload, None
        try:
            finish(upload)
        except StoreError as error:
            self._newest_slot = next(slot for slot in SLOTS if slot != self._newest_slot)
            self._failures.append(str(error))
            log.line(f"a checkpoint was not uploaded: {error}")
