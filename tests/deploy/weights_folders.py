"""Folders of weights as they come from the hub: the configuration of Mistral 7B, and files with a valid header and hardly a byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def tensors(**shapes: tuple[str, list[int]]) -> bytes:
    """A safetensors file of tensors by name, each with its type and shape; all of its data is zero."""
    header, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1}[dtype]
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def folder(path: Path, config: dict[str, Any] | None = None, files: dict[str, bytes] | None = None, **more: Any) -> Path:
    """Writes a folder: config.json (of Mistral 7B, and `more`) and files, one of weights if none are given."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps((MISTRAL_7B if config is None else config) | more))
    for name, data in ({"model.safetensors": tensors(norm=("BF16", [4]))} if files is None else files).items():
        (path / name).write_bytes(data)
    return path
