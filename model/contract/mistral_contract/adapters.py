"""Which LoRA adapters are served: judged by adapter_config.json and the tensors' names and shapes, before vLLM starts.

vLLM 0.32 says less and later: some adapters it refuses when it starts (`lora/peft_helper.py`, `lora/lora_model.py`), some it loads
and then ignores (tensors of no module, `lora/model_manager.py`) or copies in part (shapes smaller than the model's,
`lora/layers/base_linear.py`). `tests/plugin/test_adapters.py` holds this judgement to vLLM's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_contract import architecture, safetensors, tensors, untrusted
from mistral_contract.quantization import harmless
from mistral_contract.safetensors import Tensor
from mistral_contract.tensors import Sizes

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG = 1 << 20
LFS_POINTER = b"version https://git-lfs"
# Initialisations of PEFT that leave the base model as it is (vllm/lora/peft_helper.py, _init_is_supported).
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Features of PEFT that vLLM does not compute, by their fields of adapter_config.json.
FEATURES = {
    "use_dora": "DoRA", "lora_bias": "a LoRA bias", "alora_invocation_tokens": "activated LoRA", "use_qalora": "QALoRA",
    "layer_replication": "replicated layers", "use_bdlora": "block-diagonal LoRA",
}  # fmt: skip
MOST_PATTERNS, MOST_REPEATING = 4096, 32  # of ranks for single modules: each is tried on each module
MERGE = "merge it into the weights (PEFT: merge_and_unload) and serve those"

Read = Callable[[str, int, int], bytes]


class AdapterError(untrusted.Refusal):
    """What is wrong with an adapter, and what to do."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that can be served. `rank` is the largest of all that its configuration names; `pairs` are A and B of each module.

    `base` is the model that it was trained on, by its configuration: a repository of the hub, or any other name; `base_revision` its commit,
    empty where that is not named.
    """

    rank: int
    pairs: tuple[tuple[Tensor, Tensor], ...]
    base: str = ""
    base_revision: str = ""


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
        config = untrusted.read(text, LARGEST_CONFIG, judged=True)
    except untrusted.NotRead as error:
        raise AdapterError(f"its {CONFIG} {str(error).removeprefix('it ')}; save the adapter again") from None
    rank = _features(config)
    if TENSORS not in sizes:
        if any(name.startswith("adapter_model") and name.endswith((".bin", ".pt")) for name in sizes):
            raise AdapterError(f"its tensors are pickled, which can run code; save it as {TENSORS} (PEFT: save_pretrained)")
        raise AdapterError(f"it has no {TENSORS}; save it with PEFT's save_pretrained, in one file")
    named = [value if isinstance(value := config.get(name), str) else "" for name in ("base_model_name_or_path", "revision")]
    return Adapter(rank, _pairs(config, header(TENSORS, sizes[TENSORS], read), base), *named)


def _no_pointer(name: str, beginning: bytes) -> None:
    if beginning.startswith(LFS_POINTER):
        raise AdapterError(f"its {name} is a git-lfs pointer, not the file; run git lfs pull in its repository")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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
    if (
        not untrusted.finite(alpha)
        or not isinstance(alphas, dict)
        or not all(untrusted.finite(value) for value in alphas.values())
    ):
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
    """The tensors of a safetensors file of `size` bytes, by its header; AdapterError where the file is not whole, or not of numbers."""
    start = read(name, 0, min(size, 64))
    _no_pointer(name, start)
    try:
        found = safetensors.read(size, read(name, 0, safetensors.header_end(size, start)))
    except safetensors.Damaged as error:
        raise AdapterError(f"its {name} {error}; copy it again") from None
    for key, tensor in found.items():
        if tensor.dtype not in safetensors.FLOATS:
            raise AdapterError(f"its tensor {key} is of type {tensor.dtype}; save it as bfloat16, float16 or float32")
        if not all(tensor.shape):
            raise AdapterError(f"its tensor {key} has the shape {list(tensor.shape)}; save the adapter again")
    return found


PREFIX = "base_model.model."
MODULE = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)")


def _pairs(config: Mapping[str, Any], found: Mapping[str, Tensor], base: Sizes | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """A and B of each module, each of which the model has, with its shapes."""
    halves: dict[str, dict[str, Tensor]] = {}
    lost: list[str] = []
    for name, tensor in found.items():
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
        raise AdapterError(_lost(lost, len(found)))
    patterns = ranks(config)
    if not halves:
        raise AdapterError(f"its {TENSORS} has no tensor; save the adapter again")
    pairs = []
    for module, sides in halves.items():
        if len(sides) < 2:
            raise AdapterError(f"it has only lora_{next(iter(sides))} of {module}; save the adapter again")
        _fits(module, sides["A"], sides["B"], rank_of(patterns, module), base)
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


def ranks(config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], int]]:
    """The patterns of a configuration with their ranks, the last of which is r's and matches all; AdapterError if they could take for ever."""
    given = config.get("rank_pattern") or {}
    if len(given) > MOST_PATTERNS or sum(bool(re.search(r"[*+{]", pattern)) for pattern in given) > MOST_REPEATING:
        raise AdapterError(
            f"its rank_pattern has {len(given)} patterns; at most {MOST_PATTERNS}, {MOST_REPEATING} of them with repetitions, are tried: save "
            "the adapter again"
        )
    found = []
    for pattern, rank in given.items():
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$" if harmless(pattern) else "("), int(rank)))
        except re.error:
            raise AdapterError(
                f"{pattern!r} in its rank_pattern is no pattern, or one that could take for ever; save the adapter again"
            ) from None
    return [*found, (re.compile(""), int(config["r"]))]


def rank_of(patterns: Iterable[tuple[re.Pattern[str], int]], module: str) -> int:
    """The rank of a module: the first pattern that matches the end of its name, as in PEFT's get_pattern_key."""
    return next(rank for pattern, rank in patterns if pattern.match(module))


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
    outputs, inputs = tensors.linear(base)[module.split(".", 3)[3]]
    if (inputs, outputs) != (a.shape[1], b.shape[0]):
        raise AdapterError(
            f"{module} takes {inputs} and gives {outputs} in this model, {a.shape[1]} and {b.shape[0]} in the adapter; it is another "
            "model's adapter"
        )


def base_of(folder: Path) -> architecture.Architecture | None:
    """The model whose weights lie in a folder; None where a GGUF file holds its sizes. ValueError if it is not served."""
    if not any(path.suffix == ".safetensors" for path in folder.iterdir()):
        return None
    return architecture.read_folder(folder)


def changes_nothing(folder: Path, adapter: Adapter) -> bool:
    """Whether every module's A or B is all zeros, as PEFT begins a training."""
    return all(_zero(folder / TENSORS, a) or _zero(folder / TENSORS, b) for a, b in adapter.pairs)


def _zero(path: Path, tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are 0 or -0, whose last byte is the sign's."""
    numbers, width = _part(path, tensor.start, tensor.stop), safetensors.FLOATS[tensor.dtype]
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
