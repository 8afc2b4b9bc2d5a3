"""A node's folder with a base model and a run, and its training as a process."""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import chats
from mistral_contract import envs
from mistral_tune import log, training
from mistral_tune.errors import Interrupted, TuneError
from mistral_tune.job import Job

TINY = {
    "device": "cpu", "python": "3.11", "env_id": "cpu", "tune_env_id": "tune", "gpus": "1", "model": "tiny", "base": "example/tiny",
    "base_revision": "0123456789abcdef0123456789abcdef01234567", "weights": "file:///tiny", "weights_id": "tiny", "sliding_window": "16",
    "dtype": "float32", "tokenizer_mode": "hf", "data": "chats.jsonl", "method": "lora", "epochs": "3", "max_length": "512", "rank": "8",
    "learning_rate": "0.01", "batch_tokens": "512", "seed": "1", "save_minutes": "60", "run_id": "test",
}  # fmt: skip


def die_at(step: int, where: str) -> Callable[[], None]:
    """Return what makes a process kill itself (signal 9) at a step: behind it, before its checkpoint is sealed, while that is uploaded, or then."""

    def before() -> None:
        name = "on_save" if where in ("unsealed", "uploading") else "on_step_end"
        method = getattr(training.Keeper, name)

        def dying(self: training.Keeper, args: Any, state: Any, control: Any, **rest: Any) -> None:
            due = state.global_step >= step
            if due and where == "uploaded":
                self.checkpoints.wait()
            if due and where != "uploading":
                os.kill(os.getpid(), signal.SIGKILL)
            method(self, args, state, control, **rest)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(training.Keeper, name, dying)

    return before


def nothing() -> None:
    """Do nothing."""


@dataclass
class Run:
    """A run in a node's folder; `told` changes what it is told."""

    node: Path
    name: str = "run"
    told: dict[str, str] = field(default_factory=dict)
    held_out: bool = True

    def __post_init__(self) -> None:
        self.folder = self.node / "run" / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        tool = self.folder / "weights-tool"
        if not tool.is_symlink():
            tool.symlink_to(Path(sys.prefix))
        self.chats = chats.write(self.folder / "chats.jsonl", chats.ASKED)
        self.asked = chats.write(self.folder / "held-out.jsonl", chats.HELD_OUT) if self.held_out else None
        self.out = self.node / "out" / self.name

    def environ(self) -> dict[str, str]:
        """Return the envs of its contract."""
        told = TINY | {"name": self.name, "node_dir": str(self.node), "out": f"file://{self.out}"} | self.told
        return {envs.variable(name): value for name, value in told.items()}

    def job(self) -> Job:
        """Return the run as its steps read it."""
        return Job(envs.read(envs.Finetune, self.environ()), self.chats, self.asked)

    def start(self, before: Callable[[], None] = nothing, **variables: str) -> BaseProcess:
        """Start the training in a process that has all imports already; `before` runs in it first, to make it fail."""
        process = multiprocessing.get_context("fork").Process(target=self._train, args=(before, variables))
        process.start()
        return process

    def _train(self, before: Callable[[], None], variables: dict[str, str]) -> None:
        os.environ |= variables
        out = (self.folder / f"log-{variables.get('RANK', '0')}").open("a", buffering=1)
        sys.stdout = sys.stderr = out
        before()
        code = 0
        try:
            training.train(self.job())
        except TuneError as error:
            sys.stderr.write(f"{error}\n")
            code = 75 if isinstance(error, Interrupted) else 1
        except BaseException:  # noqa: BLE001 (this process ends here)
            traceback.print_exc()
            code = 3
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def step(self, verb: str, code: int = 0) -> str:
        """Run a step as the node does, as a program; what it wrote, or its last line to standard error if it fails."""
        files = ["--data", str(self.chats), *(["--eval-data", str(self.asked)] if self.asked else [])]
        command = [sys.executable, "-m", "mistral_tune", verb, *files]
        done = subprocess.run(command, env=os.environ | self.environ(), capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]

    def train(self, code: int = 0, before: Callable[[], None] = nothing, **variables: str) -> str:
        """Train to the end; what was logged. `code` is the exit code that is expected, negative for a signal."""
        process = self.start(before, **variables)
        process.join(600)
        text = self.log()
        assert process.exitcode == code, text
        return text

    def train_together(self, count: int, before: Callable[[], None] = nothing, killed: bool = False) -> None:
        """Train in several processes that share the work; to the end, unless they are `killed` on the way."""
        port = 22000 + secrets.randbelow(10000)  # connections take theirs from 32768 on
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [self.start(before, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
        for process in started:
            process.join(600)
        codes = [process.exitcode for process in started]
        assert (-9 in codes and 0 not in codes) if killed else codes == [0] * count, self.log()

    def tensors(self) -> list[bytes]:
        """Return the files of the result with tensors, as they lie on the disk."""
        return [path.read_bytes() for path in sorted(self.job().result.glob("*.safetensors"))]

    def log(self) -> str:
        """Return what its processes wrote."""
        return "".join(path.read_text("utf-8") for path in sorted(self.folder.glob("log-*")))

    def steps(self) -> list[dict[str, Any]]:
        """Return the lines of progress."""
        lines = self.log().splitlines()
        return [json.loads(line.removeprefix(log.PROGRESS)) for line in lines if line.startswith(log.PROGRESS)]

    def adapter(self) -> bytes:
        """Return the tensors of the result, as they lie on the disk."""
        return (self.job().result / "adapter_model.safetensors").read_bytes()
