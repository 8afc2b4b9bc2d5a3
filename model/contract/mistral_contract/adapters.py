"""Which LoRA adapters are served: judged by adapter_config.json and the tensors' names and shapes, before vLLM starts.

vLLM 0.32 says less and later: some adapters it refuses when it starts (`lora/peft_helper.py`, `lora/lora_model.py`), some it loads
and then ignores (tensors of no module, `lora/model_manager.py`) or copies in part (shapes smaller than the model's,
`lora/layers/base_linear.py`). `tests/plugin/test_adapters.py` holds this judgement to vLLM's.
"""

from __future__ import annotations

import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mistral_contract import architecture

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG, LARGEST_HEADER = 1 << 20, 100_000_000  # the latter is the safetensors format's own limit
LFS_POINTER = b"version https://git-lfs"
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Initialisations of PEFT that leave the base model as it is (vllm/lora/peft_helper.py, _init_is_supported).
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Features of PEFT that vLLM does not compute, by their fields of adapter_config.json.
FEATURES = {
    "use_dora": "DoRA", "lora_bias": "a LoRA bias", "alora_invocation_tokens": "activated LoRA", "use_qalora": "QALoRA",
    "layer_replication": "replicated layers", "use_bdlora": "block-diagonal LoRA",
}  # fmt: skip
MERGE = "merge it into the weights (PEFT: merge_and_unload) and serve those"

Read = Callable[[str, int, int], bytes]


class AdapterError(ValueError):
    """What is wrong with an adapter, and what to do, in one printable line: names in it are the adapter's."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(character if character.isprintable() else " " for character in message)[:600])


class Sizes(Protocol):
    """The sizes of the model that an adapter has to fit: `architecture.Architecture`, for example."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def matrix(base: Sizes, module: str) -> tuple[int, int]:
    """Input and output size of a linear layer."""
    queries, keys = base.heads * base.head_dim, base.kv_heads * base.head_dim
    return {
        "q_proj": (base.hidden, queries), "k_proj": (base.hidden, keys), "v_proj": (base.hidden, keys), "o_proj": (queries, base.hidden),
        "gate_proj": (base.hidden, base.intermediate), "up_proj": (base.hidden, base.intermediate),
        "down_proj": (base.intermediate, base.hidden),
    }[module]  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file; `start` and `stop` are where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Adapter:
    """An adapter that can be served. `rank` is the largest of all that its configuration names; `pairs` are A and B of each module."""

    rank: int
    pairs: tuple[tuple[Tensor, Tensor], ...]


def served_rank(adapters: Iterable[Adapter]) -> int:
    """The smallest --max-lora-rank of vLLM that takes all of them."""
    largest = max((adapter.rank for adapter in adapters), default=1)
    return next(rank for rank in RANKS if rank >= largest)


def read(folder: Path, base: Sizes | None) -> Adapter:
    """The adapter in a folder; AdapterError if it cannot be served with this base model (None: its sizes are not judged)."""
    try:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        return judge(sizes, lambda name, start, stop: _part(folder / name, start, stop), base)
    except OSError as error:
        raise AdapterError(f"{error.filename} cannot be read ({error.strerror}); check the folder") from None


