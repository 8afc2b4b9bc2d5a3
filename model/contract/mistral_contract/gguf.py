"""What a GGUF file says of its model, by its beginning, and what that is in the words of a config.json."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any

from mistral_contract import architecture
from mistral_contract.architecture import Architecture

MAGIC = b"GGUF"
# The kinds of values by their numbers, as struct writes them (ggml/include/gguf.h); 8 is a text, 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
MOST_KEYS, MOST_ITEMS, MOST_DIMENSIONS = 1 << 16, 1 << 22, 8
# What a GGUF file says of the model (llama.*), and is read here.
SAID = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length",
}  # fmt: skip
# Keys that change nothing with these values; any other key must be off.
SAID_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "tensor_data_layout": ("Meta AI original pth",), "rope.scaling.finetuned": (True, False),
    "rope.scaling.attn_factor": (1,), "logit_scale": (1,), "embedding_scale": (1,), "residual_scale": (1,),
}  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """The keys of a GGUF file, and the names of its tensors; None where the beginning that was read does not reach them.

    Of an array only its length is kept, as a list of so many None.
    """

    values: Mapping[str, Any]
    tensors: frozenset[str] | None


class _Ends(Exception):
    """The bytes end before the value does."""


class _Bytes:
    """The bytes of a file of `size` bytes, read one value after the other."""

    def __init__(self, data: bytes | mmap, at: int, size: int) -> None:
        self._data, self._at, self._size = data, at, size

    def number(self, form: str) -> Any:
        end = self._at + struct.calcsize(f"<{form}")
        if end > len(self._data):
            raise _Ends
        [value] = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at = end
        return value

    def text(self) -> str:
        length = self.number("Q")
        end = length + self._at
        if length > self._size:
            raise ValueError(f"it has a text of {length} bytes, and {self._size} in all: it is damaged")
        if end > len(self._data):
            raise _Ends
        text, self._at = self._data[self._at : end], end
        return text.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            if kind not in NUMBERS:
                raise ValueError(f"it has a value of the unknown type {kind}")
            return self.number(NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if count > MOST_ITEMS or kind == ARRAY:
            raise ValueError(f"it has an array of {count} items of the type {kind}")
        return kind, count


def read(data: bytes | mmap, size: int) -> Metadata:
    """Return what the beginning of a GGUF file of `size` bytes says; ValueError if it is none."""
    if data[:4] != MAGIC:
        raise ValueError("it does not begin like a GGUF file: it is damaged, or something else")
    found: dict[str, Any] = {}
    rest = _Bytes(data, len(MAGIC), size)
    try:
        version, tensors, keys = rest.number("I"), rest.number("Q"), rest.number("Q")
        if version not in (2, 3) or keys > MOST_KEYS or tensors > MOST_KEYS:
            raise ValueError(f"it is of version {version} with {keys} keys and {tensors} tensors, and versions 2 and 3 are read")
        for _ in range(keys):
            key = rest.text()
            if key in found:
                raise ValueError(f"it has the key {key} twice")
            value = rest.value(rest.number("I"))
            if isinstance(value, tuple):
                kind, count = value
                if count > size:
                    raise ValueError(f"it has an array of {count} items, and {size} bytes in all: it is damaged")
                found[key] = [None] * count
                for _ in range(count):
                    rest.value(kind)
            else:
                found[key] = value
        names = set()
        for _ in range(tensors):
            names.add(rest.text())
            if (dimensions := rest.number("I")) > MOST_DIMENSIONS:
                raise ValueError(f"it has a tensor of {dimensions} dimensions: it is damaged")
            for _ in range(dimensions):
                rest.number("Q")
            rest.number("I"), rest.number("Q")
    except _Ends:
        return Metadata(found, None)
    return Metadata(found, frozenset(names))


def check_kind(kind: str, purpose: str | None) -> None:
    """ValueError unless this is a model of the architecture llama, which Mistral's are called there."""
    if kind != "llama":
        raise ValueError(f"its architecture is {kind}, not llama")
    if purpose not in (None, "model"):
        raise ValueError(f"it is of the type {purpose}, not model")


