"""Mistral 7B in one file: the model, a paged rolling KV cache, chunked prefill, sampling. Only torch.

Read it from top to bottom: weights on disk, the arithmetic of a layer, the blocks of the cache, the model, the engine that
puts many sequences through it, the canary, the command line. It prefers being plainly right to being fast; the fast version
is `vllm_mistral.model`, and this file is the oracle of its tests.

Letters in shapes: T tokens of one step (all sequences laid end to end), Q queries and K keys of one sequence, H query heads,
G key-value heads (H is a multiple of G), D head_dim, V vocabulary, N blocks, B tokens of a block, W tokens of the window.

    python -m vllm_mistral.reference WEIGHTS "The capital of France is"
    python -m vllm_mistral.reference WEIGHTS --canary [--stream]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from mistral_contract import architecture, untrusted
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from vllm_mistral.canary_prompt import CANARY_TOKENS, PREFILL_CHUNK, canary_prompt

CANARY_FILE = "mistralctl-canary.json"
CANARY_SEEDS = 4
CANARY_ROUNDING = 0.15  # a difference by bfloat16 that is small enough
STREAM_CHUNK = 8192  # of one step that reads all weights from the disk: a canary's prompt as a whole
QUERY_TILE = 512  # queries whose scores are in memory at once,
MAX_SCORES = 2**27  # and the most scores, 512 MiB in float32
RECYCLED = -1  # entry of a block table whose block went back to the pool
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = ("F32", "BF16", "F16")  # in the words of safetensors


class BadInput(Exception):
    """What is wrong with weights, prompt or options, in one line."""


# --- weights on disk ---------------------------------------------------------------------------------------------------

CONSOLIDATED_NAMES = {  # of Mistral's own format, in the words of Hugging Face
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
    eos_token_ids: tuple[int, ...]

    @property
    def sliding_window(self) -> int | None:
        return max((w for w in self.windows if w is not None), default=None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight; a linear layer is [out, in]."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, query),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes = {"model.embed_tokens": (self.vocab_size, hidden), "model.norm": (hidden,)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        if not self.tie_word_embeddings:
            shapes["lm_head"] = (self.vocab_size, hidden)
        return {f"{name}.weight": shape for name, shape in shapes.items()}


def parse_config(raw: dict[str, Any], consolidated: bool) -> ModelConfig:
    """config.json, or params.json, where a missing `rope_theta` is 10000 with a window and 1000000 without, as in mistral-src.

    What is read, and what is refused for any engine, `mistral_contract.architecture` decides.
    """
    if consolidated:
        raw = {"rope_theta": 1e4 if raw.get("sliding_window") else 1e6} | raw
    model = architecture.read_params(raw) if consolidated else architecture.read(raw)
    beyond = [key for key in ("quantization_config", "quantization", "rope_scaling") if raw.get(key)]
    if beyond or model.rope_type != "default":
        raise BadInput(f"{(*beyond, 'rope_type')[0]}: the reference has no quantization and no scaled rotary embedding")
    rope = raw.get("rope_parameters") or {}
    eos = raw.get("eos_token_id", 2)
    return ModelConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=raw.get("norm_eps") or raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e4))),
        max_position_embeddings=model.context,
        tie_word_embeddings=model.tied,
        windows=model.windows,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        return untrusted.read_file(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a JSON object ({error})") from error


def weight_files(folder: Path) -> tuple[list[Path], bool]:
    """The safetensors files of a folder, and whether they are Mistral's consolidated ones."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
        ):
            raise BadInput(f"{index}: weight_map should name a file of this folder for each weight")
        return sorted({folder / shard for shard in shards.values()}), False
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"], False
    consolidated = sorted(folder.glob("consolidated*.safetensors"))
    if not consolidated:
        raise BadInput(f"{folder}: no folder with model*.safetensors or consolidated*.safetensors")
    return consolidated, True


