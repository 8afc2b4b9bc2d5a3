"""Mistral 7B in one file: the model, a paged rolling KV cache, chunked prefill, sampling. Only torch.

Read it from top to bottom: weights on disk, the arithmetic of a layer, the blocks of the cache, the engine that
puts many sequences through both, the canary, the command line. It favours being plainly right over being fast; the fast version
is `vllm_mistral.model`, and this file is the oracle of its tests.

Letters in shapes: T tokens of one step (all sequences laid end to end), Q queries and K keys of one sequence,
H query heads, G key-value heads (H is a multiple of G), D head_dim, V vocabulary, N blocks, B tokens of one block.

    python -m vllm_mistral.reference WEIGHTS "The capital of France is"
    python -m vllm_mistral.reference WEIGHTS --canary
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

CANARY_FILE = "mistralctl-canary.json"
CANARY_TOKENS = 8
PREFILL_CHUNK = 2048  # tokens of one step, vLLM's max_num_batched_tokens
QUERY_TILE = 512  # queries whose scores are in memory at once
RECYCLED = -1  # the block table's entry for a block that lies behind the window
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BadInput(Exception):
    """What is wrong with weights, prompt or options, in one line."""


# ---------------------------------------------------------------------------------------------- weights on disk


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that make a Mistral. `windows` has one entry a layer: W tokens, or None for full attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    special_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @property
    def sliding_window(self) -> int | None:
        """The widest window of all layers; None when no layer has one."""
        return max((w for w in self.windows if w is not None), default=None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, by its Hugging Face name. A linear layer is [out, in]."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "input_layernorm.weight": (hidden,),
                layer + "self_attn.q_proj.weight": (query, hidden),
                layer + "self_attn.k_proj.weight": (key_value, hidden),
                layer + "self_attn.v_proj.weight": (key_value, hidden),
                layer + "self_attn.o_proj.weight": (hidden, query),
                layer + "post_attention_layernorm.weight": (hidden,),
                layer + "mlp.gate_proj.weight": (inner, hidden),
                layer + "mlp.up_proj.weight": (inner, hidden),
                layer + "mlp.down_proj.weight": (hidden, inner),
            }
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def hugging_face_config(raw: dict[str, Any]) -> ModelConfig:
    """`config.json`. A missing `sliding_window` means 4096, as in transformers; null or 0 means none."""
    if raw.get("model_type") not in ("mistral", "ministral"):
        raise BadInput(f"config.json: model_type is {raw.get('model_type')!r}, not 'mistral'")
    if raw.get("quantization_config"):
        raise BadInput("config.json: quantized weights; the reference reads float32, bfloat16 and float16 only")
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | (raw.get("rope_parameters") or {})
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        raise BadInput("config.json: a scaled rotary embedding; the reference knows the plain one only")
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    window = raw.get("sliding_window", 4096) or None
    layer_types = raw.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    if len(layer_types) != layers or set(layer_types) - {"sliding_attention", "full_attention"}:
        raise BadInput(f"config.json: layer_types must be {layers} of 'sliding_attention' and 'full_attention'")
    if window is None and "sliding_attention" in layer_types:
        raise BadInput("config.json: layer_types has sliding_attention, but there is no sliding_window")
    eos = raw.get("eos_token_id", 2)
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    special = {*eos_ids, raw.get("bos_token_id", 1), raw.get("pad_token_id")} - {None}
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        max_position_embeddings=raw.get("max_position_embeddings", 131072),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
        special_token_ids=tuple(sorted(special)),
        eos_token_ids=eos_ids,
    )


def consolidated_config(raw: dict[str, Any]) -> ModelConfig:
    """`params.json`, Mistral's own format. Without `rope_theta` it is 10000 with a window and 1000000 without, as in mistral-src.

    `sliding_window` may be a list: a pattern that repeats over the layers.
    """
    if raw.get("quantization") or raw.get("moe") or raw.get("yarn"):
        raise BadInput("params.json: quantization, experts and yarn are not for the reference")
    window = raw.get("sliding_window") or None
    pattern = [w or None for w in window] if isinstance(window, list) else [window]
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["dim"],
        intermediate_size=raw["hidden_dim"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        head_dim=raw.get("head_dim") or raw["dim"] // raw["n_heads"],
        rms_norm_eps=raw["norm_eps"],
        rope_theta=raw.get("rope_theta") or (1e6 if window is None else 1e4),
        max_position_embeddings=raw.get("max_position_embeddings") or raw.get("max_seq_len") or 128_000,
        tie_word_embeddings=bool(raw.get("tied_embeddings", False)),
        windows=tuple(pattern[i % len(pattern)] for i in range(raw["n_layers"])),
        special_token_ids=(1, 2),
        eos_token_ids=(2,),
    )


CONSOLIDATED_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hugging_face_name(name: str) -> str:
    """
    >>> hugging_face_name("layers.3.attention.wq.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    layer = ""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, index, stem = stem.split(".", 2)
        layer = f"model.layers.{index}."
    return f"{layer}{CONSOLIDATED_NAMES.get(stem, stem)}.weight"


def split_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a consolidated wq or wk [heads*D, in], which rotates neighbours (0,1), (2,3), ... of a head, into
    Hugging Face's order, which rotates element i of the first half with element i of the second.

    >>> split_halves(torch.arange(8).view(8, 1), num_heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    out, hidden = weight.shape
    return weight.view(num_heads, out // num_heads // 2, 2, hidden).transpose(1, 2).reshape(out, hidden)


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: should be a JSON object")
    return raw


def weight_files(folder: Path) -> tuple[list[Path], bool]:
    """The safetensors files of a folder, and whether they are Mistral's consolidated ones."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the folder with config.json and *.safetensors")
    if (folder / "model.safetensors.index.json").exists():
        shards = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
        return sorted({folder / shard for shard in shards}), False
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"], False
    consolidated = sorted(folder.glob("consolidated*.safetensors"))
    if not consolidated:
        raise BadInput(f"{folder}: no model.safetensors, model.safetensors.index.json or consolidated*.safetensors")
    return consolidated, True


def read_config(folder: Path) -> ModelConfig:
    _, consolidated = weight_files(folder)
    name, convert = ("params.json", consolidated_config) if consolidated else ("config.json", hugging_face_config)
    try:
        config = convert(read_json(folder / name))
    except KeyError as error:
        raise BadInput(f"{folder / name}: {error.args[0]} is missing") from error
    except TypeError as error:
        raise BadInput(f"{folder / name}: a value has the wrong type ({error})") from error
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise BadInput(f"{folder / name}: head_dim must be even, and query heads a multiple of key-value heads")
    return config


def read_weights(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All weights by Hugging Face name, in `dtype`, or as they are stored. Every tensor is accounted for."""
    files, consolidated = weight_files(folder)
    shapes = config.shapes()
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device=str(device)) as shard:
                for stored_name in shard.keys():
                    name = hugging_face_name(stored_name) if consolidated else stored_name
                    if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" and config.tie_word_embeddings:
                        continue
                    if name not in shapes:
                        raise BadInput(f"{path}: {stored_name} is not a weight of this architecture")
                    tensor = shard.get_tensor(stored_name)
                    if tuple(tensor.shape) != shapes[name]:
                        raise BadInput(f"{path}: {stored_name} is {list(tensor.shape)}, not {list(shapes[name])}")
                    if tensor.dtype not in DTYPES.values():
                        raise BadInput(f"{path}: {stored_name} is {tensor.dtype}; only {', '.join(DTYPES)} are read")
                    if consolidated and name.endswith(("q_proj.weight", "k_proj.weight")):
                        tensor = split_halves(tensor, tensor.shape[0] // config.head_dim)
                    weights[name] = tensor.to(dtype) if dtype else tensor
        except FileNotFoundError as error:
            raise BadInput(f"{path}: missing, though the index names it") from error
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path}: not a readable safetensors file ({error})") from error
    missing = shapes.keys() - weights.keys()
    if missing:
        raise BadInput(f"{folder}: {len(missing)} weights are missing, the first is {min(missing)}")
    return weights


# ---------------------------------------------------------------------------------------------- the arithmetic


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32. x [T, hidden], weight [hidden].

    mean(3^2, 4^2) = 12.5 and its root is 3.5355, so (3, 4) becomes (0.8485, 1.1314):

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    tensor([[0.8485, 1.1314]])
    """
    wide = x.float()
    return weight.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, 1, D/2]: at position p pair i is turned by p * theta^(-2i/D) radians.

    head_dim 4, theta 10000: the two pairs turn by 1 and by 0.01 radian a token.

    >>> cos, sin = rotary_angles(torch.tensor([0, 3]), head_dim=4, theta=10000.0)
    >>> torch.atan2(sin, cos).squeeze(1)
    tensor([[0.0000, 0.0000],
            [3.0000, 0.0300]])
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[:, None] * frequencies
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's pairs (x[i], x[i + D/2]) by their angle. x [T, heads, D].

    A quarter turn takes (1, 0) to (0, 1). Only differences of positions survive in a product of query and key:
    both at positions (5, 3) and at (2, 0) it is the same.

    >>> rotate(torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).tolist()
    [[[0.0, 1.0]]]
    >>> q, k = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -1.0]]])
    >>> at = lambda x, p: rotate(x, *rotary_angles(torch.tensor([p]), 2, 10000.0))
    >>> [round((at(q, p) * at(k, p - 2)).sum().item(), 4) for p in (5, 2)]
    [-6.7812, -6.7812]
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, query_start: int, key_start: int, window: int | None) -> Tensor:
    """Causal grouped-query attention of one sequence. query [Q, H, D], key and value [K, G, D]; returns [Q, H, D].

    Row 0 of `query` is the token at position `query_start`, row 0 of `key` that at `key_start`. A query at position p sees
    the keys at p - W + 1 .. p: a key at distance >= W is masked, so W keys are seen, its own among them. Query head h reads
    key-value head h // (H / G). Queries go in tiles, and a tile does not even read keys that all its queries mask.

    With equal scores the result is the mean of the values seen. W = 2, values 1, 2, 3, 4:

    >>> values = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    >>> zeros = torch.zeros(4, 1, 1)
    >>> attention(zeros, zeros, values, 0, 0, window=2).flatten().tolist()
    [1.0, 1.5, 2.5, 3.5]
    >>> attention(zeros, zeros, values, 0, 0, window=None).flatten().tolist()
    [1.0, 1.5, 2.0, 2.5]

    The last query alone, with only the keys at positions 2 and 3 in hand, comes to the same:

    >>> attention(zeros[3:], zeros[2:], values[2:], 3, 2, window=2).flatten().tolist()
    [3.5]
    """
    num_queries, heads, head_dim = query.shape
    groups = key.shape[1]
    output = torch.empty_like(query)
    for tile in range(0, num_queries, QUERY_TILE):
        q = query[tile : tile + QUERY_TILE].view(-1, groups, heads // groups, head_dim)
        first, last = query_start + tile, query_start + tile + q.shape[0] - 1
        oldest = key_start if window is None else max(key_start, first - window + 1)
        seen = slice(oldest - key_start, last + 1 - key_start)
        distance = (
            torch.arange(first, last + 1, device=q.device)[:, None]
            - torch.arange(oldest, last + 1, device=q.device)[None, :]
        )
        masked = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = torch.einsum("qghd,kgd->ghqk", q, key[seen]).float() * head_dim**-0.5
        weights = scores.masked_fill_(masked, -math.inf).softmax(dim=-1).to(value.dtype)
        output[tile : tile + QUERY_TILE] = torch.einsum("ghqk,kgd->qghd", weights, value[seen]).reshape(-1, heads, head_dim)
    return output


# ---------------------------------------------------------------------------------------------- the paged KV cache


def blocks_held(window: int | None, chunk: int, block_size: int, length: int) -> int:
    """The most blocks that one sequence of `length` tokens holds when at most `chunk` tokens are computed in a step.

    A step needs the W - 1 tokens before its first one and the chunk itself, and the window may begin inside a block. Mistral 7B
    v0.1 with blocks of 16 and chunks of 2048: (4095 + 2048) / 16 = 384, and one more. Without the window 32768 tokens hold 2048.

    >>> blocks_held(4096, 2048, 16, 32768), blocks_held(None, 2048, 16, 32768)
    (385, 2048)
    """
    whole = -(-length // block_size)
    return whole if window is None else min(whole, -(-(window - 1 + chunk) // block_size) + 1)


class BlockPool:
    """The numbers of free blocks. Blocks that come back are lent again at once, so a pool too small is noticed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks))[::-1]

    def take(self) -> int:
        assert self.free, "the engine admitted more sequences than the pool can hold"
        return self.free.pop()

    def give_back(self, block: int) -> None:
        assert 0 <= block < self.num_blocks and block not in self.free
        self.free.append(block)


