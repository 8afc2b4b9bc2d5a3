"""What a run of training is told, where its files lie, and what tells it from another run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mistral_contract import envs
from mistral_contract.envs import Finetune

from mistral_tune.errors import TuneError

# What the numbers of a training depend on besides its data and options.
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Job:
    """A run: what the contract says, and the files with its chats. `held_out` is None where a share of the chats is held out."""

    wanted: Finetune
    chats: Path
    held_out: Path | None = None

    @property
    def run_dir(self) -> Path:
        """The folder of this run on the node."""
        return self.wanted.node_dir / "run" / self.wanted.name

    @property
    def folder(self) -> Path:
        """Where training keeps its files."""
        return self.run_dir / "tune"

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer writes its checkpoints."""
        return self.folder / "checkpoints"

    @property
    def result(self) -> Path:
        """The sealed result: the adapter, or all weights."""
        return self.folder / "result"

    @property
    def begun(self) -> Path:
        """There once a run has begun on this machine: what `restart` clears was cleared."""
        return self.folder / f"begun-{self.identity}"

    @property
    def weights(self) -> Path:
        """The base model as it was pulled."""
        return self.wanted.node_dir / "weights" / self.wanted.weights_id

    @property
    def weights_python(self) -> Path:
        """The Python of the weights tool, with the SDK of the store that the result goes to."""
        return self.run_dir / "weights-tool" / "bin" / "python"

    @property
    def secrets(self) -> Path:
        """What the laptop sent."""
        return self.run_dir / "secrets.json"

    @cached_property
    def identity(self) -> str:
        """Return what stands for all that the result depends on: MISTRALCTL_RUN_ID, and the hash of options, chats, devices and libraries."""
        wanted = self.wanted
        facts = {
            "weights_id": wanted.weights_id, "revision": wanted.revision, "window": wanted.sliding_window,
            "dtype": wanted.dtype, "tokenizer": wanted.tokenizer_mode, "method": wanted.method, "epochs": wanted.epochs,
            "max_length": wanted.max_length, "rank": wanted.rank, "learning_rate": wanted.learning_rate,
            "batch_tokens": wanted.batch_tokens, "seed": wanted.seed, "processes": wanted.gpus, "device": wanted.device,
            "chats": _digest(self.chats), "held_out": _digest(self.held_out) if self.held_out else "",
            "libraries": libraries(),
        }  # fmt: skip
        return f"{wanted.run_id or 'run'}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"

    @property
    def began_with(self) -> str:
        """Return what names the beginning of a run that was begun anew, the same on every machine that goes on with it; empty if it was not.

        SkyPilot's managed jobs keep the id of a task over recoveries.
        """
        task = os.environ.get("SKYPILOT_TASK_ID", "")
        return hashlib.sha256(task.encode()).hexdigest()[:12] if self.wanted.restart and task else ""


def read(chats: Path, held_out: Path | None, environ: Mapping[str, str] = os.environ) -> Job:
    """Return the run that the envs of docs/contract.md tell of; TuneError if they are wrong."""
    try:
        return Job(envs.read(Finetune, environ), chats, held_out)
    except ValueError as error:
        raise TuneError(f"the contract is wrong: {error}") from None


def libraries() -> dict[str, str]:
    """Return the versions of what trains; empty text for what is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TuneError(f"{path} cannot be read ({error.strerror}); check the file with the chats") from None
