"""The canary's figures: log-probabilities of forced tokens that an engine with one set of weights has to compute.

They are made by the reference, or by the first engine that served these weights ("made here"), and kept as JSON: with the weights, on the
node, on the laptop. Whoever reads them checks them here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mistral_contract import untrusted

FILE = "mistralctl-canary.json"
# Largest difference of a log-probability that rounding explains, by the engine's dtype, against exact figures.
TOLERANCE = {"float32": 0.005, "float16": 0.1, "bfloat16": 0.4}
_WEIGHTS = (".safetensors", ".gguf")
MOST_TOKENS, LARGEST_TOKEN = 1 << 17, 1 << 31
_CONFIGURATION = ("config.json", "params.json")


def key(files: Iterable[tuple[str, str]], quantization: str = "") -> str:
    """The hash under which figures are kept: of the (name, sha256) of all files with weights or configuration, and of what they are
    quantized to while they are loaded.

    >>> key([("model.safetensors", "ab"), ("config.json", "cd")]) == key([("config.json", "cd"), ("README", "0"), ("model.safetensors", "ab")])
    True
    """
    lines = sorted(f"{sha256} {name}\n" for name, sha256 in files if name.endswith(_WEIGHTS) or name in _CONFIGURATION)
    return hashlib.sha256("".join([*lines, quantization]).encode()).hexdigest()


def is_key(text: object) -> bool:
    """Whether this is what `key` gives, so that it may name a file."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def read(text: str | bytes, weights: str = "") -> dict[str, Any]:
    """The figures in a file; ValueError if it holds anything else. `weights` is the key that figures made here have to bear."""
    found = untrusted.read(text, judged=True)
    prompt, forced, logprobs = (found.get(name) for name in ("prompt_token_ids", "forced_token_ids", "logprobs"))
    for tokens in (prompt, forced):
        if not isinstance(tokens, list) or not 0 < len(tokens) <= MOST_TOKENS or not all(map(_is_token, tokens)):
            raise ValueError("token ids are missing or wrong")
    if not isinstance(logprobs, list) or not isinstance(forced, list) or len(logprobs) != len(forced):
        raise ValueError("not one log-probability for each forced token")
    if not all(untrusted.finite(value) and value <= 0 for value in logprobs):
        raise ValueError("a log-probability is not a finite number of at most 0")
    source = found.get("source", "")
    if not isinstance(source, str) or not source.isprintable() or len(source) > 200:
        raise ValueError("source is no line of text")
    if weights and found.get("weights") != weights:
        raise ValueError("they are of other weights")
    return found


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < LARGEST_TOKEN


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest difference of two lists of log-probabilities; ValueError unless all are finite numbers, and as many.

    >>> difference([-1.0, -2.0], [-1.5, -2.0])
    0.5
    """
    if len(found) != len(expected) or not found or not all(map(untrusted.finite, (*found, *expected))):
        raise ValueError("they are not as many finite numbers")  # of a nan, max() and > would say that all is well
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def tolerance(figures: dict[str, Any], dtype: str) -> float:
    """What an engine of this dtype may differ by. Figures made by an engine are rounded, too: both roundings add."""
    own = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    return own + TOLERANCE.get(str(figures.get("dtype")), TOLERANCE["bfloat16"]) if "weights" in figures else own