@dataclass
class BlockTable:
    """Where one sequence's tokens lie: token p is in block `blocks[p // B]`, at slot `blocks[p // B] * B + p % B`.

    Before tokens 8 and 9 of a sequence are computed with W = 4 and blocks of 2, the oldest key needed is that of
    token 8 - 4 + 1 = 5. Blocks 0 and 1 of the table (tokens 0 to 3) are behind it and go back to the pool; the new tokens
    get one of them again.

    >>> pool = BlockPool(8)
    >>> table = BlockTable(pool, block_size=2, window=4)
    >>> table.advance(0, 8); table.blocks, pool.free
    ([0, 1, 2, 3], [7, 6, 5, 4])
    >>> table.advance(8, 10); table.blocks, pool.free
    ([-1, -1, 2, 3, 0], [7, 6, 5, 4, 1])
    >>> table.slot_mapping(8, 10)
    [0, 1]
    """

    pool: BlockPool
    block_size: int
    window: int | None
    blocks: list[int] = field(default_factory=list)
    num_recycled: int = 0

    def oldest_block(self, start: int) -> int:
        """Index in the table of the oldest block that a query at position `start` can see."""
        return 0 if self.window is None else max(0, start - self.window + 1) // self.block_size

    def advance(self, start: int, end: int) -> None:
        """Give blocks behind the window of `start` back to the pool, then take blocks for tokens up to `end`."""
        for index in reversed(range(self.num_recycled, min(self.oldest_block(start), len(self.blocks)))):
            self.pool.give_back(self.blocks[index])
            self.blocks[index] = RECYCLED
        self.num_recycled = max(self.num_recycled, self.oldest_block(start))
        while len(self.blocks) * self.block_size < end:
            self.blocks.append(self.pool.take())

    def slot_mapping(self, start: int, end: int) -> list[int]:
        return [self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)]

    def release(self) -> None:
        for block in self.blocks:
            if block != RECYCLED:
                self.pool.give_back(block)
        self.blocks.clear()


