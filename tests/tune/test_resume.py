"""Training on a CPU: what ends it, at whatever step, leaves no trace in the result."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mistral_contract import adapters
from mistral_tune import training
from mistral_tune.checkpoints import Checkpoints, step_of
from mistral_tune.errors import TuneError
from mistral_tune.store import Store
from mistral_weights.seal import seal, sealed
from runs import Run, die_at

pytestmark = pytest.mark.slow
EPOCH = 5  # steps


@pytest.fixture(scope="module")
def whole(node: Path) -> Run:
    """A run that nothing ended."""
    run = Run(node, "whole")
    run.train()
    return run


def test_the_result_is_sealed_learnt_and_can_be_served(whole: Run, node: Path) -> None:
    job = whole.job()
    done = sealed(job.result)
    assert done is not None
    assert [file.name for file in done.manifest.files] == ["adapter_config.json", "adapter_model.safetensors", "history.json"]
    adapter = adapters.read(job.result, adapters.base_of(node / "weights" / "tiny"))
    assert (adapter.rank, len(adapter.pairs), adapters.changes_nothing(job.result, adapter)) == (8, 14, False)
    steps = whole.steps()
    assert [one["step"] for one in steps] == list(range(1, steps[-1]["steps"] + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert steps[-1]["left_seconds"] == 0
    assert all(one["tokens_per_second"] > 0 for one in steps)


def test_a_result_that_is_there_is_not_trained_again(whole: Run) -> None:
    count = len(whole.steps())
    whole.train()
    assert len(whole.steps()) == count


@pytest.mark.parametrize("where", ["behind", "unsealed", "uploading"])
def test_killed_at_random_steps_and_continued_it_is_bitwise_the_same(whole: Run, node: Path, where: str) -> None:
    run = Run(node, f"killed-{where}")
    steps = whole.steps()[-1]["steps"]
    random.seed(time.time_ns())
    # One in each of the last two epochs: a checkpoint of the last step leaves no step in which to die.
    for step in random.sample(range(EPOCH + 1, 2 * EPOCH + 1), 1) + random.sample(range(2 * EPOCH + 1, steps), 1):
        run.train(code=-signal.SIGKILL, before=die_at(step, where))
    run.train()
    assert run.adapter() == whole.adapter(), f"the kills: {run.log()}"
    assert "goes on at step" in run.log()


def test_asked_to_end_it_goes_on_elsewhere_from_the_store(whole: Run, node: Path) -> None:
    run = Run(node, "asked")

    def asked() -> None:
        end = training.Keeper.on_log

        def on_log(self: training.Keeper, args: Any, state: Any, control: Any, **rest: Any) -> None:
            end(self, args, state, control, **rest)
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        training.Keeper.on_log = on_log  # type: ignore[method-assign]

    assert "asked to end at step 4 of 15; the same command goes on" in run.train(code=75, before=asked)
    shutil.rmtree(run.job().folder)  # another machine
    run.train()
    assert run.adapter() == whole.adapter()


def checkpoints(run: Run) -> Checkpoints:
    return Checkpoints(run.job(), Store.of(run.job()))


@pytest.fixture
def stopped(node: Path, request: pytest.FixtureRequest) -> Run:
    """A run that was killed in its last epoch, with two whole checkpoints here and in the store."""
    run = Run(node, f"stopped-{abs(hash(request.node.name)) % 10**9}")
    run.train(code=-signal.SIGKILL, before=die_at(2 * EPOCH + 1, "uploaded"))
    return run


def test_a_checkpoint_that_is_not_whole_is_never_used(stopped: Run) -> None:
    here = sorted(stopped.job().checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(here) == 2
    (here[1] / "optimizer.pt").write_bytes((here[1] / "optimizer.pt").read_bytes()[:-1])
    newest = checkpoints(stopped).newest()
    assert newest is not None
    assert newest.name == here[1].name, "the store has that step whole"
    slots = sorted((stopped.out / "checkpoints").iterdir())
    shutil.rmtree(stopped.job().checkpoints)
    last = max(slots, key=lambda slot: step_of(sealed(slot).manifest.revision, stopped.job().identity))  # type: ignore[union-attr]
    (last / "optimizer.pt").write_bytes(b"torn")
    stopped.job().checkpoints.mkdir()
    newest = checkpoints(stopped).newest()
    assert newest is not None
    assert newest.name == here[0].name
    for slot in slots:
        (slot / "mistral-weights.json").unlink()
    shutil.rmtree(stopped.job().checkpoints)
    stopped.job().checkpoints.mkdir()
    assert checkpoints(stopped).newest() is None


def test_a_checkpoint_without_its_optimizer_is_an_error(stopped: Run) -> None:
    newest = checkpoints(stopped).newest()
    assert newest is not None
    (newest / "optimizer.pt").unlink()
    seal(newest, "", sealed_revision(stopped, newest))
    with pytest.raises(TuneError, match="no optimizer"):
        checkpoints(stopped).newest()


def sealed_revision(run: Run, folder: Path) -> str:
    return f"{run.job().identity}-step-{int(folder.name[11:]):08d}"


def test_checkpoints_of_another_run_are_refused_until_restart(stopped: Run, node: Path) -> None:
    other = Run(node, stopped.name, told={"learning_rate": "0.02"})
    kept = [path.name for path in stopped.job().checkpoints.iterdir()]
    assert "holds checkpoints of another run; name another --out, or begin anew with --restart" in other.train(code=1)
    assert [path.name for path in stopped.job().checkpoints.iterdir()] == kept
    anew = Run(node, stopped.name, told={"learning_rate": "0.02", "restart": "yes"})
    anew.train(code=-signal.SIGKILL, before=die_at(EPOCH + 1, "uploaded"))
    assert "goes on at step" not in anew.log()
    anew.train()
    assert "goes on at step 5" in anew.log(), "what was taken away once is not taken away again"


def test_a_restarted_run_goes_on_where_a_spot_machine_was_taken(
    stopped: Run, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anew = Run(node, stopped.name, told={"restart": "yes"})
    monkeypatch.setenv("SKYPILOT_TASK_ID", "managed-2026-11-29-0")
    anew.train(code=-signal.SIGKILL, before=die_at(EPOCH + 1, "uploaded"))
    assert "goes on at step" not in anew.log()
    shutil.rmtree(anew.job().folder)
    anew.train()
    assert "goes on at step 5" in anew.log()
