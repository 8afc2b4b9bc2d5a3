"""A tiny random Mistral checkpoint with a sliding window, in Hugging Face format, written with the standard library alone."""

from __future__ import annotations

import array
import json
import random
import shutil
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 49152,
    "max_position_embeddings": 8192, "sliding_window": 1000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write(folder: Path, tokenizer: Path) -> Path:
    """Writes config, weights (seeded) and the tokenizer files of another checkpoint with the same vocabulary."""
    folder.mkdir(parents=True)
    h, kv, q, wide = 64, 64, 128, 128
    shapes = {"model.embed_tokens.weight": (49152, h), "model.norm.weight": (h,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (q, h), f"{layer}.self_attn.k_proj.weight": (kv, h),
            f"{layer}.self_attn.v_proj.weight": (kv, h), f"{layer}.self_attn.o_proj.weight": (h, q),
            f"{layer}.mlp.gate_proj.weight": (wide, h), f"{layer}.mlp.up_proj.weight": (wide, h),
            f"{layer}.mlp.down_proj.weight": (h, wide), f"{layer}.input_layernorm.weight": (h,),
            f"{layer}.post_attention_layernorm.weight": (h,),
        }  # fmt: skip
    generator = random.Random(7)  # noqa: S311 - weights, not secrets
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blob = bytearray()
    for name, shape in shapes.items():
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        data = array.array("f", [1.0] * size if len(shape) == 1 else [generator.uniform(-0.1, 0.1) for _ in range(size)])
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(blob), len(blob) + 4 * size]}
        blob += data.tobytes()
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + blob)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder / file.name)
    return folder


def tokenizer(folder: Path) -> Path:
    """Writes the files of a tokenizer that knows a word for each token of that checkpoint, `w0` to `w49151`, and takes any other for the first."""
    folder.mkdir(parents=True)
    vocabulary = {f"w{token}": token for token in range(CONFIG["vocab_size"])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def adapter(folder: Path, seed: int) -> Path:
    """Writes a LoRA adapter of rank 4 for the queries of that checkpoint, in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)  # noqa: S311
    header: dict[str, object] = {}
    blob = bytearray()
    for layer in range(2):
        for side, shape in (("A", [4, 64]), ("B", [128, 4])):
            data = array.array("f", [generator.uniform(-1, 1) for _ in range(shape[0] * shape[1])])
            place = [len(blob), len(blob) + len(data) * 4]
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": place}
            blob += data.tobytes()
    head = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + blob)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["q_proj"]}')
    return folder
