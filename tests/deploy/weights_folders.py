"""Folders of weights as they come from the hub: the configuration of Mistral 7B, and files with a valid header and holes for data."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

from mistral_contract import architecture, quantization
from mistral_contract import tensors as contract

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
W4A16 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True,
    }}},
}  # fmt: skip


WIDTHS = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1}
Shapes = dict[str, tuple[str, list[int]]]


def header(shapes: Shapes) -> tuple[bytes, int]:
    """The header of a safetensors file of tensors by name, each with its type and shape; and how many bytes follow it."""
    found, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = WIDTHS[dtype] * math.prod(shape)
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(found).encode()
    return len(text).to_bytes(8, "little") + text, at


def tensors(**shapes: tuple[str, list[int]]) -> bytes:
    """A safetensors file of tensors; all of its data is zero."""
    beginning, size = header(shapes)
    return beginning + bytes(size)


def whole(config: dict[str, Any], beside: dict[str, Any] | None = None, dtype: str = "BF16") -> Shapes:
    """Every tensor of the model of a config.json or params.json; of one that is quantized a number for each module."""
    own = "dim" in config
    model = architecture.read_params(config) if own else architecture.read(config)
    quantized = quantization.read(config, beside) is not None
    names = {theirs: mine for mine, theirs in contract.CONSOLIDATED.items()} if own else {}

    def name(module: str) -> str:
        layer = re.fullmatch(r"model\.(layers\.\d+\.)(.+)", module)
        return f"{layer[1]}{names[layer[2]]}" if layer and own else names.get(module, module)

    return {
        f"{name(module)}.{'qweight' if quantized else 'weight'}": ("I32", [1]) if quantized else (dtype, list(shape))
        for module, shape in contract.shapes(model).items() if not (model.tied and module == "lm_head")
    }  # fmt: skip


def write(path: Path, shapes: Shapes) -> None:
    """Writes a safetensors file, whose data is a hole."""
    beginning, size = header(shapes)
    path.write_bytes(beginning)
    os.truncate(path, len(beginning) + size)


LLAMA = {
    "general.architecture": "llama", "llama.context_length": 8192, "llama.embedding_length": 576, "llama.block_count": 30,
    "llama.feed_forward_length": 1536, "llama.attention.head_count": 9, "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 49152,
}  # fmt: skip


def gguf(tensors: tuple[str, ...] = (), **more: str | float | list[str]) -> bytes:
    """The beginning of a GGUF file with the keys of SmolLM2 (and `more`; `__` stands for a dot) and tensors of these names."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def value(given: object) -> bytes:
        if isinstance(given, list):
            return struct.pack("<IIQ", 9, 8, len(given)) + b"".join(map(text, given))
        if isinstance(given, str):
            return struct.pack("<I", 8) + text(given)
        return struct.pack("<If", 6, given) if isinstance(given, float) else struct.pack("<II", 4, given)

    keys = LLAMA | {key.replace("__", "."): one for key, one in more.items()}
    found = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    found += b"".join(text(key) + value(one) for key, one in keys.items())
    return found + b"".join(text(name) + struct.pack("<IQIQ", 1, 1, 0, 0) for name in tensors)


def folder(path: Path, config: dict[str, Any] | None = None, files: dict[str, bytes] | None = None, **more: Any) -> Path:
    """Writes a folder: config.json (of Mistral 7B, and `more`), a tokenizer, and files: those of weights whole if none are given."""
    path.mkdir(parents=True, exist_ok=True)
    config = (MISTRAL_7B if config is None else config) | more
    for name, data in {"config.json": json.dumps(config).encode(), "tokenizer.model": b"", **(files or {})}.items():
        (path / name).write_bytes(data)
    if files is None or not any(name.endswith((".safetensors", ".gguf")) for name in files):
        try:
            write(path / "model.safetensors", whole(config, {name: json.loads(data) for name, data in (files or {}).items()}))
        except ValueError:  # no such model is served
            write(path / "model.safetensors", {})
    return path
