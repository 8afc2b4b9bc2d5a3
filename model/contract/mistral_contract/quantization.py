"""What weights are quantized with, by their own configuration: which methods are served, and how many bytes they take.

Facts are those of vLLM 0.32 (model_executor/layers/quantization); tests/plugin/test_quantization.py holds them against it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_contract import tensors, untrusted
from mistral_contract.architecture import Architecture

HALVES = ("bfloat16", "float16")
SCALE_BITS = 16


@dataclass(frozen=True)
class Method:
    """A method of vLLM: the oldest compute capability, and the types that it computes in. `online` quantizes while it loads."""

    capability: tuple[int, int]
    dtypes: tuple[str, ...]
    online: str | None = None


# get_min_capability (gptq says 6.0 and compressed-tensors 7.0, but vLLM itself begins at 7.5) and get_supported_act_dtypes.
# `--quantization fp8` of weights that are not quantized is deprecated in vLLM 0.32; fp8_per_tensor is what it stands for.
METHODS = {
    "fp8": Method((7, 5), HALVES, "fp8_per_tensor"),
    "awq": Method((7, 5), HALVES),
    "gptq": Method((7, 5), HALVES),
    "compressed-tensors": Method((7, 5), (*HALVES, "float32")),
}
GPTQ_BITS, AWQ_BITS, PACKED_BITS = (4, 8), (4,), range(2, 9)
MARLIN_GROUPS = (-1, 32, 64, 128)
MOST_NAMES = 2048  # each is tried with each layer
# Files that hold what config.json does not, where they lie beside it, and the method that vLLM reads them for.
BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}


class NotServed(untrusted.Refusal):
    """Weights are quantized in a way that is not served."""


@dataclass(frozen=True)
class Part:
    """Layers that are quantized alike. `bits` is what a weight takes with its share of scales and zero points."""

    targets: tuple[str, ...]
    bits: float


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized. Layers that no part names, and those in `left`, keep 16 bits; so do embeddings and norms.

    `head` says that the output head is one of all linear layers, `bits` is of a weight alone, `capability` the oldest GPU for it.
    """

    method: str
    bits: int
    parts: tuple[Part, ...]
    left: tuple[str, ...] = ()
    head: bool = False
    capability: tuple[int, int] = (7, 5)

    @property
    def label(self) -> str:
        """Method and bits, as shown: `gptq, 8 bits`."""
        return f"{self.method}, {self.bits} bits"

    def bits_of(self, module: str) -> float | None:
        """Bits that a weight of this linear layer takes; None where it is not quantized."""
        if _matches(module, self.left):
            return None
        every = module != "lm_head" or self.head
        return next(
            (part.bits for part in self.parts if (every and "Linear" in part.targets) or _matches(module, part.targets)), None
        )


def read(config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]] | None = None) -> Scheme | None:
    """The scheme by a config.json (or params.json) and the files of BESIDE by name; None if the weights are not quantized.

    NotServed where vLLM 0.32 cannot load them so, or mistralctl does not plan it.
    """
    beside = beside or {}
    found = _section(config)
    place = "quantization_config"
    if not found:
        place = next((name for name in BESIDE if beside.get(name)), "")
        if not place:
            return None
        found = {"quant_method": BESIDE[place], **beside[place]}
    method = str(found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "")).lower()
    method = method.replace("compressed_tensors", "compressed-tensors")
    if found.get("qformat_weight") == "fp8_e4m3":  # Mistral's own params.json
        return _fp8({"activation_scheme": "static"})
    reader = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors}.get(method)
    if reader is None:
        what = method if method else "a method without a name"
        raise NotServed(f"{place}: {what} is not served; use a copy in {', '.join(METHODS)}, or one that is not quantized")
    try:
        return reader(found)
    except NotServed as error:
        raise NotServed(f"{place}: {method} {error}; use another copy of these weights") from None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise NotServed(f"{place}: {method} cannot be read ({error!r}); correct it, or use another copy") from None


