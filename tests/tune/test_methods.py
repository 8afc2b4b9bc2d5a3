"""Methods and processes: QLoRA, all weights, DDP and FSDP2; packed rows and the window compute what single rows without packing do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from mistral_tune import model, training
from mistral_tune.data import learnt, packing
from runs import Run, die_at
from safetensors.torch import load_file
from tiny_model import WINDOW
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

pytestmark = pytest.mark.slow
TWO_STEPS = {"epochs": "2", "batch_tokens": "4096", "max_length": "4096"}


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor for path in run.job().result.glob("*.safetensors") for name, tensor in load_file(path).items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def test_qlora_takes_two_steps_and_its_adapter_is_one_of_plain_lora(node: Path) -> None:
    run = Run(node, "qlora", told=TWO_STEPS | {"method": "qlora"})
    run.train()
    assert [one["step"] for one in run.steps()] == [1, 2]
    found = tensors(run)
    assert len(found) == 28
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert model.served(run.job().result, node / "weights" / "tiny").rank == 8


def test_all_weights_take_two_steps_and_are_whole(node: Path) -> None:
    run = Run(node, "full", told=TWO_STEPS | {"method": "full", "learning_rate": "0.001"})
    run.train()
    before = load_file(node / "weights" / "tiny" / "model.safetensors")
    after = tensors(run)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    assert json.loads((run.job().result / "config.json").read_text("utf-8"))["sliding_window"] == WINDOW


def without_dropout() -> None:
    """Each process would draw other numbers."""
    training.DROPOUT = 0.0


def test_two_processes_are_one_that_accumulates_two(node: Path) -> None:
    told = {"epochs": "2", "batch_tokens": "800", "max_length": "400"}
    alone = Run(node, "accumulated", told=told)
    alone.train(before=without_dropout)
    together = Run(node, "together", told=told)
    together.train_together(2, before=without_dropout)
    assert "in 6 rows" in alone.log(), "of an odd number the last step of an epoch would repeat a row"
    assert len(alone.steps()) == len(together.steps()) == 6
    assert [one["loss"] for one in together.steps()] == pytest.approx([one["loss"] for one in alone.steps()], abs=2e-4)
    assert distance(tensors(alone), tensors(together)) < 2e-3


@pytest.mark.parametrize("base", ["tiny", "llama"])
def test_fsdp2_in_two_processes_takes_two_steps_of_all_weights(node: Path, base: str) -> None:
    """Of another class than Mistral's, too: SmolLM2 is one of Llama."""
    told = TWO_STEPS | {"method": "full", "learning_rate": "0.001", "weights_id": base}
    if base == "llama":
        tiny_model.write(node / "weights" / base, llama=True)
        told |= {"sliding_window": ""}
    run = Run(node, f"sharded-{base}", told=told)
    run.train_together(2)
    assert [one["step"] for one in run.steps()] == [1, 2]
    before = load_file(node / "weights" / base / "model.safetensors")
    after = tensors(run)
    assert before.keys() == after.keys()
    assert [after[name].shape for name in before] == [before[name].shape for name in before]
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)


@pytest.mark.parametrize(
    ("method", "processes"),
    [("qlora", 1), ("full", 1), ("lora", 2), ("full", 2)],
    ids=["qlora", "full", "ddp", "fsdp2"],
)
def test_killed_and_continued_each_way_of_training_makes_the_same_bits(node: Path, method: str, processes: int) -> None:
    """Three steps, each an epoch with a checkpoint; killed behind the second step, so that the first is gone on with."""
    told = TWO_STEPS | {"method": method, "learning_rate": "0.001", "epochs": "3"}
    whole, killed = (Run(node, f"{name}-{method}-{processes}", told=told) for name in ("unkilled", "killed"))
    if processes == 1:
        whole.train()
        killed.train(code=-9, before=die_at(2, "behind"))
        killed.train()
    else:
        whole.train_together(processes)
        killed.train_together(processes, before=die_at(2, "behind"), killed=True)
        killed.train_together(processes)
    assert "goes on at step 1" in killed.log()
    assert "goes on at step" not in whole.log()
    assert killed.tensors() == whole.tensors() != []


def test_a_run_reports_to_wandb_only_if_its_key_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(training, "find_spec", lambda name: object())
    assert training._reports() == []
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert training._reports() == ["wandb"]
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    assert training._reports() == []
    assert "WANDB_API_KEY is set and the package wandb is not installed" in capsys.readouterr().out


def log_probabilities(found: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return found(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0].log_softmax(-1)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_packed_rows_compute_what_each_does_alone(node: Path, window: int | None) -> None:
    run = Run(node, "packed")
    folder = node / "weights" / "tiny"
    rows = learnt(run.job(), folder).rows[:4]
    assert min(len(row.input_ids) for row in rows) > 2 * WINDOW
    found = model.load(folder, window, torch.float32, "cpu").eval()
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def batch(packed: Any) -> dict[str, Any]:
        ids, labels = ([token for row in packed for token in getattr(row, name)] for name in ("input_ids", "labels"))
        return dict(collate([{"input_ids": ids, "labels": labels, "seq_lengths": [len(row.input_ids) for row in packed]}]))

    together = log_probabilities(found, batch(rows))
    alone = torch.cat([log_probabilities(found, batch([row])) for row in rows])
    assert float((together - alone).abs().max()) < 1e-4
    assert batch(rows)["labels"][0].tolist() == [label for row in rows for label in row.labels]
    other = model.load(folder, None if window else WINDOW, torch.float32, "cpu").eval()
    assert float((together - log_probabilities(other, batch(rows))).abs().max()) > 0.01, "the window matters"


@pytest.mark.parametrize(
    ("longest", "most", "batch", "processes", "expected"),
    [
        (300, 4096, 16384, 1, (4096, 4)),
        (300, 4096, 16384, 2, (4096, 2)),
        (300, 4096, 256, 1, (300, 1)),
        (90, 512, 512, 4, (128, 1)),
    ],
)
def test_a_step_has_about_the_tokens_that_are_asked_for(
    longest: int, most: int, batch: int, processes: int, expected: tuple[int, int]
) -> None:
    found = packing(longest, most, batch, processes)
    assert (found.length, found.accumulated) == expected
