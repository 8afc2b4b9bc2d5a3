"""Small sets of weights, as a hub has them: two shards, an index, what lies beside them, and what serving does not need."""

from __future__ import annotations

import json
import random

KIB = 1024
RANGE = 256 * KIB


def a_set(seed: int = 7, shard: int = 1400 * KIB) -> dict[str, bytes]:
    """Name -> bytes. `seed` chooses the contents, `shard` is the size of each of the two shards."""
    dice = random.Random(seed)
    shards = {f"model-0000{n}-of-00002.safetensors": dice.randbytes(shard + n * 1000) for n in (1, 2)}
    weight_map = {f"layer.{n}": name for n, name in enumerate(shards)}
    return {
        **shards,
        "config.json": json.dumps({"architectures": ["MistralForCausalLM"], "seed": seed}).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "tokenizer.json": dice.randbytes(90 * KIB),
        "empty.json": b"",
        "LICENSE": b"Apache License 2.0\n",
    }


def unneeded(seed: int = 7) -> dict[str, bytes]:
    """What a pull leaves where it is: the other form of the weights, pickles, code, folders."""
    dice = random.Random(seed + 1)
    return {
        "consolidated.safetensors": dice.randbytes(300 * KIB),
        "params.json": b"{}",
        "pytorch_model.bin": dice.randbytes(200 * KIB),
        "pytorch_model.bin.index.json": b"{}",
        "modeling_evil.py": b"raise SystemExit\n",
        "original/weights.safetensors": dice.randbytes(1000),
    }