def check(wanted: str | None, scheme: Scheme | None, known: bool = True) -> None:
    """ValueError if `--quantization` `wanted` does not go with weights so quantized (`known` False: nobody has read them)."""
    if wanted is None or not known:
        return
    if scheme is None and METHODS[wanted].online is None:
        raise ValueError(
            f"{wanted} needs weights that are so quantized, and these are not; leave it out, name others, "
            "or use fp8, which quantizes while it loads"
        )
    if scheme is not None and scheme.method != wanted:
        raise ValueError(f"{wanted} does not go with these weights, which are quantized with {scheme.method}; leave it out")


def vllm_name(wanted: str | None, scheme: Scheme | None) -> str | None:
    """What vLLM's `--quantization` is told for weights of this scheme."""
    if scheme is not None:
        return scheme.method
    return METHODS[wanted].online if wanted else None


def linear(model: Architecture) -> dict[str, int]:
    """The linear layers of a model by name, with the number of their weights."""
    layer = {name: math.prod(shape) for name, shape in tensors.linear(model).items()}
    found = {f"model.layers.{n}.{name}": size for n in range(model.layers) for name, size in layer.items()}
    return found if model.tied else found | {"lm_head": model.hidden * model.vocabulary}


def weight_bytes(scheme: Scheme, model: Architecture) -> int:
    """Bytes of the weights of a model that is quantized so."""
    sizes = {name: (size, scheme.bits_of(name)) for name, size in linear(model).items()}
    quantized = [(size, bits) for size, bits in sizes.values() if bits is not None]
    return round(sum(size * bits / 8 for size, bits in quantized)) + 2 * (model.parameters - sum(size for size, _ in quantized))


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a configuration says how its weights are quantized, in the order in which vLLM looks."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if found := place.get(key):
                return found if isinstance(found, Mapping) else {"quant_method": str(found)}
    return {}


