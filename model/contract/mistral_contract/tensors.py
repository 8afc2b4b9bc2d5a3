"""Which tensors a model has: names and shapes, as Hugging Face's checkpoints and Mistral's own have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from mistral_contract import untrusted
from mistral_contract.architecture import Architecture
from mistral_contract.safetensors import FLOATS, Tensor

# Names of Mistral's own checkpoints (consolidated.safetensors), as those of Hugging Face.
CONSOLIDATED = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
# Tables of angles, which some checkpoints carry and which are computed anew.
ANGLES = re.compile(r"\.rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)$")
UNFIT = "this is not the model that its configuration says: serve it with vLLM's own class"


class Unfit(untrusted.Refusal):
    """Which tensor has no place, or is missing, and what to do, in one line."""


class Sizes(Protocol):
    """The sizes of a model: `architecture.Architecture`, for example."""

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


def others(names: list[str]) -> str:
    """Return how many more there are than the first."""
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def hugging_face(name: str) -> str:
    """Return the name of a tensor in Hugging Face's format; one that has no other name there as it is.

    >>> hugging_face("layers.3.attention.wq.weight"), hugging_face("lm_head.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'lm_head.weight')
    """
    match = re.fullmatch(r"(layers\.\d+\.)?(.+?)\.([^.]+)", name)
    place = CONSOLIDATED.get(match[2], "") if match else ""
    if not match or not place or (match[1] is None) != place.startswith(("model.", "lm_head")):
        return name
    return f"model.{match[1]}{place}.{match[3]}" if match[1] else f"{place}.{match[3]}"


def linear(model: Sizes) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a decoder layer: (outputs, inputs) by name."""
    queries, kv, hidden, inner = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.hidden, model.intermediate
    return {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip


def shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the modules of a model with the shapes of their weights; `lm_head` also where it is tied to the embedding."""
    table, norm = (model.vocabulary, model.hidden), (model.hidden,)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens": table, "model.norm": norm, "lm_head": table}
    layer = linear(model) | {"input_layernorm": norm, "post_attention_layernorm": norm}
    return found | {f"model.layers.{n}.{name}": shape for n in range(model.layers) for name, shape in layer.items()}


def check_shape(name: str, module: str, shape: tuple[int, ...], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise Unfit for a weight of another shape than its module has."""
    if shape != wanted[module]:
        raise Unfit(f"{name} has the shape {list(shape)}, and by its configuration {list(wanted[module])}; {UNFIT}")


def judge(model: Architecture, quantized: bool, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise Unfit unless the tensors of these files are those of the model: every one has a place, and every place one.

    Of quantized weights the names and shapes depend on the method: there every module must have a tensor.
    """
    wanted, found = shapes(model), dict[str, str]()
    filled = set[str]()
    for file, tensors in files.items():
        for stored, tensor in tensors.items():
            if ANGLES.search(stored):
                continue
            name = hugging_face(stored)
            if name in found:
                raise Unfit(f"{found[name]} and {file} both have {stored}; keep the files of one set of weights")
            found[name] = file
            module, _, kind = name.rpartition(".")
            filled.add(module)
            if quantized:
                if kind == "B" and module in wanted:
                    raise Unfit(
                        f"{stored} is quantized in Marlin's format, which vLLM 0.32 does not read; use another copy of these weights"
                    )
                continue
            if kind == "bias" and module in wanted:
                raise Unfit(f"{stored} is a bias, and the class has none; {UNFIT}")
            if kind != "weight" or module not in wanted or tensor.dtype not in FLOATS:
                raise Unfit(f"{stored} ({tensor.dtype}) has no place in the class; {UNFIT}")
            check_shape(stored, module, tensor.shape, wanted)
    missing = [name for name in wanted if name not in filled and not (model.tied and name == "lm_head")]
    if missing:
        raise Unfit(f"the weights have no {missing[0]}{others(missing)}; take the whole model, with all its files")
