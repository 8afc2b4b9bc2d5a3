"""The arithmetic of memory: what a model takes, what is left for the cache, and how many requests that holds.

The formulas are those of vLLM 0.32: a request holds whole blocks of the KV cache; with a sliding window W it holds at
most `cdiv(min(W - 1 + in_flight, max_model_len), block_size) + 1` of them, because blocks behind the window go back to the
pool while it runs. `in_flight` is one prefill chunk for each step that is scheduled and not yet settled. Layers that attend alike
share their blocks; a model with both kinds of layers has several such groups, which take blocks of one size from one pool.
tests/plugin/test_fit.py holds these formulas against vLLM's own code, tests/e2e against the numbers that a running vLLM reports. Those of the
engine `reference` are its own (`_of_the_reference`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mistral_contract import tensors
from mistral_contract.engines import REFERENCE, VLLM
from mistral_contract.quantization import METHODS, Scheme

from mistralctl.gpus import GIB, Gpu
from mistralctl.models import Shape, Stored

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Bytes that a weight of a linear layer takes where a method was named and nobody could read the weights: 4 bits with a scale and a
# zero point for 128 weights; compressed-tensors may be 8 bits. Embedding and head keep 16 bits.
QUANTIZED_BYTES = {"fp8": 1.0, "awq": 4.16 / 8, "gptq": 4.16 / 8, "compressed-tensors": 1.0}

MEMORY_UTILIZATION = 0.92
# Activations of one step, CUDA context and graphs; of the reference its scores and log-probabilities, as its server takes them off, too.
OVERHEAD_BYTES = {VLLM: GIB, REFERENCE: 3 * GIB}
# Tokens of one scheduler step, the prefill chunk. With a window a request holds a chunk or two beside its window, and 1024 admit
# a third more long requests than 2048; benchmarks/kv_blocks.py found them not slower (1.01 of it), 512 a little (0.98).
CHUNK, WINDOWED_CHUNK = 2048, 1024
STEPS_IN_FLIGHT = {"cuda": 2, "cpu": 1}  # on a GPU vLLM schedules a step while it still computes the one before
BLOCK_SIZE = {"cuda": 16, "cpu": 128}
REFERENCE_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Serving:
    """How a model is served, as far as memory is concerned. `requests` of `max_model_len` tokens run at a time on `gpus` GPUs.

    `adapters` LoRA adapters have a slot each, of `rank`.
    """

    dtype: str
    max_model_len: int
    device: str
    gpus: int = 1
    requests: int = 1
    adapters: int = 0
    rank: int = 0
    engine: str = VLLM


@dataclass(frozen=True)
class Fit:
    """What fits on one machine. Bytes are per GPU (tensor parallel divides weights and heads), requests are of full length.

    Tokens of the cache are of all layers: where only some layers have a window, a request holds part of that for each of its tokens.
    `reason` is None when it fits, otherwise what is missing in the user's words.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    cache_bytes: int
    cache_tokens: int
    request_tokens: int
    request_tokens_without_window: int
    concurrency: float
    concurrency_without_window: float
    reason: str | None = None
    adapter_bytes: int = 0


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def weight_bytes(shape: Shape, dtype: str, quantization: str | None, stored: Stored | None = None) -> int:
    """Bytes of the weights in memory. Mistral 7B in bfloat16: 14.48 GB; with --quantization fp8: 7.50 GB.

    By config.json or by the tensors of the files, whichever is more: files may hold what config.json does not say.
    """
    stored, plain = stored or Stored(), shape.parameters * DTYPE_BYTES[dtype]
    in_files = stored.floats * DTYPE_BYTES[dtype] + stored.fixed
    if stored.scheme is not None:
        return max(stored.bytes, in_files)
    if quantization:
        return round((shape.parameters - shape.tables) * QUANTIZED_BYTES[quantization]) + shape.tables * DTYPE_BYTES[dtype]
    return max(plain, in_files)