def read_config(folder: Path) -> ModelConfig:
    consolidated = weight_files(folder)[1]
    path = folder / ("params.json" if consolidated else "config.json")
    try:
        return parse_config(read_json(path), consolidated)
    except (BadInput, TypeError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from error


def hugging_face_name(name: str) -> str:
    """
    >>> hugging_face_name("layers.3.attention.wq.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem, layer = name.removesuffix(".weight"), ""
    if stem.startswith("layers."):
        _, index, stem = stem.split(".", 2)
        layer = f"model.layers.{index}."
    return f"{layer}{CONSOLIDATED_NAMES.get(stem, stem)}.weight"


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a consolidated wq or wk [heads*D, in], in which the neighbours (0,1), (2,3), ... of a head are rotated
    together, as Hugging Face has them: the i-th of a head's first half together with the i-th of its second half.

    >>> split_halves(torch.arange(8).view(8, 1), head_dim=4).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    out, hidden = weight.shape
    return weight.view(-1, head_dim // 2, 2, hidden).transpose(1, 2).reshape(out, hidden)


class StoredWeights(Mapping[str, Tensor]):
    """All weights of a folder by their Hugging Face names, as stored. Missing, unknown or misshapen ones are refused at once; a weight
    is read when it is asked for and kept by nobody: its file is mapped, so a weight in use is all that is in memory."""

    def __init__(self, folder: Path, config: ModelConfig, device: str) -> None:
        files, self.consolidated = weight_files(folder)
        self.head_dim, self.device = config.head_dim, device
        self.places: dict[str, tuple[Path, str]] = {}
        shapes = config.shapes()
        for path in files:
            with opened(path, "cpu") as shard:
                for stored_name in shard.keys():  # noqa: SIM118
                    name = hugging_face_name(stored_name) if self.consolidated else stored_name
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                        continue
                    stored = shard.get_slice(stored_name)
                    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                    if shape != shapes.get(name) or dtype not in STORED_DTYPES:
                        expected = (
                            f"{list(shapes[name])} of {', '.join(STORED_DTYPES)}" if name in shapes else "no weight of that name"
                        )
                        raise BadInput(f"{path}: {stored_name} is {list(shape)} of {dtype}; expected {expected}")
                    self.places[name] = (path, stored_name)
        if missing := shapes.keys() - self.places.keys():
            raise BadInput(f"{folder}: {len(missing)} weights are missing, the first is {min(missing)}")

    def __getitem__(self, name: str) -> Tensor:
        path, stored_name = self.places[name]
        with opened(path, self.device) as shard:
            return self.read(shard, name, stored_name)

    def read(self, shard: Any, name: str, stored_name: str) -> Tensor:
        tensor: Tensor = shard.get_tensor(stored_name)
        swapped = self.consolidated and name.endswith(("q_proj.weight", "k_proj.weight"))
        return split_halves(tensor, self.head_dim) if swapped else tensor

    def in_memory(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """All of them, in `dtype` or as stored (None)."""
        weights = dict[str, Tensor]()
        for file in sorted({path for path, _ in self.places.values()}):
            with opened(file, self.device) as shard:
                for name, (path, stored_name) in self.places.items():
                    if path == file:
                        tensor = self.read(shard, name, stored_name)
                        weights[name] = tensor.to(dtype) if dtype else tensor
        return weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@contextmanager
def opened(path: Path, device: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from error


# --- the arithmetic of a layer -----------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32. x [T, hidden], weight [hidden].

    mean(3^2, 4^2) = 12.5 and its root is 3.5355, so (3, 4) becomes (0.8485, 1.1314):

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    tensor([[0.8485, 1.1314]])
    """
    wide = x.float()
    return weight.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, 1, D/2]: at position p, pair i of a head is turned by p * theta^(-2i/D) radians.

    With head_dim 4 and theta 10000 the two pairs turn by 1 and by 0.01 radian a token:

    >>> cos, sin = rotary_angles(torch.tensor([0, 3]), head_dim=4, theta=10000.0)
    >>> torch.atan2(sin, cos).squeeze(1)
    tensor([[0.0000, 0.0000],
            [3.0000, 0.0300]])
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = (positions.float()[:, None] * frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's pairs (x[i], x[i + D/2]) by their angle. x [T, heads, D].

    A quarter turn takes (1, 0) to (0, 1). A product of query and key then depends on their distance only: it is the same at
    positions 5 and 3 as at positions 2 and 0.

    >>> rotate(torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).tolist()
    [[[0.0, 1.0]]]
    >>> q, k = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -1.0]]])
    >>> at = lambda x, p: rotate(x, *rotary_angles(torch.tensor([p]), 2, 10000.0))
    >>> [round((at(q, p) * at(k, p - 2)).sum().item(), 4) for p in (5, 2)]
    [-6.7812, -6.7812]
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Causal grouped-query attention of one sequence. query [Q, H, D], key and value [K, G, D]; returns [Q, H, D].

    The queries are those of the last Q of the K tokens. A query at position p sees the keys p - W + 1 .. p: a key at distance >= W
    is masked, so W keys are seen, its own among them. Query head h reads key-value head h // (H / G). Queries go in tiles of at
    most MAX_SCORES scores, and a tile does not even read a key that all its queries mask.

    With equal scores the result is the mean of the values seen. W = 2, values 1, 2, 3, 4:

    >>> values, zeros = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1), torch.zeros(4, 1, 1)
    >>> attention(zeros, zeros, values, window=2).flatten().tolist()
    [1.0, 1.5, 2.5, 3.5]
    >>> attention(zeros, zeros, values, window=None).flatten().tolist()
    [1.0, 1.5, 2.0, 2.5]

    The last query alone, with only the keys at positions 2 and 3 in hand, gets the same:

    >>> attention(zeros[3:], zeros[2:], values[2:], window=2).flatten().tolist()
    [3.5]
    """
    heads, head_dim = query.shape[1:]
    groups = key.shape[1]
    output = torch.empty_like(query)
    size = max(1, min(QUERY_TILE, MAX_SCORES // (heads * len(key))))
    for tile in range(0, len(query), size):
        q = query[tile : tile + size].view(-1, groups, heads // groups, head_dim)
        first = len(key) - len(query) + tile
        oldest, end = 0 if window is None else max(0, first - window + 1), first + len(q)
        seen = slice(oldest, end)
        distance = torch.arange(first, end, device=q.device)[:, None] - torch.arange(oldest, end, device=q.device)
        masked = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = torch.einsum("qghd,kgd->ghqk", q, key[seen]).float() * head_dim**-0.5
        weights = scores.masked_fill_(masked, -math.inf).softmax(dim=-1).to(value.dtype)
        output[tile : tile + size] = torch.einsum("ghqk,kgd->qghd", weights, value[seen]).reshape(-1, heads, head_dim)
    return output


# --- the paged KV cache ------------------------------------------------------------------------------------------------


def blocks_held(window: int | None, chunk: int, block_size: int, length: int) -> int:
    """The most blocks that a sequence of `length` tokens holds when a step computes at most `chunk` tokens of it.

    A step needs the W - 1 tokens before its first one and the chunk itself, and the window may begin inside a block. Mistral
    7B v0.1, blocks of 16, chunks of 2048: (4095 + 2048) / 16 = 384, and one more; without the window 32768 tokens hold 2048.

    >>> blocks_held(4096, 2048, 16, 32768), blocks_held(None, 2048, 16, 32768)
    (385, 2048)
    """
    whole = -(-length // block_size)
    return whole if window is None else min(whole, -(-(window - 1 + chunk) // block_size) + 1)


@dataclass
class KVCache:
    """Keys and values, each [layers, N, B, G, D], of the layers that share one window; `pool` has the free blocks."""

    window: int | None
    block_size: int
    key: Tensor
    value: Tensor
    pool: list[int]


@dataclass
class BlockTable:
    """Where a sequence's tokens lie in a cache: token p in block `blocks[p // B]`, that is in slot `blocks[p // B] * B + p % B`.

    W = 4 and blocks of 2: when token 8 comes, the oldest key it sees is that of token 8 - 4 + 1 = 5. So the first two blocks
    (tokens 0 to 3) go back to the pool, and one of them is lent again for tokens 8 and 9.

    >>> pool = [5, 4, 3, 2, 1, 0]
    >>> table = BlockTable(pool, block_size=2, window=4)
    >>> table.advance(0, 8); table.blocks, pool
    ([0, 1, 2, 3], [5, 4])
    >>> table.advance(8, 10); table.blocks, pool
    ([-1, -1, 2, 3, 1], [5, 4, 0])
    >>> table.slot_mapping(7, 10)
    [7, 2, 3]
    """

    pool: list[int]
    block_size: int
    window: int | None
    blocks: list[int] = field(default_factory=list)

    def first_block(self, position: int) -> int:
        """Index in the table of the oldest block that a query at this position sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.block_size

    def advance(self, start: int, end: int) -> None:
        """Before positions `start` .. `end` - 1 are computed: recycle the blocks behind the window, then take new ones."""
        self.recycle(self.first_block(start))
        while len(self.blocks) * self.block_size < end:
            self.blocks.append(self.pool.pop())

    def recycle(self, end_block: int) -> None:
        for index, block in enumerate(self.blocks[:end_block]):
            if block != RECYCLED:
                self.pool.append(block)
                self.blocks[index] = RECYCLED

    def slot_mapping(self, start: int, end: int) -> list[int]:
        return [self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)]


