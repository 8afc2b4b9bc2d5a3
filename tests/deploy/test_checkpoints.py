"""A folder as a model: which one is served, what it is called, and how its chat is tokenized."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mistralctl import checkpoints, plan
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.machine import Machine
from mistralctl.models import Model

GIB = 1 << 30
CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 32768, "sliding_window": None,
}  # fmt: skip
PARAMS = {
    "dim": 128, "n_layers": 2, "head_dim": 32, "hidden_dim": 256, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 512,
    "rope_theta": 1e6, "max_seq_len": 4096,
}  # fmt: skip


def folder(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def resolved(path: Path) -> Model:
    return checkpoints.resolve(load({"model": str(path), "cloud": ["local"]}, {}, None))


def planned(path: Path) -> plan.Plan:
    sourced = load({"model": str(path), "cloud": ["local"]}, {}, None)
    return plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "model type 'qwen2' (Qwen2ForCausalLM) is not served"),
        (
            {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]},
            "(Mistral3ForConditionalGeneration) is not served",
        ),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
    ],
)
def test_another_model_is_refused_before_anything_starts(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    path = folder(tmp_path / "other", {"config.json": CONFIG | fields, "model.safetensors": ""})
    with pytest.raises(UserError) as error:
        resolved(path)
    assert error.value.code is Exit.USAGE
    assert f"{path}/config.json: " in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\ufffd", "[" * 100_000])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=re.escape("config.json cannot be read")):
        resolved(folder(tmp_path / "x", {"config.json": text, "model.safetensors": ""}))


def test_a_context_beyond_that_of_training_is_as_vllm_derives_it(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "linear",
        {"config.json": CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "model.safetensors": ""},
    )
    sourced = load({"model": str(path), "cloud": ["local"], "max_model_len": 65536}, {}, None)
    assert plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2)).max_model_len == 65536
    sourced = load({"model": str(path), "cloud": ["local"], "max_model_len": 131073}, {}, None)
    with pytest.raises(UserError, match="beyond the context of linear, 131072 tokens"):
        plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2))


def test_a_folder_in_mistrals_own_format_alone(tmp_path: Path) -> None:
    path = folder(tmp_path / "own", {"params.json": PARAMS, "consolidated.safetensors": "", "tokenizer.model.v3": ""})
    found = planned(path)
    assert found.model.shape is not None
    assert (found.model.shape.layers, found.model.shape.head_dim, found.max_model_len) == (2, 32, 4096)
    assert (found.model.tokenizer_mode, found.model.chat, found.model.tool_parser) == ("mistral", True, "mistral")


def test_a_folder_without_any_configuration(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"config\.json is missing; name a folder in Hugging Face format, or one with consolidated"
    ):
        resolved(folder(tmp_path / "x", {"model.safetensors": ""}))


def tekken(version: str) -> dict[str, Any]:
    return {"tekken.json": {"config": {"version": version}, "vocab": []}}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (tekken("v3"), ("mistral", True, "mistral")),
        (tekken("v13"), ("mistral", True, "mistral")),
        (tekken("v2"), ("mistral", True, None)),
        ({"tekken.json": "damaged"}, ("mistral", True, "mistral")),
        ({"tokenizer.model.v1": ""}, ("mistral", True, None)),
        ({"tokenizer.model.v2": ""}, ("mistral", True, None)),
        ({"tokenizer.model.v3": ""}, ("mistral", True, "mistral")),
        ({"tokenizer.model.v7m1": ""}, ("mistral", True, "mistral")),
        ({"tokenizer.json": "{}"} | tekken("v3"), ("hf", False, None)),
        ({"tokenizer.json": "{}", "tokenizer_config.json": {"chat_template": "x"}, "tokenizer.model.v3": ""}, ("hf", True, None)),
        ({"tokenizer.json": "{}", "chat_template.jinja": "x"}, ("hf", True, None)),
        ({"tokenizer.model": ""}, ("hf", False, None)),  # any model's, by SentencePiece
        ({}, ("hf", False, None)),
    ],
)  # fmt: skip
def test_a_mistral_tokenizer_means_chat_and_from_v3_on_tools(
    tmp_path: Path, files: dict[str, Any], wanted: tuple[object, ...]
) -> None:
    found = resolved(folder(tmp_path / "x", {"config.json": CONFIG, "model.safetensors": "", **files}))
    assert (found.tokenizer_mode, found.chat, found.tool_parser) == wanted


@pytest.mark.parametrize(
    "name", ["模型", "Modèle", "مدل", "My+Model(2)", "_private", "...x", "UPPER", "-dash-", "9b", "x" * 200, "ⅷ"]
)
def test_what_a_folder_is_called_is_a_name_that_the_node_takes(tmp_path: Path, name: str) -> None:
    found = planned(folder(tmp_path / name, {"config.json": CONFIG, "model.safetensors": ""}))
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", found.name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", found.weights_id)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", found.served_model_name)
    assert found.weights == f"file://{tmp_path}/{name}"
    if not name.isascii():
        assert re.fullmatch(r"m-[0-9a-f]{8}", found.served_model_name)
        assert found.name == found.served_model_name


def test_two_spellings_of_a_letter_are_one_name(tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "model.safetensors": ""}
    composed, decomposed = (resolved(folder(tmp_path / n / f"mod{e}le", files)) for n, e in (("a", "\u00e8"), ("b", "e\u0300")))
    assert composed.name == decomposed.name


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bytes that are no text; rename the folder"):
        resolved(folder(tmp_path / "x\udcff", {"config.json": CONFIG, "model.safetensors": ""}))