@dataclass
class KVCache:
    """Keys and values of all layers that share one window: each [layers, N, B, G, D], and the pool of their blocks."""

    window: int | None
    layers: tuple[int, ...]
    block_size: int
    pool: BlockPool
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence in one step: rows `rows` of the batch, positions `start` .. `end` - 1.

    `block_table[c]` are the blocks of cache c that this chunk reads, the oldest one at position `key_start[c]`.
    """

    rows: slice
    start: int
    end: int
    block_table: tuple[Tensor, ...]
    key_start: tuple[int, ...]


class Mistral:
    """Weights and the forward pass. Weights may be narrower than `dtype`: each is widened where it is used, which is exact."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.device = weights["model.norm.weight"].device

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, wide: bool = True) -> Mistral:
        """The model in a folder. `wide=False` keeps the weights as stored: half the memory for bfloat16, slower decoding."""
        config = read_config(Path(folder))
        return cls(config, read_weights(Path(folder), config, torch.device(device), dtype if wide else None), dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"].to(x.dtype))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name + ".weight"], self.config.rms_norm_eps)

    def new_caches(self, num_blocks: Callable[[int | None], int], block_size: int) -> list[KVCache]:
        """One cache for each window that occurs among the layers, of `num_blocks(window)` blocks."""
        caches = []
        for window in dict.fromkeys(self.config.windows):
            layers = tuple(i for i, w in enumerate(self.config.windows) if w == window)
            pool = BlockPool(num_blocks(window))
            shape = (len(layers), pool.num_blocks, block_size, self.config.num_key_value_heads, self.config.head_dim)
            key = torch.empty(shape, dtype=self.dtype, device=self.device)
            caches.append(KVCache(window, layers, block_size, pool, key, torch.empty_like(key)))
        return caches

    def forward(
        self, token_ids: Tensor, positions: Tensor, slot_mapping: list[Tensor], chunks: list[Chunk], caches: list[KVCache]
    ) -> Tensor:
        """One step. token_ids, positions and each cache's slot_mapping are [T]; returns the last hidden states [T, hidden]."""
        config = self.config
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta)
        x = F.embedding(token_ids, self.weights["model.embed_tokens.weight"]).to(self.dtype)
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            c = next(index for index, cache in enumerate(caches) if i in cache.layers)
            h = self.norm(x, layer + "input_layernorm")
            query = self.linear(h, layer + "self_attn.q_proj").view(-1, config.num_attention_heads, config.head_dim)
            key = self.linear(h, layer + "self_attn.k_proj").view(-1, config.num_key_value_heads, config.head_dim)
            value = self.linear(h, layer + "self_attn.v_proj").view(-1, config.num_key_value_heads, config.head_dim)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)

            place = caches[c].layers.index(i)
            key_cache, value_cache = caches[c].key[place], caches[c].value[place]
            key_cache.flatten(0, 1)[slot_mapping[c]] = key
            value_cache.flatten(0, 1)[slot_mapping[c]] = value
            output = torch.empty_like(query)
            for chunk in chunks:
                table, key_start = chunk.block_table[c], chunk.key_start[c]
                keys = key_cache[table].flatten(0, 1)[: chunk.end - key_start]
                values = value_cache[table].flatten(0, 1)[: chunk.end - key_start]
                output[chunk.rows] = attention(query[chunk.rows], keys, values, chunk.start, key_start, config.windows[i])
            x = x + self.linear(output.flatten(1), layer + "self_attn.o_proj")

            h = self.norm(x, layer + "post_attention_layernorm")
            gate, up = self.linear(h, layer + "mlp.gate_proj"), self.linear(h, layer + "mlp.up_proj")
            x = x + self.linear(F.silu(gate) * up, layer + "mlp.down_proj")
        return self.norm(x, "model.norm")

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Natural logarithms [T, V] in float32 of the next token's probabilities."""
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.linear(hidden, head).float().log_softmax(dim=-1)


