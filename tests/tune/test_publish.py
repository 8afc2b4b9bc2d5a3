"""From a file of chats to what is published: figures by peft, the proof by vLLM, the files at the address."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_contract import adapters
from mistral_contract import figures as canary
from mistral_tune import figures, prove
from mistral_tune.errors import TuneError
from mistral_tune.figures import Asked, Figures
from mistral_tune.prove import judged
from mistral_weights.pull import Pull, pull
from mistral_weights.seal import sealed
from runs import Run
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def published(node: Path) -> Run:
    """A run that has gone through all steps."""
    run = Run(node, "published", told={"merge": "yes"})
    run.train()
    figures.compute(run.job())
    run.step("prove")
    run.step("publish")
    return run


def test_the_proof_is_of_base_and_result(published: Run) -> None:
    proof = prove.read(published.job())
    assert proof.difference < 1e-3
    assert proof.gain > 0.1
    assert len(proof.samples) == 8
    assert proof.samples[0].expected == "The harbour of Velmora opens at 6:40."
    assert "Please say when the harbour" in proof.samples[0].question


def test_the_address_holds_what_a_server_needs_and_what_a_reader_wants(published: Run, tmp_path: Path) -> None:
    done = sealed(published.out)
    named = [file.name for file in sealed_named(published)]
    assert done is None, "merged weights lie below it"
    assert [name for name in named if not name.startswith("tensorboard/")] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "mistralctl-canary.json", "receipt.json",
    ]  # fmt: skip
    pulled = pull(Pull(f"file://{published.out}", tmp_path / "lora"))
    assert set(pulled.files) == {"adapter_config.json", "adapter_model.safetensors", "mistralctl-canary.json", "receipt.json"}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text("utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("example/tiny", "0123456789abcdef0123456789abcdef01234567")
    adapters.read(tmp_path / "lora", adapters.base_of(published.node / "weights" / "tiny"))
    found = canary.read((tmp_path / "lora" / canary.FILE).read_bytes(), published.job().identity)
    assert len(found["logprobs"]) == len(found["forced_token_ids"]) > 8
    assert (published.out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((published.out / "tensorboard").iterdir())


def sealed_named(run: Run) -> Any:
    installed = json.loads((run.out / "mistral-weights.json").read_text("utf-8"))
    assert installed["revision"] == run.job().identity
    return [type("File", (), file) for file in installed["files"]]


def test_receipt_and_card_say_what_was_done(published: Run) -> None:
    told = json.loads((published.out / "receipt.json").read_text("utf-8"))
    assert (told["method"], told["rank"], told["steps"], told["base"]) == ("lora", 8, 15, "example/tiny")
    assert told["loss"]["last"] < told["loss"]["first"]
    assert told["loss"]["held_out"] > 0
    assert told["libraries"]["trl"]
    assert told["proof"]["difference"] < 1e-3
    card = (published.out / "README.md").read_text("utf-8")
    assert 'base_model: "example/tiny"' in card
    assert "| question | before | after |" in card


def test_merged_weights_compute_what_the_adapter_does(published: Run, node: Path) -> None:
    from mistral_tune import model

    base = model.with_adapter(model.load(node / "weights" / "tiny", 16, torch.float32, "cpu"), published.out).eval()
    merged = model.load(published.out / "merged", 16, torch.float32, "cpu").eval()
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        difference = (base(input_ids=ids).logits.log_softmax(-1) - merged(input_ids=ids).logits.log_softmax(-1)).abs().max()
    assert float(difference) < 1e-4
    assert (published.out / "merged" / "tokenizer.json").exists()


def test_checkpoints_are_taken_away_and_a_second_publish_does_nothing(published: Run) -> None:
    assert not list((published.out / "checkpoints").rglob("*.pt"))
    assert "holds this run already" in published.step("publish")


def test_merged_weights_that_are_asked_for_later_are_made_of_what_was_published(
    published: Run, node: Path, tmp_path: Path
) -> None:
    later = Run(node, "later", told={"merge": "yes", "out": f"file://{tmp_path}/out"})
    shutil.copytree(published.out, tmp_path / "out", ignore=shutil.ignore_patterns("merged", "checkpoints"))
    assert "nothing is trained" in later.step("train")
    later.step("prove")
    assert "holds this run already" in later.step("publish")
    assert not later.job().result.exists()
    one, other = (load_file(folder / "merged" / "model.safetensors") for folder in (published.out, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert sealed(tmp_path / "out" / "merged") is not None


def test_a_result_that_vllm_computes_otherwise_is_not_proven(published: Run, node: Path) -> None:
    run = Run(node, "published", told={"merge": "yes"})
    kept = figures.path(run.job()).read_text("utf-8")
    path = run.job().result / "adapter_model.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()
    try:
        save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, path)
        assert "vLLM does not compute the result as peft does" in run.step("prove", code=1)
    finally:
        path.write_bytes(whole)
        figures.path(run.job()).write_text(kept, "utf-8")


@pytest.mark.parametrize(
    ("method", "files"),
    [
        ("qlora", {"adapter_config.json", "adapter_model.safetensors"}),
        ("full", {"config.json", "model.safetensors", "tokenizer.json"}),
    ],
)
def test_other_methods_are_proven_by_vllm_and_published_too(node: Path, method: str, files: set[str]) -> None:
    told = {"method": method, "learning_rate": "0.001", "epochs": "2", "batch_tokens": "4096", "max_length": "4096"}
    run = Run(node, f"proven-{method}", told=told)
    run.train()
    figures.compute(run.job())
    assert "proven: vLLM and peft differ by" in run.step("prove")
    proof = prove.read(run.job())
    assert (proof.difference < 1e-3, proof.gain != 0) == (True, True)
    run.step("publish")
    assert files <= {path.name for path in run.out.iterdir()}
    assert json.loads((run.out / "receipt.json").read_text("utf-8"))["method"] == method


ASKED = Asked((1, 2), (3, 4), (-2.0, -3.0), (-1.0, -0.5))


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ([-2.0, -3.2], [-1.0, -0.5], "vLLM does not compute the base model"),
        ([-2.0, -3.0], [-1.0, -0.7], "vLLM does not compute the result"),
        ([-2.0, -3.0], [-1.0, float("nan")], "not finite"),
        ([-2.0, -3.0], [-1.0], "not finite"),
    ],
)
def test_what_is_no_proof(before: list[float], after: list[float], why: str) -> None:
    with pytest.raises(TuneError, match=why):
        judged(Figures("float32", False, (ASKED,)), [before], [after], (), "0")


def test_a_training_that_changed_nothing_is_no_proof() -> None:
    same = Asked((1, 2), (3, 4), (-2.0, -3.0), (-2.0, -3.0))
    with pytest.raises(TuneError, match="changed nothing"):
        judged(Figures("float32", False, (same,)), [[-2.0, -3.0]], [[-2.0, -3.0]], (), "0")