def _first(found: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in found:
            return found[key]
    raise NotServed(f"has no {keys[-1]}")


def _share(bits: int, group: int, zero_points: bool) -> float:
    """Bits of a weight and its share of a group's scale and zero point; one group for a whole row (-1) costs next to nothing."""
    return bits + (SCALE_BITS + (bits if zero_points else 0)) / group if group > 0 else float(bits)


def _bits(found: Mapping[str, Any], served: Iterable[int], *keys: str) -> int:
    bits = int(_first(found, *keys))
    if bits not in served:
        raise NotServed(f"with {bits} bits is not served by vLLM 0.32, only with {', '.join(str(one) for one in served)}")
    return bits


def _names(value: Any) -> tuple[str, ...]:
    """Names of layers: a list, or a list of lists."""
    found: list[str] = []
    for item in value or ():
        found += [item] if isinstance(item, str) else list(_names(item))
    if len(found) > MOST_NAMES:
        raise NotServed(f"names {len(found)} layers, and at most {MOST_NAMES} are read")
    return tuple(found)


def _awq(found: Mapping[str, Any]) -> Scheme:
    bits = _bits(found, AWQ_BITS, "w_bit", "bits")
    group = int(_first(found, "q_group_size", "group_size"))
    zero_points = bool(_first(found, "zero_point"))
    version = str(found.get("version") or "gemm").lower()
    if version != "gemm":
        raise NotServed(f"version {version} is not served by vLLM 0.32, only gemm")
    part = Part(("Linear",), _share(bits, group, zero_points))
    return Scheme("awq", bits, (part,), _names(found.get("modules_to_not_convert")), bool(found.get("lm_head")))


def _gptq(found: Mapping[str, Any]) -> Scheme:
    if found.get("is_marlin_format") or found.get("checkpoint_format") == "marlin":
        raise NotServed("in Marlin's format is not served by vLLM 0.32, only in GPTQ's own")
    bits = _bits(found, GPTQ_BITS, "bits")
    group, _, symmetric = (_first(found, key) for key in ("group_size", "desc_act", "sym"))
    rules = {str(rule): more for rule, more in (found.get("dynamic") or {}).items()}
    for base in (dict(found), *(dict(found) | dict(more) for rule, more in rules.items() if not rule.startswith("-:"))):
        if base["desc_act"] and base["group_size"] != -1:
            raise NotServed("with desc_act is not served by vLLM 0.32")
    if not symmetric:
        raise NotServed("without sym is not served by vLLM 0.32")
    if int(group) not in MARLIN_GROUPS:
        raise NotServed(f"with group_size {group} is not served by vLLM 0.32, only with {', '.join(map(str, MARLIN_GROUPS))}")
    other = [
        Part((f"re:{rule.removeprefix('+:')}",), _share(int(more.get("bits", bits)), int(more.get("group_size", group)), True))
        for rule, more in rules.items() if not rule.startswith("-:")
    ]  # fmt: skip
    targets = _names(found.get("modules_in_block_to_quantize")) or ("Linear",)
    left = tuple(f"re:{rule.removeprefix('-:')}" for rule in rules if rule.startswith("-:"))
    parts = (*other, Part(targets, _share(bits, int(group), True)))
    return Scheme("gptq", bits, parts, left, bool(found.get("lm_head")))


def _fp8(found: Mapping[str, Any]) -> Scheme:
    activations = _first(found, "activation_scheme")
    if activations not in ("static", "dynamic"):
        raise NotServed(f"with activation_scheme {activations} is not served by vLLM 0.32")
    block = found.get("weight_block_size")
    if block is not None and (len(block) != 2 or activations != "dynamic"):
        raise NotServed("with weight_block_size needs two sizes and activation_scheme dynamic")
    scales = 32 / (int(block[0]) * int(block[1])) if block else 0.0
    left = _names(found.get("ignored_layers") or found.get("modules_to_not_convert"))
    return Scheme("fp8", 8, (Part(("Linear",), 8 + scales),), left)


def _compressed_tensors(found: Mapping[str, Any]) -> Scheme:
    if (found.get("sparsity_config") or {}).get("targets"):
        raise NotServed("with sparsity_config is not served by vLLM 0.32")
    parts, all_bits, capability = [], [], (7, 5)
    for group in (found.get("config_groups") or {}).values():
        targets, weights, inputs = _names(group["targets"]), group["weights"], group.get("input_activations") or {}
        if len(targets) == 1 and targets[0].endswith("Attention"):  # of the cache, which vLLM reads elsewhere
            continue
        bits, kind = int(weights.get("num_bits", 8)), str(weights.get("type", "int"))
        if bits not in (PACKED_BITS if kind == "int" else (4, 8)):
            raise NotServed(f"with {bits} bits of {kind} is not served by vLLM 0.32")
        if weights.get("actorder") in ("group", "dynamic", True):
            raise NotServed(f"with actorder {weights['actorder']} is not served by vLLM 0.32")
        if kind == "int" and bits == 4 and inputs.get("type") == "float":
            capability = (9, 0)  # CompressedTensorsW4A8Fp8
        parts.append(Part(targets, _share(bits, int(weights.get("group_size") or -1), weights.get("symmetric") is False)))
        all_bits.append(bits)
    if not parts:
        raise NotServed("names no config_groups")
    return Scheme("compressed-tensors", min(all_bits), tuple(parts), _names(found.get("ignore")), False, capability)


def _matches(module: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns names this layer: whole parts of its name, or a regular expression after `re:`."""
    for pattern in patterns:
        if not pattern.startswith("re:"):
            if f".{pattern.strip('.')}." in f".{module}.":
                return True
        elif harmless(pattern := pattern[3:]) and re.match(pattern, module):
            return True
    return False


def harmless(pattern: str) -> bool:
    """Whether an expression that came with weights can be tried in little time: few repetitions, none of a group."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return len(pattern) <= 400 and not re.search(r"\)[*+?{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 3