# ---------------------------------------------------------------------------------------------- sampling and the engine


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. Sequence i of a call draws from a generator with seed `seed + i`, whatever else is in the batch."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise BadInput("max_tokens and temperature must not be negative, and top_p must be in (0, 1]")


def sample(logprobs: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token of log-probabilities [V]. Top-p keeps the fewest most likely tokens whose probabilities reach p together.

    Of 0.5, 0.3, 0.2 and top_p 0.7 two are left, and then drawn as 5 : 3.

    >>> logprobs = torch.tensor([0.3, 0.2, 0.5]).log()
    >>> sample(logprobs, Sampling(), torch.Generator())
    2
    >>> generator = torch.Generator().manual_seed(0)
    >>> drawn = [sample(logprobs, Sampling(temperature=1.0, top_p=0.7), generator) for _ in range(1000)]
    >>> sorted(set(drawn)), 575 < drawn.count(2) < 675
    ([0, 2], True)
    """
    if sampling.temperature == 0:
        return int(logprobs.argmax())
    probabilities, tokens = (logprobs.cpu() / sampling.temperature).softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


@dataclass
class Request:
    """One sequence on its way: `token_ids[:num_computed]` are in the cache. Log-probabilities [rows, V] are kept from `first_row` on."""

    token_ids: list[int]
    sampling: Sampling
    first_row: int
    keep_rows: bool
    generator: torch.Generator
    num_computed: int = 0
    tables: list[BlockTable] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def total_length(self) -> int:
        return len(self.token_ids) - len(self.generated) + self.sampling.max_tokens


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]


class Engine:
    """Runs many sequences at once: each step computes at most `max_num_batched_tokens` tokens, one for every sequence that
    generates and the rest for prompts. A sequence waits until `num_blocks` (of each cache; None: as many as needed) have room for all
    that it can hold; with the window that is the same few blocks, however long its prompt."""

    def __init__(
        self,
        model: Mistral,
        block_size: int = 16,
        max_num_batched_tokens: int = PREFILL_CHUNK,
        max_num_seqs: int = 64,
        num_blocks: int | None = None,
        progress: Callable[[int, int], None] = lambda computed, total: None,
    ) -> None:
        if min(block_size, max_num_batched_tokens, max_num_seqs) < 1:
            raise BadInput("block_size, max_num_batched_tokens and max_num_seqs must be at least 1")
        self.model, self.block_size, self.max_num_seqs = model, block_size, max_num_seqs
        self.max_num_batched_tokens, self.num_blocks, self.progress = max_num_batched_tokens, num_blocks, progress
        self.caches: list[KVCache] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        requests = self.run(prompts, sampling, [len(prompt) - 1 for prompt in prompts], keep_rows=False)
        return [Completion(request.generated, request.logprobs) for request in requests]

    def score(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each prompt of n tokens [n, V]: row p holds the log-probabilities of the token that follows position p."""
        requests = self.run(prompts, Sampling(max_tokens=0), [0] * len(prompts), keep_rows=True)
        return [torch.cat(request.rows) for request in requests]

    def forced_logprobs(self, prompt: Sequence[int], forced: Sequence[int]) -> list[float]:
        """The log-probability of each forced token, after the prompt and the forced tokens before it."""
        tokens = [*prompt, *forced]
        [request] = self.run([tokens], Sampling(max_tokens=0), [len(prompt) - 1], keep_rows=True)
        rows = torch.cat(request.rows)
        return [float(rows[i, token]) for i, token in enumerate(forced)]

    def blocks_of(self, request: Request, window: int | None) -> int:
        return blocks_held(window, self.max_num_batched_tokens, self.block_size, request.total_length)

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, first_rows: Sequence[int], keep_rows: bool
    ) -> list[Request]:
        config = self.model.config
        requests = []
        for i, prompt in enumerate(prompts):
            if not prompt or not all(0 <= token < config.vocab_size for token in prompt):
                raise BadInput(f"prompt {i}: must be one or more token ids below {config.vocab_size}")
            if len(prompt) + sampling.max_tokens > config.max_position_embeddings:
                raise BadInput(
                    f"prompt {i}: {len(prompt)} tokens and {sampling.max_tokens} more do not fit into the context of "
                    f"{config.max_position_embeddings}"
                )
            generator = torch.Generator().manual_seed(sampling.seed + i)
            requests.append(Request(list(prompt), sampling, first_rows[i], keep_rows, generator))

        def pool_size(window: int | None) -> int:
            needs = sorted((self.blocks_of(request, window) for request in requests), reverse=True)
            limit = sum(needs[: self.max_num_seqs]) if self.num_blocks is None else self.num_blocks
            if needs and needs[0] > limit:
                raise BadInput(f"num_blocks: a sequence needs {needs[0]} blocks of {self.block_size}, there are {limit}")
            return limit

        self.caches = self.model.new_caches(pool_size, self.block_size)
        total = sum(request.total_length for request in requests)
        waiting, running = deque(requests), list[Request]()
        while waiting or running:
            while waiting and len(running) < self.max_num_seqs and self.admits(waiting[0], running):
                request = waiting.popleft()
                request.tables = [BlockTable(cache.pool, self.block_size, cache.window) for cache in self.caches]
                running.append(request)
            self.step(running)
            for request in running:
                if request.finished:
                    for table in request.tables:
                        table.release()
            running = [request for request in running if not request.finished]
            self.progress(sum(request.num_computed for request in requests), total)
        return requests

    def admits(self, request: Request, running: list[Request]) -> bool:
        return all(
            sum(self.blocks_of(other, cache.window) for other in [*running, request]) <= cache.pool.num_blocks
            for cache in self.caches
        )

    def step(self, running: list[Request]) -> None:
        """Choose the tokens of one step, run the model on them, and give each sequence whose prompt is done its next token."""
        budget = self.max_num_batched_tokens
        scheduled: list[tuple[Request, int]] = []
        for request in sorted(running, key=lambda request: not request.generated):
            count = min(budget, len(request.token_ids) - request.num_computed)
            if count:
                scheduled.append((request, count))
                budget -= count

        device = self.model.device
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[list[int]] = [[] for _ in self.caches]
        chunks: list[Chunk] = []
        for request, count in scheduled:
            start, end = request.num_computed, request.num_computed + count
            block_table, key_start = [], []
            for table, slot_mapping in zip(request.tables, slots, strict=True):
                table.advance(start, end)
                slot_mapping += table.slot_mapping(start, end)
                block_table.append(torch.tensor(table.blocks[table.oldest_block(start) :], device=device))
                key_start.append(table.oldest_block(start) * self.block_size)
            rows = slice(len(token_ids), len(token_ids) + count)
            chunks.append(Chunk(rows, start, end, tuple(block_table), tuple(key_start)))
            token_ids += request.token_ids[start:end]
            positions += range(start, end)
        hidden = self.model.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            [torch.tensor(slot_mapping, device=device) for slot_mapping in slots],
            chunks,
            self.caches,
        )
        for (request, _), chunk in zip(scheduled, chunks, strict=True):
            self.receive(request, chunk, hidden[chunk.rows])

    def receive(self, request: Request, chunk: Chunk, hidden: Tensor) -> None:
        request.num_computed = chunk.end
        wanted = hidden[max(0, request.first_row - chunk.start) :]
        logprobs = self.model.log_probabilities(wanted) if len(wanted) else wanted
        if request.keep_rows and len(wanted):
            request.rows.append(logprobs)
        if chunk.end < len(request.token_ids):
            return
        if len(request.generated) < request.sampling.max_tokens:
            token = sample(logprobs[-1], request.sampling, request.generator)
            request.generated.append(token)
            request.logprobs.append(float(logprobs[-1, token]))
            request.token_ids.append(token)
        request.finished = len(request.generated) == request.sampling.max_tokens or (
            request.generated[-1] in request.sampling.stop_token_ids
        )