# --- the model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """One sequence's part of a step: rows `rows` of the batch, which are its positions `start` .. `end` - 1.

    Of each cache: the blocks that this part sees, and the position of the first token in them.
    """

    rows: slice
    start: int
    end: int
    block_tables: list[Tensor]
    key_starts: list[int]


class Mistral:
    """Weights and the forward pass. A weight narrower than `dtype` is widened where it is used, which is exact. A step goes through a
    layer with all its tokens before the next layer's weights are asked for, so they may be `StoredWeights`."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.device = weights["model.norm.weight"].device
        self.cache_windows = list(dict.fromkeys(config.windows))  # one cache for each window that occurs
        self.computed: Callable[[int], None] = lambda layer: None  # called after each layer

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, widen: bool = True, stream: bool = False
    ) -> Mistral:
        """`widen=False` leaves the weights as stored: half the memory for bfloat16 in float32 arithmetic, but slower decoding.
        `stream=True` leaves them on the disk, so that a step reads each of them once and one is in memory at a time."""
        config = read_config(Path(folder))
        stored = StoredWeights(Path(folder), config, device)
        return cls(config, stored if stream else stored.in_memory(dtype if widen else None), dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[name + ".weight"].to(x.dtype))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name + ".weight"], self.config.rms_norm_eps)

    def new_cache(self, window: int | None, num_blocks: int, block_size: int) -> KVCache:
        layers = self.config.windows.count(window)
        shape = (layers, num_blocks, block_size, self.config.num_key_value_heads, self.config.head_dim)
        key, value = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return KVCache(window, block_size, key, value, list(range(num_blocks))[::-1])

    def forward(
        self, token_ids: Tensor, positions: Tensor, slot_mappings: list[Tensor], chunks: list[Chunk], caches: list[KVCache]
    ) -> Tensor:
        """One step. token_ids, positions and each cache's slot mapping are [T]; returns the last hidden states [T, hidden]."""
        config = self.config
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta)
        x = embedding(token_ids, self.weights["model.embed_tokens.weight"]).to(self.dtype)
        for i, window in enumerate(config.windows):
            layer = f"model.layers.{i}."
            h = self.norm(x, layer + "input_layernorm")
            query = self.linear(h, layer + "self_attn.q_proj").view(-1, config.num_attention_heads, config.head_dim)
            key = self.linear(h, layer + "self_attn.k_proj").view(-1, config.num_key_value_heads, config.head_dim)
            value = self.linear(h, layer + "self_attn.v_proj").view(-1, config.num_key_value_heads, config.head_dim)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)

            c = self.cache_windows.index(window)
            layer_of_cache = config.windows[:i].count(window)
            key_cache, value_cache = caches[c].key[layer_of_cache], caches[c].value[layer_of_cache]
            key_cache.flatten(0, 1)[slot_mappings[c]] = key
            value_cache.flatten(0, 1)[slot_mappings[c]] = value
            attended = torch.empty_like(query)
            for chunk in chunks:
                block_table, key_start = chunk.block_tables[c], chunk.key_starts[c]
                keys = key_cache[block_table].flatten(0, 1)[: chunk.end - key_start]
                values = value_cache[block_table].flatten(0, 1)[: chunk.end - key_start]
                attended[chunk.rows] = attention(query[chunk.rows], keys, values, window)
            x = x + self.linear(attended.flatten(1), layer + "self_attn.o_proj")

            h = self.norm(x, layer + "post_attention_layernorm")
            gate, up = self.linear(h, layer + "mlp.gate_proj"), self.linear(h, layer + "mlp.up_proj")
            x = x + self.linear(silu(gate) * up, layer + "mlp.down_proj")
            self.computed(i)
        return self.norm(x, "model.norm")

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Natural logarithms [T, V], in float32, of the probabilities of the next token."""
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.linear(hidden, head).float().log_softmax(dim=-1)


# --- sampling and the engine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. The i-th prompt draws from a generator of its own with seed `seed + i`."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise BadInput("max_tokens and temperature must not be negative, and top_p must be above 0 and at most 1")


def sample(logprobs: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token, from log-probabilities [V]. top_p keeps the fewest most likely tokens whose probabilities reach it together.

    Of 0.5, 0.3, 0.2 and top_p 0.7 two are left, and they are drawn as 5 : 3, so 625 of 1000 times the first:

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
    more_likely = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(more_likely >= sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


@dataclass
class Request:
    """A sequence on its way. The first `num_computed` of `token_ids` are in the caches; rows of log-probabilities before position
    `first_row` are not computed, and all others are kept if `keep_rows`."""

    token_ids: list[int]
    sampling: Sampling
    first_row: int
    keep_rows: bool
    generator: torch.Generator
    max_length: int
    tables: list[BlockTable] = field(default_factory=list)
    num_computed: int = 0
    rows: list[Tensor] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]


class Engine:
    """Runs a batch of sequences. Each step computes at most `max_num_batched_tokens` tokens: one of every sequence that
    generates, and for the rest prompts in chunks. With a window a sequence needs the same few blocks, however long it is."""

    def __init__(
        self,
        model: Mistral,
        block_size: int = 16,
        max_num_batched_tokens: int = PREFILL_CHUNK,
        progress: Callable[[int, int], None] = lambda computed, total: None,
    ) -> None:
        if min(block_size, max_num_batched_tokens) < 1:
            raise BadInput("block_size and max_num_batched_tokens must be at least 1")
        self.model, self.block_size, self.max_num_batched_tokens = model, block_size, max_num_batched_tokens
        self.progress, self.caches = progress, list[KVCache]()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        requests = self.run(prompts, sampling, last=1, keep_rows=False)
        return [Completion(request.generated, request.logprobs) for request in requests]

    def score(self, prompts: Sequence[Sequence[int]], last: int | None = None) -> list[Tensor]:
        """For each prompt of n tokens [n, V], or only the `last` rows: row p has the log-probabilities after position p."""
        requests = self.run(prompts, Sampling(max_tokens=0), last, keep_rows=True)
        return [torch.cat(request.rows) for request in requests]

    def run(self, prompts: Sequence[Sequence[int]], sampling: Sampling, last: int | None, keep_rows: bool) -> list[Request]:
        requests = []
        for i, prompt in enumerate(prompts):
            first_row = 0 if last is None else max(0, len(prompt) - last)
            try:
                requests.append(self.request(prompt, replace(sampling, seed=sampling.seed + i), first_row, keep_rows))
            except BadInput as error:
                raise BadInput(f"prompt {i}: {error}") from error
        self.make_caches([sum(blocks) for blocks in zip(*(self.blocks_held(r.max_length) for r in requests), strict=True)])
        for request in requests:
            self.admit(request)
        total = sum(request.max_length for request in requests)
        while running := [request for request in requests if not request.finished]:
            self.step(running)
            self.progress(sum(request.num_computed for request in requests), total)
        return requests

    def request(self, prompt: Sequence[int], sampling: Sampling, first_row: int, keep_rows: bool) -> Request:
        config, length = self.model.config, len(prompt) + sampling.max_tokens
        if not prompt or not all(0 <= token < config.vocab_size for token in prompt):
            raise BadInput(f"must be one or more token ids below {config.vocab_size}")
        if length > config.max_position_embeddings:
            raise BadInput(f"{length} tokens with its answer, the context is {config.max_position_embeddings}")
        generator = torch.Generator().manual_seed(sampling.seed)
        return Request(list(prompt), sampling, first_row, keep_rows, generator, length)

    def blocks_held(self, length: int) -> list[int]:
        """The most blocks of each cache that a sequence of so many tokens holds."""
        windows = self.model.cache_windows
        return [blocks_held(window, self.max_num_batched_tokens, self.block_size, length) for window in windows]

    def make_caches(self, num_blocks: Sequence[int]) -> None:
        windows = self.model.cache_windows
        self.caches = [self.model.new_cache(w, blocks, self.block_size) for w, blocks in zip(windows, num_blocks, strict=True)]

    def admit(self, request: Request) -> None:
        """From now on `step` may compute it: with the others that run, it never holds more blocks than there are."""
        request.tables = [BlockTable(cache.pool, self.block_size, cache.window) for cache in self.caches]

    def release(self, request: Request) -> None:
        """Give its blocks back."""
        for table in request.tables:
            table.recycle(len(table.blocks))

    @torch.inference_mode()
    def step(self, running: Sequence[Request]) -> None:
        """Compute the next tokens of some sequences. Which they are may change from step to step."""
        budget, device = self.max_num_batched_tokens, self.model.device
        token_ids, positions = list[int](), list[int]()
        slot_mappings: list[list[int]] = [[] for _ in self.caches]
        scheduled, chunks = list[Request](), list[Chunk]()
        for request in sorted(running, key=lambda request: not request.generated):
            start = request.num_computed
            end = min(len(request.token_ids), start + budget - len(token_ids))
            if start == end:
                continue
            for table, slot_mapping in zip(request.tables, slot_mappings, strict=True):
                table.advance(start, end)
                slot_mapping += table.slot_mapping(start, end)
            seen = [table.first_block(start) for table in request.tables]
            block_tables = [torch.tensor(t.blocks[first:], device=device) for t, first in zip(request.tables, seen, strict=True)]
            rows = slice(len(token_ids), len(token_ids) + end - start)
            chunks.append(Chunk(rows, start, end, block_tables, [first * self.block_size for first in seen]))
            scheduled.append(request)
            token_ids += request.token_ids[start:end]
            positions += range(start, end)

        as_tensor = [torch.tensor(numbers, device=device) for numbers in (token_ids, positions, *slot_mappings)]
        hidden = self.model.forward(as_tensor[0], as_tensor[1], as_tensor[2:], chunks, self.caches)
        for request, chunk in zip(scheduled, chunks, strict=True):
            self.receive(request, chunk.end, hidden[chunk.rows][max(0, request.first_row - chunk.start) :])

    def receive(self, request: Request, num_computed: int, hidden: Tensor) -> None:
        """Take the rows that a request wants of a step; when its prompt is computed, give it its next token or let it finish."""
        request.num_computed, sampling = num_computed, request.sampling
        logprobs = self.model.logprobs(hidden)
        if request.keep_rows:
            request.rows.append(logprobs)
        if num_computed < len(request.token_ids):
            return
        if sampling.max_tokens:
            token = sample(logprobs[-1], sampling, request.generator)
            request.generated.append(token)
            request.token_ids.append(token)
            request.logprobs.append(float(logprobs[-1, token]))
        stopped = bool(request.generated) and request.generated[-1] in sampling.stop_token_ids
        if stopped or len(request.generated) == sampling.max_tokens:
            request.finished = True
            self.release(request)


# --- the canary --------------------------------------------------------------------------------------------------------


def make_canary(engine: Engine, length: int | None = None) -> dict[str, Any]:
    """What a right engine answers to `canary_prompt`: the eight greedy tokens, to be forced, and their log-probabilities.

    Rounding sways some prompts five times as much as others, and a check in bfloat16 has to tell it from faults. So each prompt is
    also computed in bfloat16, and the first one that this moves by little, or else the one that it moves least, is taken.
    """
    model, candidates = engine.model, list[dict[str, Any]]()
    config = model.config
    rounded = Mistral(config, model.weights, torch.bfloat16)
    rounded.computed = model.computed
    for seed in range(CANARY_SEEDS):
        try:
            prompt = canary_prompt(config.sliding_window, config.max_position_embeddings, config.vocab_size, seed, length)
        except ValueError as error:
            raise BadInput(str(error)) from error
        [completion] = engine.generate([prompt], Sampling(max_tokens=CANARY_TOKENS))
        narrow = Engine(rounded, engine.block_size, engine.max_num_batched_tokens, engine.progress)
        [rows] = narrow.score([prompt + completion.token_ids], last=CANARY_TOKENS + 1)
        moved = rows[:-1].gather(1, torch.tensor(completion.token_ids, device=rows.device)[:, None])[:, 0].tolist()
        if not all(math.isfinite(value) for value in (*completion.logprobs, *moved)):
            raise BadInput("the log-probabilities are not finite; the weights are damaged")
        candidate = {
            "schema": 1,
            "prompt_token_ids": prompt,
            "forced_token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "dtype": str(model.dtype).removeprefix("torch."),
            "sliding_window": config.sliding_window,
            "source": f"vllm_mistral.reference, torch {torch.__version__} on {model.device.type}, seed {seed}",
            "bfloat16_difference": max(abs(a - b) for a, b in zip(moved, completion.logprobs, strict=True)),
        }
        candidates.append(candidate)
        if candidate["bfloat16_difference"] <= CANARY_ROUNDING:
            break
    return min(candidates, key=lambda candidate: float(candidate["bfloat16_difference"]))


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


# --- the command line --------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> tuple[Callable[[str, bool], list[int]], Callable[[list[int]], str]]:
    """encode(text, chat) and decode(token_ids): mistral_common's if a file of its own lies there, else by tokenizer.json."""
    own = [folder / "tekken.json", *sorted(folder.glob("tokenizer.model.v*"))]
    own += [] if (folder / "tokenizer.json").exists() else [folder / "tokenizer.model"]
    path = next((path for path in own if path.exists()), None)
    if path is None:
        from transformers import AutoTokenizer

        auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

        def encode_auto(text: str, chat: bool) -> list[int]:
            if chat:
                message = [{"role": "user", "content": text}]
                text = str(auto.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            return list(auto.encode(text, add_special_tokens=not chat))

        return encode_auto, lambda token_ids: str(auto.decode(token_ids))
    from mistral_common.protocol.instruct.messages import UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    mistral = MistralTokenizer.from_file(str(path))
    plain = mistral.instruct_tokenizer.tokenizer

    def encode_mistral(text: str, chat: bool) -> list[int]:
        request = ChatCompletionRequest(messages=[UserMessage(content=text)])
        return list(mistral.encode_chat_completion(request).tokens if chat else plain.encode(text, bos=True, eos=False))

    return encode_mistral, plain.decode


class ProgressLine:
    """On a terminal one line that is written over; elsewhere a line every five seconds."""

    def __init__(self) -> None:
        self.begun = self.shown = time.monotonic()

    def __call__(self, computed: int, total: int) -> None:
        self.show(f"{computed} of at most {total} tokens, {computed / (time.monotonic() - self.begun):.1f} tokens/s")

    def show(self, line: str) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if terminal or now - self.shown >= 5:
            self.shown = now
            sys.stderr.write(f"\r{line}\x1b[K" if terminal else f"{line}\n")
            sys.stderr.flush()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vllm_mistral.reference", description="Mistral 7B in one file.")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="folder with config.json or params.json and *.safetensors")
    parser.add_argument("prompt", nargs="?", help="text to go on with")
    parser.add_argument("--canary", action="store_true", help=f"write {CANARY_FILE} into the folder instead")
    parser.add_argument("--canary-tokens", type=int, help="length of its prompt; default: a quarter more than the window")
    parser.add_argument(
        "--stream", action="store_true", help="read the weights layer by layer: for a model larger than the memory"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a chat message")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the arithmetic; default: float32 on a CPU, else bfloat16")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block of the KV cache")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, help=f"tokens of one step; default: {PREFILL_CHUNK}, streamed {STREAM_CHUNK}"
    )
    return parser.parse_args(argv)


