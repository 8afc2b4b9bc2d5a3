"""The canary: before the launcher says ready, it asks the engine for log-probabilities that are known."""

from __future__ import annotations

import json
import math
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_mistral.client import Client
from vllm_mistral.contract import Code, LaunchError

FILE = "mistralctl-canary.json"
MANIFEST = "mistral-weights.json"
SHIPPED = Path(__file__).parent / "canaries"  # the same figures and `weights_sha256`, the hash of the model's file
# Largest difference of a log-probability that rounding explains, by the engine's dtype, against figures in float32.
TOLERANCE = {"float32": 0.005, "float16": 0.1, "bfloat16": 0.4}
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Verdict:
    """`max_difference` is the largest of the forced tokens' log-probabilities (natural logarithm); None if not verified."""

    state: Literal["verified", "not verified"]
    max_difference: float | None = None
    tolerance: float | None = None


def _complete(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(client.ask("/v1/completions", body, seconds=600))
        return data
    except urllib.error.HTTPError as error:
        raise LaunchError(Code.CANARY, f"the engine refused the check: {error.code} {error.read()[:300]!r}") from error
    except (OSError, ValueError) as error:
        raise LaunchError(Code.CANARY, f"the engine did not answer the check ({error})") from error


def forced_logprobs(client: Client, model: str, prompt: list[int], forced: list[int]) -> list[float]:
    """The engine's log-probabilities of `forced` behind `prompt`, token ids."""
    body = {"model": model, "prompt": prompt + forced, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    entries = _complete(client, body)["choices"][0]["prompt_logprobs"]
    return [float(entries[len(prompt) + i][str(token)]["logprob"]) for i, token in enumerate(forced)]


def _shipped_figures(folder: Path) -> str | None:
    """The figures that this package has of these very weights, by the hashes in their manifest."""
    try:
        manifest = json.loads((folder.with_name(folder.name.removesuffix(".hf")) / MANIFEST).read_text("utf-8"))
        hashes = {str(file["sha256"]) for file in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for path in sorted(SHIPPED.glob("*.json")):
        text = path.read_text("utf-8")
        if json.loads(text)["weights_sha256"] in hashes:
            return text
    return None


def stored_figures(folder: Path) -> dict[str, Any] | None:
    """What is stored with the weights, or else here for them; None if nothing is.

    LaunchError if it is not what `reference --canary` writes.
    """
    try:
        path = folder / FILE
        text = path.read_text("utf-8") if path.exists() else _shipped_figures(folder)
        if text is None:
            return None
        found: dict[str, Any] = json.loads(text)
        prompt, forced, logprobs = found["prompt_token_ids"], found["forced_token_ids"], found["logprobs"]
        if not all(type(token) is int and token >= 0 for token in prompt + forced) or not prompt or not forced:
            raise ValueError("its token ids are none")
        if not all(type(value) in (int, float) and math.isfinite(value) and value <= 0 for value in logprobs):
            raise ValueError("its log-probabilities are none")
        if len(forced) != len(logprobs):
            raise ValueError("its lists do not fit")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(Code.CANARY, f"{folder / FILE} is damaged ({error}); pull the weights again") from error


def compare(client: Client, model: str, folder: Path, dtype: str, max_model_len: int) -> Verdict:
    """The verdict on the running engine; LaunchError if it computes something else than the weights' own figures.

    Not verified where no figures are stored, or where their prompt is longer than what this deployment takes.
    """
    stored = stored_figures(folder)
    if stored is None or len(stored["prompt_token_ids"]) + len(stored["forced_token_ids"]) >= max_model_len:
        return Verdict("not verified")
    got = forced_logprobs(client, model, stored["prompt_token_ids"], stored["forced_token_ids"])
    if not all(math.isfinite(value) for value in got):  # max() below would lose a nan that is not the first
        raise LaunchError(Code.CANARY, "the engine's log-probabilities are not finite; the weights are damaged")
    difference = max(abs(a - b) for a, b in zip(got, stored["logprobs"], strict=True))
    allowed = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    if difference > allowed:
        raise LaunchError(
            Code.CANARY,
            f"the engine does not compute what the weights say: a log-probability differs by {difference:.3f}, {allowed} is "
            "allowed; the weights, the window or the rotary base are not those of the model",
        )
    return Verdict("verified", round(difference, 6), allowed)


def answers(client: Client, model: str) -> None:
    """LaunchError unless a completion comes back with finite log-probabilities."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    choice = _complete(client, body)["choices"][0]
    values = choice["logprobs"]["token_logprobs"]
    if not values or not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
        raise LaunchError(Code.CANARY, "the engine's log-probabilities are not finite; the weights are damaged")