def model(found: Metadata) -> Architecture | None:
    """Return the sizes of a GGUF file's model, None where its beginning does not tell them; ValueError if it is not served."""
    values = found.values
    if (kind := values.get("general.architecture")) is not None:
        check_kind(kind, values.get("general.type"))
    elif found.tensors is not None:
        raise ValueError("it has no general.architecture")
    said = {key.removeprefix("llama."): value for key, value in values.items() if key.startswith("llama.")}
    tokens = values.get("tokenizer.ggml.tokens")
    vocabulary = said.get("vocab_size") or (len(tokens) if isinstance(tokens, list) else 0)
    if not vocabulary and found.tensors is None:
        return None
    tied = found.tensors is not None and "output.weight" not in found.tensors
    config = hugging_face_config(said, None) | {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    return architecture.read(config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]})


def llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """The scaling of which `rope_freqs.weight` is made, one factor for each frequency; ValueError if it is not Llama 3's.

    Converters write only the factors. Llama 3.1 and 3.2 have the same two thresholds, so that the largest factor says the rest.
    """
    factor, low, high, original = max(factors), 1.0, 4.0, 8192
    for index, found in enumerate(factors):
        turns = original * theta ** (-index / len(factors)) / (2 * math.pi)  # over the original context
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        if abs(found - 1 / ((1 - share) / factor + share)) > 1e-4 * found:
            raise ValueError("the factors of its rope_freqs.weight are not those of Llama 3")
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return None if factor == 1 else {"rope_type": "llama3", **scaling}


def hugging_face_config(said: Mapping[str, Any], freqs: Sequence[float] | None) -> dict[str, Any]:
    """The configuration of a llama-shaped GGUF model in the words of MistralConfig; ValueError if it computes something else.

    `said` are the values of its keys, without `llama.`; `freqs` its rope_freqs.weight.
    """
    try:
        return _hugging_face_config(said, freqs)
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"its sizes are no sizes ({error})") from None


def _hugging_face_config(said: Mapping[str, Any], freqs: Sequence[float] | None) -> dict[str, Any]:
    def value(key: str) -> Any:
        if said.get(key) is None:
            raise ValueError(f"it has no llama.{key}")
        return said[key]

    for key, found in said.items():
        if key not in SAID and found and found not in SAID_NEUTRAL.get(key, ()):
            raise ValueError(f"its llama.{key} = {str(found)[:60]} asks for a computation that the class does not have")
    if said.get("attention.causal") is False:
        raise ValueError("its attention is not causal")
    hidden, heads, context = value("embedding_length"), value("attention.head_count"), value("context_length")
    if (
        isinstance(heads, list)
        or isinstance(said.get("attention.head_count_kv"), list)
        or isinstance(said.get("feed_forward_length"), list)
    ):
        raise ValueError("its layers differ in their sizes")
    head_dim = said.get("attention.key_length") or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key) not in (None, 0, head_dim):
            raise ValueError(f"its llama.{key} is {said[key]}, and its heads have {head_dim}")
    theta = said.get("rope.freq_base") or 10000.0
    factor = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1
    kind = said.get("rope.scaling.type") or "linear"  # llama.cpp's default
    rope: dict[str, Any] = {"rope_type": "default"}
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"its llama.rope.scaling.type is {kind}")
    if kind != "none" and factor != 1:
        original = said.get("rope.scaling.original_context_length") or context
        # Of linear scaling, max_position_embeddings is the length that was trained, which vLLM multiplies by the factor; of YaRN the whole.
        if kind == "linear":
            rope, context = {"rope_type": "linear", "factor": factor}, min(context, original)
        else:
            rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if freqs is not None and (scaling := llama3_scaling(freqs, theta)):
        if rope["rope_type"] != "default":
            raise ValueError(f"it has both rope_freqs.weight and llama.rope.scaling.type {kind}")
        rope = scaling
    return {
        "hidden_size": hidden, "intermediate_size": value("feed_forward_length"), "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": said.get("attention.head_count_kv") or heads, "head_dim": head_dim,
        "max_position_embeddings": context, "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope | {"rope_theta": theta}, "sliding_window": said.get("attention.sliding_window") or None,
    }  # fmt: skip