def command(options: argparse.Namespace) -> str:
    if (options.prompt is None) != options.canary or (options.canary and options.dtype not in (None, "float32")):
        raise BadInput("give either a prompt or --canary, whose arithmetic is always float32")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    dtype = "float32" if options.canary else options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    config = read_config(options.weights)
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.seed, config.eos_token_ids)
    if not options.canary:
        try:
            encode, decode = load_tokenizer(options.weights)
            prompt = encode(options.prompt, options.chat)
        except Exception as error:
            raise BadInput(f"{options.weights}: no usable tokenizer ({str(error).strip().splitlines()[0]})") from error
    sys.stderr.write(f"loading {options.weights}\n")
    model = Mistral.load(options.weights, options.device, DTYPES[dtype], not options.canary, options.stream)
    chunk, line = options.max_num_batched_tokens, ProgressLine()
    if options.stream:
        model.computed = lambda layer: line.show(f"layer {layer + 1} of {config.num_hidden_layers}")
    engine = Engine(
        model, options.block_size, (STREAM_CHUNK if options.stream else PREFILL_CHUNK) if chunk is None else chunk, line
    )
    if options.canary:
        return str(write_canary(options.weights, make_canary(engine, options.canary_tokens)))
    [completion] = engine.generate([prompt], sampling)
    return decode([token for token in completion.token_ids if token not in config.eos_token_ids])


def main(argv: Sequence[str] | None = None) -> int:
    try:
        text = command(parse_arguments(argv))
    except BadInput as error:
        sys.stderr.write(f"reference: {error}\n")
        return 2
    sys.stderr.write("\n" if sys.stderr.isatty() else "")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