def _part(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def judge(sizes: Mapping[str, int], read: Read, base: Sizes | None) -> Adapter:
    """The adapter whose files have these names and sizes; `read` gives the bytes of a file from a start to a stop."""
    if CONFIG not in sizes:
        hint = "this is an MLX adapter: convert it to PEFT's format" if "adapters.safetensors" in sizes else "name PEFT's folder"
        raise AdapterError(f"it has no {CONFIG}; {hint}")
    if sizes[CONFIG] > LARGEST_CONFIG:
        raise AdapterError(f"its {CONFIG} has {sizes[CONFIG]} bytes; this is not one of PEFT's")
    text = read(CONFIG, 0, sizes[CONFIG])
    _no_pointer(CONFIG, text)
    try:
        config = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"its {CONFIG} is not JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"its {CONFIG} is not a JSON object; save the adapter again")
    rank = _features(config)
    if TENSORS not in sizes:
        if any(name.startswith("adapter_model") and name.endswith((".bin", ".pt")) for name in sizes):
            raise AdapterError(f"its tensors are pickled, which can run code; save it as {TENSORS} (PEFT: save_pretrained)")
        raise AdapterError(f"it has no {TENSORS}; save it with PEFT's save_pretrained, in one file")
    tensors = header(TENSORS, sizes[TENSORS], read)
    return Adapter(rank, _pairs(config, tensors, base))


def _no_pointer(name: str, beginning: bytes) -> None:
    if beginning.startswith(LFS_POINTER):
        raise AdapterError(f"its {name} is a git-lfs pointer, not the file; run git lfs pull in its repository")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _features(config: Mapping[str, Any]) -> int:
    """The largest rank that a configuration names; AdapterError for what vLLM does not compute."""
    kind = config.get("peft_type")
    if kind is not None and kind != "LORA":
        raise AdapterError(f"its peft_type is {kind} and vLLM serves LORA only; {MERGE}, or train it as LoRA")
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in config:
            raise AdapterError(f"its {CONFIG} has no {name}; save it with PEFT's save_pretrained")
    rank, alpha = config["r"], config["lora_alpha"]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if isinstance(rank, float) and rank.is_integer():
        rank = int(rank)
    if not _positive(rank) or not isinstance(ranks, dict) or not all(_positive(value) for value in ranks.values()):
        raise AdapterError(f"r and rank_pattern in its {CONFIG} should be whole numbers above 0; save the adapter again")
    if not _number(alpha) or not isinstance(alphas, dict) or not all(_number(value) for value in alphas.values()):
        raise AdapterError(f"lora_alpha and alpha_pattern in its {CONFIG} should be numbers; save the adapter again")
    if not alpha and not alphas:
        raise AdapterError("its lora_alpha is 0, so it changes nothing; train it with another, or leave it out")
    if modules := config.get("modules_to_save"):
        names = modules if isinstance(modules, str) else ", ".join(map(str, modules)) if isinstance(modules, list) else modules
        raise AdapterError(f"it has whole modules beside LoRA (modules_to_save: {names}), which vLLM does not serve; {MERGE}")
    for field, name in FEATURES.items():
        if config.get(field):
            raise AdapterError(f"it uses {name} ({field}), which vLLM does not compute; {MERGE}")
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterError(f"it has biases (bias: {bias}), which vLLM does not compute; {MERGE}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise AdapterError(
            f"its initialisation ({init}) changed the base model's weights; convert it to plain LoRA (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    largest: int = max(rank, *ranks.values()) if ranks else rank
    if largest > RANKS[-1]:
        raise AdapterError(f"its rank is {largest} and vLLM takes at most {RANKS[-1]}; {MERGE}")
    return largest


def header(name: str, size: int, read: Read) -> dict[str, Tensor]:
    """The tensors of a safetensors file of `size` bytes, by its header; AdapterError where the file is not whole."""
    start = read(name, 0, min(size, 64))
    _no_pointer(name, start)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 0 < length <= min(LARGEST_HEADER, size - 8):
        raise AdapterError(f"its {name} is not a safetensors file, or is cut off ({size} bytes); copy it again")
    try:
        data = json.loads(read(name, 8, 8 + length).decode("utf-8"))
        data.pop("__metadata__", None)
        found = {}
        for key, facts in data.items():
            first, last = map(operator.index, facts["data_offsets"])
            found[key] = Tensor(str(facts["dtype"]), tuple(facts["shape"]), 8 + length + first, 8 + length + last)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"the header of its {name} cannot be read ({error!r}); copy it again") from None
    end = 8 + length
    for key, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"its tensor {key} is of type {tensor.dtype}; save it as bfloat16, float16 or float32")
        if not all(_positive(count) for count in tensor.shape):
            raise AdapterError(f"its tensor {key} has the shape {list(tensor.shape)}; save the adapter again")
        if tensor.start != end or tensor.stop - tensor.start != DTYPES[tensor.dtype] * math.prod(tensor.shape):
            raise AdapterError(f"the header of its {name} does not fit the tensor {key}; copy it again")
        end = tensor.stop
    if end != size:
        raise AdapterError(f"its {name} should have {end} bytes and has {size}; copy it again")
    return found


PREFIX = "base_model.model."
MODULE = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)")