def origin(shape: Shape, dtype: str, stored: Stored) -> str:
    """Where the size of weights comes from: their files, their configuration, or nothing but the row of the table; empty for a row's own."""
    if not stored.known:
        return "nobody has read them"
    in_files = stored.floats * DTYPE_BYTES[dtype] + stored.fixed
    if in_files and in_files >= (stored.bytes or shape.parameters * DTYPE_BYTES[dtype]):
        return "by their files"
    return "by their configuration" if stored.size else ""


def disk_bytes(shape: Shape, stored: Stored) -> int:
    """Bytes of the weights on a disk: of their files, and no fewer than in 16 bits, so that a look at them changes no machine."""
    return max(stored.size, 2 * shape.parameters)


def kv_bytes_per_token(shape: Shape, dtype: str) -> int:
    """Bytes of keys and values that one token leaves in the cache, all layers: 131,072 for Mistral 7B in 16 bits."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * DTYPE_BYTES[dtype]


ROWS = ("o_proj", "down_proj")  # tensor parallel divides the inputs of these layers, and the outputs of the others


def adapter_bytes(shape: Shape, serving: Serving) -> int:
    """Bytes of the slots of LoRA adapters on each GPU: for every linear layer an A of [rank, inputs] and a B of [outputs, rank].

    As vLLM's `create_lora_weights`: slots have the largest rank whatever an adapter's is, and tensor parallel divides one of the two. On a
    CPU the adapters are in the same memory once more.
    """
    numbers = 0
    for name, (outputs, inputs) in tensors.linear(shape).items():
        split = name.endswith(ROWS)
        numbers += cdiv(inputs, serving.gpus if split else 1) + cdiv(outputs, 1 if split else serving.gpus)
    copies = 2 if serving.device == "cpu" else 1
    return copies * serving.adapters * serving.rank * shape.layers * numbers * DTYPE_BYTES[serving.dtype]


def max_batched_tokens(window: int | None) -> int:
    """Tokens of one scheduler step for a model with this window (tokens; None: without one)."""
    return WINDOWED_CHUNK if window else CHUNK


def blocks_per_request(max_model_len: int, window: int | None, device: str, chunk: int | None = None) -> int:
    """Most blocks that one request of `max_model_len` tokens holds at any time.

    >>> blocks_per_request(32768, None, "cuda"), blocks_per_request(32768, 4096, "cuda")
    (2048, 385)
    """
    block_size = BLOCK_SIZE[device]
    if window is None:
        return cdiv(max_model_len, block_size)
    # The 1 is the block that the window's edge cuts; vLLM counts it also where the whole request is shorter.
    in_flight = STEPS_IN_FLIGHT[device] * (chunk or max_batched_tokens(window))
    return cdiv(min(window - 1 + in_flight, max_model_len), block_size) + 1


def groups(windows: Iterable[int | None]) -> tuple[int, tuple[int | None, ...]]:
    """Return how many layers share a block, and the window of each group of so many layers.

    As vLLM's `_get_kv_cache_groups_uniform_page_size`: groups are of one size, so the last of a kind may have layers of padding.

    >>> groups([4096] * 32), groups([None, 64, 64, 64] * 9)
    ((32, (4096,)), (9, (None, 64, 64, 64)))
    """
    kinds = Counter(windows)
    least, most = min(kinds.values()), max(kinds.values())
    layers = most if most < 1.5 * least else least
    return layers, tuple(window for window, count in kinds.items() for _ in range(cdiv(count, layers)))


@dataclass(frozen=True)
class _Pool:
    """The blocks of a model's cache on one GPU: bytes and tokens of a block, groups of layers, and blocks that a request holds at most."""

    block_bytes: int
    block_size: int
    groups: int
    held: int
    held_without_window: int

    @classmethod
    def of(cls, shape: Shape, serving: Serving) -> _Pool:
        if serving.engine == REFERENCE:
            return cls._of_the_reference(shape, serving)
        layers, windows = groups(shape.windows)
        token = cdiv(2 * shape.kv_heads * shape.head_dim * DTYPE_BYTES[serving.dtype], serving.gpus)
        chunk = max_batched_tokens(shape.sliding_window)
        held, full = (
            sum(blocks_per_request(serving.max_model_len, window, serving.device, chunk) for window in each)
            for each in (windows, (None,) * len(windows))
        )
        size = BLOCK_SIZE[serving.device]
        return cls(size * layers * token, size, len(windows), held, full)

    @classmethod
    def _of_the_reference(cls, shape: Shape, serving: Serving) -> _Pool:
        """Every layer has blocks of its own; a step is settled before the next, as the `blocks_held` of its own code counts."""
        size, chunk, length = REFERENCE_BLOCK_SIZE, max_batched_tokens(shape.sliding_window), serving.max_model_len
        whole = cdiv(length, size)
        held = sum(min(whole, cdiv(window - 1 + chunk, size) + 1) if window else whole for window in shape.windows)
        token = 2 * shape.kv_heads * shape.head_dim * DTYPE_BYTES[serving.dtype]
        return cls(size * token, size, len(shape.windows), held, whole * len(shape.windows))


