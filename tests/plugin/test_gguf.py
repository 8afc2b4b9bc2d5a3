"""What becomes of a GGUF file: the same model as the Hugging Face checkpoint that it was made from, or a refusal by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import hugging_face, log_probabilities, prompts, write
from mistral_node.contract import Code, LaunchError
from mistral_node.weights import TENSORS, convert
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

VOCABULARY = 300  # 256 bytes, one word that is merged of two of them, and others
NAMES = {name: own for own, name in TENSORS.items()}


def checkpoint(folder: Path, **shape: Any) -> Path:
    """A checkpoint whose weights bfloat16 holds exactly, as what a GGUF file becomes is in bfloat16."""
    write(folder, vocab_size=VOCABULARY, **({"sliding_window": None} | shape))
    tensors = {name: w.bfloat16().float() for name, w in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def words(count: int) -> list[str]:
    """The tokens of a byte-level vocabulary: GPT-2's letters for the 256 bytes, what is merged of two, then words."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    return (letters + ["ab"] + [f"<w{n}>" for n in range(count)])[:count]


def as_gguf(
    folder: Path, target: Path, said: Mapping[str, Any], *, tensors: Mapping[str, Any] | None = None, tokens: int = VOCABULARY
) -> Path:
    """The checkpoint as llama.cpp's converter writes it; `said` and `tensors` are added, or replace what it has (None: left out)."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys: dict[str, Any] = {
        "llama.context_length": config["max_position_embeddings"], "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"], "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads, "llama.attention.head_count_kv": kv_heads, "llama.vocab_size": config["vocab_size"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": words(tokens), "tokenizer.ggml.token_type": [1] * tokens, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    target.mkdir()
    writer = gguf.GGUFWriter(target / "model.gguf", "llama")
    for key, value in (keys | dict(said)).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_array(key, value)
    stored = {}
    for name, w in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        layer, part = (f"blk.{stem.split('.')[2]}.", stem.split(".", 3)[3]) if ".layers." in stem else ("", stem)
        for suffix, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part.endswith(suffix):  # the two numbers that one angle rotates lie beside each other
                rows, columns = w.shape
                w = w.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
        stored[f"{layer}{NAMES[part]}.weight"] = w.contiguous().numpy()
    for name, data in (stored | dict(tensors or {})).items():
        if data is not None:
            writer.add_tensor(name, np.asarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target / "model.gguf"


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


def llama3_factors(head_dim: int, **scaling: float) -> torch.Tensor:
    """How Hugging Face changes the frequencies: the unscaled ones over the scaled ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = MistralConfig(head_dim=head_dim, max_position_embeddings=131072, **rope("llama3", **scaling))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return 1 / (10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)) / scaled


LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = "llama.rope.scaling.type"
FACTOR = "llama.rope.scaling.factor"
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "heads larger than hidden / heads": ({"head_dim": 64}, {"llama.attention.key_length": 64, "llama.attention.value_length": 64}),
    "heads smaller than hidden / heads": ({"head_dim": 16}, {"llama.attention.key_length": 16, "llama.attention.value_length": 16}),
    "linear scaling": (rope("linear", factor=4.0), {LINEAR: "linear", FACTOR: 4.0}),
    "linear scaling, the type left out": (rope("linear", factor=4.0), {FACTOR: 4.0}),
    "linear scaling, the old key": (rope("linear", factor=4.0), {"llama.rope.scale_linear": 4.0}),
    "no scaling, and a factor": ({}, {LINEAR: "none", FACTOR: 4.0}),
    "yarn": (
        rope("yarn", factor=16.0, original_max_position_embeddings=128),
        {LINEAR: "yarn", FACTOR: 16.0, "llama.rope.scaling.original_context_length": 128, "llama.rope.scaling.finetuned": True},
    ),
    "another theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    "theta left out": ({}, {"llama.rope.freq_base": None}),
    "a window": ({"sliding_window": 48}, {"llama.attention.sliding_window": 48}),
    "keys that change nothing": (
        {}, {"llama.expert_count": 0, "llama.attention.causal": True, "llama.tensor_data_layout": "Meta AI original pth", "llama.logit_scale": 1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path: Path, case: str) -> None:
    shape, said = SAME[case]
    folder = checkpoint(tmp_path / "weights", **shape)
    convert(as_gguf(folder, tmp_path / "gguf", said), tmp_path / "converted")
    wanted, found = hugging_face(folder), hugging_face(tmp_path / "converted")
    [ids] = prompts([200], vocabulary=VOCABULARY)
    assert torch.equal(log_probabilities(found, ids), log_probabilities(wanted, ids))
    assert found.config.max_position_embeddings == wanted.config.max_position_embeddings
    assert found.config.sliding_window == wanted.config.sliding_window


@pytest.mark.parametrize("scaling", [LLAMA31, LLAMA31 | {"factor": 32.0}])
def test_llama_3s_scaling_is_read_from_its_factors(tmp_path: Path, scaling: dict[str, float]) -> None:
    folder = checkpoint(tmp_path / "weights", head_dim=64, max_position_embeddings=131072, **rope("llama3", **scaling))
    factors = llama3_factors(64, **scaling)
    assert len({round(float(factor), 3) for factor in factors}) > 2  # also those between the two thresholds
    said = {"llama.attention.key_length": 64, "llama.attention.value_length": 64}
    convert(as_gguf(folder, tmp_path / "gguf", said, tensors={"rope_freqs.weight": factors}), tmp_path / "converted")
    [ids] = prompts([200], vocabulary=VOCABULARY)
    wanted, found = hugging_face(folder), hugging_face(tmp_path / "converted")
    assert torch.equal(log_probabilities(found, ids), log_probabilities(wanted, ids))
    assert found.config.rope_parameters == wanted.config.rope_parameters


def test_factors_that_are_all_one_change_nothing(tmp_path: Path) -> None:
    file = as_gguf(checkpoint(tmp_path / "weights"), tmp_path / "gguf", {}, tensors={"rope_freqs.weight": [1.0] * 16})
    convert(file, tmp_path / "converted")
    assert hugging_face(tmp_path / "converted").config.rope_parameters["rope_type"] == "default"


def test_a_vocabulary_with_more_embeddings_than_tokens(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "weights")
    convert(as_gguf(folder, tmp_path / "gguf", {}, tokens=VOCABULARY - 20), tmp_path / "converted")
    [ids] = prompts([100], vocabulary=VOCABULARY)
    assert torch.equal(log_probabilities(hugging_face(tmp_path / "converted"), ids), log_probabilities(hugging_face(folder), ids))


BIAS = "blk.0.attn_q.bias"
OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "part of the head rotates": ({"llama.rope.dimension_count": 16}, {}, "rope.dimension_count is 16, and its heads have 32"),
    "values smaller than keys": ({"llama.attention.value_length": 16}, {}, "value_length is 16"),
    "experts": ({"llama.expert_count": 8, "llama.expert_used_count": 2}, {}, "expert_count = 8"),
    "scaled logits": ({"llama.logit_scale": 0.0625}, {}, "logit_scale = 0.0625"),
    "clamped": ({"llama.attention.clamp_kqv": 8.0}, {}, "clamp_kqv"),
    "an unknown key": ({"llama.attention.scale": 0.5}, {}, "attention.scale"),
    "sections of M-RoPE": ({"llama.rope.dimension_sections": [1, 2, 3]}, {}, "dimension_sections"),
    "not causal": ({"llama.attention.causal": False}, {}, "not causal"),
    "layers that differ": ({"llama.attention.head_count_kv": [1, 2]}, {}, "layers differ"),
    "longrope": ({LINEAR: "longrope", FACTOR: 4.0}, {}, "scaling.type is longrope"),
    "yarn of its own kind": ({LINEAR: "yarn", FACTOR: 4.0, "llama.rope.scaling.attn_factor": 0.5}, {}, "attn_factor = 0.5"),
    "factors of nobody": ({}, {"rope_freqs.weight": [1.0] * 15 + [3.0]}, "not those of Llama 3"),
    "factors and scaling": ({FACTOR: 4.0}, {"rope_freqs.weight": llama3_factors(32, **LLAMA31)}, "both"),
    "biases": ({}, {BIAS: np.ones(128)}, BIAS),
    "a norm of queries": ({}, {"blk.0.attn_q_norm.weight": np.ones(32)}, "attn_q_norm"),
    "an adapter": ({"general.type": "adapter"}, {}, "type adapter"),
    "an adapter's tensor": ({}, {"blk.0.attn_q.weight.lora_a": np.ones((4, 128))}, "lora_a"),
    "fewer embeddings than tokens": ({"tokenizer.ggml.tokens": words(301), "tokenizer.ggml.token_type": [1] * 301}, {}, "301 tokens"),
    "no size": ({"llama.embedding_length": None}, {}, "no llama.embedding_length"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_another_computation_is_refused_by_name(tmp_path: Path, case: str) -> None:
    said, tensors, named = OTHER[case]
    file = as_gguf(checkpoint(tmp_path / "weights"), tmp_path / "gguf", said, tensors=tensors)
    with pytest.raises(LaunchError) as refused:
        convert(file, tmp_path / "converted")
    assert refused.value.code is Code.WEIGHTS
    assert named in str(refused.value)
    assert not (tmp_path / "converted").exists()


def test_biases_that_are_all_zero_are_left_out(tmp_path: Path) -> None:
    convert(
        as_gguf(checkpoint(tmp_path / "weights"), tmp_path / "gguf", {}, tensors={BIAS: np.zeros(128)}), tmp_path / "converted"
    )
    assert not any(name.endswith(".bias") for name in load_file(tmp_path / "converted" / "model.safetensors"))


def test_the_thresholds_of_llama_3_are_where_hugging_face_has_them() -> None:
    turns = [8192 / 10000.0 ** (2 * n / 64) / (2 * math.pi) for n in range(32)]
    factors = llama3_factors(64, **LLAMA31).tolist()
    assert all(factor == pytest.approx(1) for factor, turn in zip(factors, turns, strict=True) if turn > 4)
    assert all(factor == pytest.approx(8) for factor, turn in zip(factors, turns, strict=True) if turn < 1)