# ---------------------------------------------------------------------------------------------- the canary


def canary_prompt(config: ModelConfig) -> list[int]:
    """Token ids on which a wrong window, rotary embedding or weight shows: at most a quarter longer than the window and than a chunk.

    Words drawn by lot, and among them a key of 16 tokens with what follows it. Behind the window the key is followed by one answer, many
    times over; inside the window, near its far edge, it is followed by another, once; and the prompt ends with the key. A right model has only
    the second to go by. With the window off or wider the first ones come into sight, with a narrower one the second is lost; and as it
    lies almost a window away, a wrong rotary embedding spoils finding it. A model without a window gets the prompt of window 4096.
    """
    longest = config.max_position_embeddings - CANARY_TOKENS
    window = config.sliding_window or 4096
    length = min(max(window, PREFILL_CHUNK) * 5 // 4, longest)
    near = window if window < length else length * 4 // 5
    draw = random.Random(0)
    first = min(1000, config.vocab_size // 4)  # Mistral's and other vocabularies keep their special tokens below
    ordinary = [t for t in range(first, config.vocab_size // 2) if t not in config.special_token_ids]
    if near < 32 or not ordinary:
        raise BadInput(f"canary: a context of {config.max_position_embeddings} tokens or the vocabulary is too small")

    def words(count: int) -> list[int]:
        return [draw.choice(ordinary) for _ in range(count)]

    size = min(16, near // 8)
    key, distant, answer = words(size), words(size), words(size)
    lead = words(CANARY_TOKENS + 12)[: near - 4 * size]
    tail = [*lead, *key, *answer, *words(near - len(lead) - 3 * size), *key]
    head: list[int] = []
    while len(head) < length - near:
        head += [*key, *distant, *words(2 * size)]
    return head[: length - near] + tail


def make_canary(engine: Engine) -> dict[str, Any]:
    """What a right engine says to `canary_prompt`: eight greedy tokens and their natural log-probabilities."""
    model = engine.model
    prompt = canary_prompt(model.config)
    [completion] = engine.generate([prompt], Sampling(max_tokens=CANARY_TOKENS))
    stored = str(model.weights["model.norm.weight"].dtype).removeprefix("torch.")
    return {
        "schema": 1,
        "prompt_token_ids": prompt,
        "forced_token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sliding_window": model.config.sliding_window,
        "source": f"vllm_mistral.reference, torch {torch.__version__} on {model.device.type}, weights stored as {stored}",
    }


def write_canary(folder: Path, canary: dict[str, Any]) -> Path:
    """Write the file as a whole or not at all."""
    path, partial = folder / CANARY_FILE, folder / f".{CANARY_FILE}.{os.getpid()}"
    try:
        partial.write_text(json.dumps(canary) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
    return path


# ---------------------------------------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Tokenizer:
    encode: Callable[[str, bool], list[int]]
    """Text, and whether it is a chat message rather than plain text to go on with."""
    decode: Callable[[list[int]], str]


def load_tokenizer(folder: Path) -> Tokenizer:
    """mistral_common's where its files lie (tekken.json, tokenizer.model.v3, ...), or transformers' for a tokenizer.json."""
    own = [folder / "tekken.json", *sorted(folder.glob("tokenizer.model.v*")), folder / "tokenizer.model"]
    if (folder / "tokenizer.json").exists():
        own.pop()
    path = next((path for path in own if path.exists()), None)
    try:
        if path is not None:
            from mistral_common.protocol.instruct.messages import UserMessage
            from mistral_common.protocol.instruct.request import ChatCompletionRequest
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

            mistral = MistralTokenizer.from_file(str(path))
            plain = mistral.instruct_tokenizer.tokenizer

            def encode_mistral(text: str, chat: bool) -> list[int]:
                if not chat:
                    return list(plain.encode(text, bos=True, eos=False))
                messages = [UserMessage(content=text)]
                return list(mistral.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens)

            return Tokenizer(encode_mistral, plain.decode)
        if (folder / "tokenizer.json").exists():
            from transformers import AutoTokenizer

            auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

            def encode_auto(text: str, chat: bool) -> list[int]:
                if chat:
                    text = auto.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
                return list(auto.encode(text, add_special_tokens=not chat))

            return Tokenizer(encode_auto, lambda tokens: str(auto.decode(tokens, skip_special_tokens=True)))
    except ImportError as error:
        raise BadInput(f"{folder}: its tokenizer needs {error.name}, which is not installed") from error
    except Exception as error:
        raise BadInput(f"{folder}: the tokenizer cannot be used ({str(error).splitlines()[0]})") from error
    raise BadInput(f"{folder}: no tokenizer.json, tekken.json or tokenizer.model")


class ProgressLine:
    """One line on stderr that is written over on a terminal, and otherwise one line every five seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.begun, self.shown = what, time.monotonic(), 0.0

    def __call__(self, computed: int, total: int) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if terminal or now - self.shown >= 5 or computed >= total - 1:
            self.shown = now
            rate = computed / max(now - self.begun, 1e-9)
            line = f"{self.what}: {computed} of {total} tokens, {rate:.1f} tokens/s"
            print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vllm_mistral.reference", description="Mistral 7B in one file.")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="folder with config.json or params.json and *.safetensors")
    parser.add_argument("prompt", nargs="?", help="text to go on with")
    parser.add_argument("--canary", action="store_true", help=f"write {CANARY_FILE} into the folder instead")
    parser.add_argument("--chat", action="store_true", help="the prompt is a chat message")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="arithmetic; float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block of the KV cache")
    parser.add_argument("--max-num-batched-tokens", type=int, default=PREFILL_CHUNK, help="tokens of one step")
    return parser.parse_args(argv)


def command(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (not options.canary):
        raise BadInput("give either a prompt or --canary")
    if options.canary and options.dtype not in (None, "float32"):
        raise BadInput("--canary: its figures are always float32")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device: {options.device} cannot be used ({str(error).splitlines()[0]})") from error
    name = "float32" if options.canary else options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.seed)
    config = read_config(options.weights)
    tokenizer = None if options.canary else load_tokenizer(options.weights)
    print(f"loading {options.weights}", file=sys.stderr, flush=True)
    model = Mistral.load(options.weights, options.device, DTYPES[name], wide=not options.canary)
    progress = ProgressLine("canary" if options.canary else "tokens")
    engine = Engine(model, options.block_size, options.max_num_batched_tokens, progress=progress)
    if tokenizer is None:
        canary = make_canary(engine)
        progress.end()
        path = write_canary(options.weights, canary)
        print(f"{path}: {len(canary['prompt_token_ids'])} tokens, log-probabilities {canary['logprobs']}")
        return
    prompt = tokenizer.encode(options.prompt, options.chat)
    [completion] = engine.generate([prompt], dataclasses.replace(sampling, stop_token_ids=config.eos_token_ids))
    progress.end()
    print(tokenizer.decode([token for token in completion.token_ids if token not in config.eos_token_ids]))


def main(argv: Sequence[str] | None = None) -> int:
    try:
        command(parse_arguments(argv))
    except BadInput as error:
        print(f"reference: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