def cache_bytes(shape: Shape, serving: Serving) -> int:
    """Bytes of cache that the requests fill, with the one block that vLLM keeps for itself."""
    pool = _Pool.of(shape, serving)
    return (serving.requests * pool.held + 1) * pool.block_bytes


def fit(shape: Shape, serving: Serving, *, memory_bytes: float, weights: int) -> Fit:
    """What fits into `memory_bytes` (for each GPU, already reduced to what vLLM may take) beside so many bytes of weights."""
    pool = _Pool.of(shape, serving)
    weights = cdiv(weights, serving.gpus)
    adapters = adapter_bytes(shape, serving)
    cache = int(memory_bytes) - weights - OVERHEAD_BYTES[serving.engine] - adapters
    blocks = max(0, cache // pool.block_bytes)

    def tokens(blocks: int) -> int:
        return cdiv(blocks * pool.block_size, pool.groups)

    length, requests, reason = serving.max_model_len, serving.requests, None
    if blocks < pool.held * requests:
        if not blocks:
            more = f" and {adapters / GIB:.1f} GiB of adapters" if adapters else ""
            reason = f"{weights / GIB:.1f} GiB of weights{more} leave no room for the cache"
        else:
            many = f"{requests} requests" if requests > 1 else "one request"
            reason = (
                f"{cache / GIB:.1f} GiB of cache hold {tokens(blocks)} tokens, "
                f"{many} of {length} tokens need{'s' if requests == 1 else ''} {tokens(pool.held * requests)}"
            )
    per_token = cdiv(kv_bytes_per_token(shape, serving.dtype), serving.gpus)
    return Fit(
        weights, per_token, max(0, cache), tokens(blocks), tokens(pool.held), tokens(pool.held_without_window),
        round(blocks / pool.held, 2), round(blocks / pool.held_without_window, 2), reason,
        adapters,
    )  # fmt: skip


def refused(gpu: Gpu, dtype: str, quantization: str | None, scheme: Scheme | None = None) -> list[str]:
    """Why this GPU cannot do the arithmetic, whatever its memory."""
    if not gpu.supported:
        return [f"compute capability {gpu.capability[0]}.{gpu.capability[1]}, vLLM needs 7.5"]
    reasons = []
    if dtype == "bfloat16" and not gpu.bfloat16:
        reasons.append("no bf16")
    method = scheme.method if scheme else quantization
    if method and gpu.capability < (least := max(METHODS[method].capability, scheme.capability if scheme else (0, 0))):
        reasons.append(f"{method} needs compute capability {least[0]}.{least[1]}")
    return reasons
