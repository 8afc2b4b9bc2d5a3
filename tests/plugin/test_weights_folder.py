"""What the launcher takes of a set of weights, and of figures: what the manifest names, and numbers. No engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from mistral_contract import files, sets
from mistral_node import canary, weights
from mistral_node.client import Client
from mistral_node.contract import Code, LaunchError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set as a pull leaves it."""
    made = write(tmp_path / "weights" / "tiny")
    (made / files.MANIFEST.name).write_text(json.dumps(sets.describe(made, files.MANIFEST.name)))
    (made / sets.STATE).write_text("{}")
    return made


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "extra.safetensors", "generation_config_2.json", ".hidden", canary.figures.FILE]
)
def test_what_the_manifest_does_not_name_is_refused_before_vllm_starts(folder: Path, name: str) -> None:
    assert weights.model_dir(folder) == folder
    (folder / name).write_text("{}")
    with pytest.raises(LaunchError, match="does not name; run mistralctl up again") as caught:
        weights.model_dir(folder)
    assert caught.value.code is Code.WEIGHTS


def test_a_set_without_a_manifest_is_said_to_be_unchecked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / files.MANIFEST.name).unlink()
    assert weights.model_dir(folder) == folder
    assert "is served unchecked" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model.safetensors.index.json", "config.json"])
def test_a_document_that_is_nested_without_end_is_one_line(folder: Path, name: str) -> None:
    (folder / name).write_text('{"a":' * 50_000)
    (folder / files.MANIFEST.name).unlink()
    with pytest.raises(LaunchError, match=f"{name} cannot be read .it is nested deeper than 64 levels") as caught:
        weights.model_dir(folder)
    assert caught.value.code is Code.WEIGHTS


def test_what_was_added_to_converted_weights_is_not_served(tmp_path: Path) -> None:
    target = tmp_path / "tiny.hf2"
    write(target)
    (target / weights.RECORD).write_text(json.dumps(sets.describe(target, weights.RECORD)))
    assert weights._is_as_converted(target)
    (target / "chat_template.jinja").write_text("{{ evil }}")
    assert not weights._is_as_converted(target)
    assert not target.exists()


class Engine(Client):
    """An engine that answers as it is told."""

    def ask(self, path: str, body: dict[str, Any] | None = None, *, seconds: float) -> bytes:
        return json.dumps({"choices": [json.loads(self.url)]}).encode()


NAN = float("nan")
ANSWERS: list[dict[str, Any]] = [
    {"prompt_logprobs": [None, {"7": {"logprob": NAN}}]}, {"prompt_logprobs": [None, {"7": {"logprob": "0"}}]},
    {"prompt_logprobs": [None, {"7": {"logprob": -float("inf")}}]}, {"prompt_logprobs": [None, {"7": {"logprob": None}}]},
    {"prompt_logprobs": [None, {"8": {"logprob": -1}}]}, {"prompt_logprobs": [None]}, {"prompt_logprobs": None}, {},
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_what_is_no_number_verifies_nothing(answer: dict[str, Any]) -> None:
    stored = {"prompt_token_ids": [5], "forced_token_ids": [7], "logprobs": [-1.0]}
    with pytest.raises(LaunchError) as caught:
        canary.compare(Engine(json.dumps(answer), "key"), "tiny", stored, "bfloat16", 100)
    assert caught.value.code is Code.CANARY


@pytest.mark.parametrize("values", [[NAN], [-1.0, NAN], ["0"], [], None, [None]])
def test_an_engine_that_generates_no_numbers_is_not_right(values: Any) -> None:
    for choice in ({"logprobs": {"token_logprobs": values}}, {"logprobs": values}, {}):
        with pytest.raises(LaunchError, match="not finite"):
            canary.answers(Engine(json.dumps(choice), "key"), "tiny")


def test_stored_figures_that_are_none_verify_nothing(folder: Path) -> None:
    for logprobs in ("[NaN]", "[-Infinity]", '["-1"]', "[1e999]", "[" * 10_000, "[-1, -1]"):
        (folder / canary.figures.FILE).write_text(f'{{"prompt_token_ids": [5], "forced_token_ids": [7], "logprobs": {logprobs}}}')
        with pytest.raises(LaunchError, match="is damaged") as caught:
            canary.stored_figures(folder)
        assert caught.value.code is Code.CANARY