def _pairs(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Sizes | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """A and B of each module, each of which the model has, with its shapes."""
    halves: dict[str, dict[str, Tensor]] = {}
    lost: list[str] = []
    for name, tensor in tensors.items():
        plain = name.replace(PREFIX, "") if name.startswith(PREFIX) else name
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", plain)
        if match is None or not MODULE.fullmatch(match[1]):
            lost.append(name)
            continue
        sides = halves.setdefault(match[1], {})
        if match[2] in sides:
            raise AdapterError(f"it has {plain} twice; save it with PEFT's save_pretrained")
        sides[match[2]] = tensor
    if lost:
        raise AdapterError(_lost(lost, len(tensors)))
    if not halves:
        raise AdapterError(f"its {TENSORS} has no tensor; save the adapter again")
    pairs = []
    for module, sides in halves.items():
        if len(sides) < 2:
            raise AdapterError(f"it has only lora_{next(iter(sides))} of {module}; save the adapter again")
        _fits(module, sides["A"], sides["B"], rank_of(config, module), base)
        pairs.append((sides["A"], sides["B"]))
    return tuple(pairs)


def _lost(names: list[str], count: int) -> str:
    """What to say of tensors that no module of the model takes."""
    first = names[0]
    if re.search(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$", first):
        return (
            f"it brings embeddings of its own ({first}), which vLLM does not serve; save it with save_embedding_layers=False if they are "
            f"the base model's, else {MERGE}"
        )
    if "embed_tokens" in first or "lm_head" in first:
        return f"it adapts embeddings or head ({first}), which is not served; train it on the linear layers, or {MERGE}"
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", first):
        return f"its names carry an adapter's name ({first}); save it with PEFT's save_pretrained"
    return (
        f"{len(names)} of its {count} tensors fit no module of the model, the first is {first}; an adapter of this model has names such as "
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    )


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank of a module: the first pattern that matches the end of its name, as in PEFT's get_pattern_key, else r."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return int(rank)
        except re.error as error:
            raise AdapterError(f"{pattern!r} in its rank_pattern is no pattern ({error}); save the adapter again") from None
    return int(config["r"])


def _fits(module: str, a: Tensor, b: Tensor, rank: int, base: Sizes | None) -> None:
    """AdapterError unless A is [rank, inputs] and B is [outputs, rank] of a module of this model."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"lora_A and lora_B of {module} are {list(a.shape)} and {list(b.shape)}, which is not the rank {rank} of its {CONFIG}; "
            "copy both files from one training"
        )
    if base is None:
        return
    layer = int(module.split(".")[2])
    if layer >= base.layers:
        raise AdapterError(f"it adapts layer {layer} and the model has {base.layers} layers; it is another model's adapter")
    inputs, outputs = matrix(base, module.rsplit(".", 1)[1])
    if (inputs, outputs) != (a.shape[1], b.shape[0]):
        raise AdapterError(
            f"{module} takes {inputs} and gives {outputs} in this model, {a.shape[1]} and {b.shape[0]} in the adapter; it is another "
            "model's adapter"
        )


def base_of(folder: Path) -> architecture.Architecture | None:
    """The model whose weights lie in a folder; None where a GGUF file holds its sizes. ValueError if it is not served."""
    names = [path.name for path in folder.iterdir()]
    file = folder / architecture.config_file(names)
    if not any(name.endswith(".safetensors") for name in names):
        return None
    try:
        config = dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read ({error}); pull the weights again") from None
    return architecture.read_params(config) if file.name == "params.json" else architecture.read(config)


def changes_nothing(folder: Path, adapter: Adapter) -> bool:
    """Whether every module's A or B is all zeros, as PEFT begins a training."""
    return all(_zero(folder / TENSORS, a) or _zero(folder / TENSORS, b) for a, b in adapter.pairs)


def _zero(path: Path, tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are 0 or -0, whose last byte is the sign's."""
    numbers, width = _part(path, tensor.start, tensor.stop), DTYPES[tensor.dtype]
    return not any(numbers[at::width].translate(None, b"\0\x80" if at == width - 1 else b"\0") for at in range(width))


def main(weights: str, name: str, folder: str) -> int:
    """`python -m mistral_contract.adapters WEIGHTS NAME FOLDER`: 0, or 1 with one line on standard error."""
    place = f"the configuration in {weights}"
    try:
        base, place = base_of(Path(weights)), f"the adapter {name}"
        read(Path(folder), base)
    except ValueError as error:
        sys.stderr.write(f"{place}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
