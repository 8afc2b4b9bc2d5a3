"""The canary: before the launcher says ready, it asks the engine for log-probabilities that are known."""

from __future__ import annotations

import json
import os
import time
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mistral_contract import figures, files, sets, untrusted
from mistral_node.client import Client
from mistral_node.contract import Code, Contract, LaunchError
from mistral_node.weights import CONVERTED
from vllm_mistral.canary_prompt import CANARY_TOKENS, canary_prompt

SHIPPED = Path(__file__).parent / "canaries"  # the same figures and `weights_sha256`, the hash of the model's file
PROMPT = "The capital of France is"
# Prompts that a first engine is asked, and their length (None: longer than the window). A CPU takes a second for 320 tokens of a small model.
MADE_BY = {"cuda": (4, None), "cpu": (1, 320)}


@dataclass(frozen=True)
class Verdict:
    """What the canary found. `against` says where the figures come from, `weights` is the key of those that an engine made.

    `max_difference` is the largest of the forced tokens' log-probabilities (natural logarithm); None where nothing was compared.
    """

    state: Literal["verified", "made here", "not verified"]
    max_difference: float | None = None
    tolerance: float | None = None
    against: str = ""
    weights: str | None = None


def _complete(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    try:
        # The engine's own answer: it may have NaN, which is judged where figures are read.
        [choice] = json.loads(client.ask("/v1/completions", body, seconds=600))["choices"]
        return dict(choice)
    except urllib.error.HTTPError as error:
        raise LaunchError(Code.CANARY, f"the engine refused the check: {error.code} {error.read()[:300]!r}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LaunchError(Code.CANARY, f"the engine did not answer the check ({error})") from error


class NotFinite(LaunchError):
    """The engine said something else than a number, of tokens whose log-probabilities were asked for."""

    def __init__(self) -> None:
        super().__init__(Code.CANARY, "the engine's log-probabilities are not finite; the weights are damaged")


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list) or not values or not all(map(untrusted.finite, values)):
        raise NotFinite
    return [float(value) for value in values]


def forced_logprobs(client: Client, model: str, prompt: list[int], forced: list[int]) -> list[float]:
    """The engine's log-probabilities of `forced` behind `prompt`, token ids; NotFinite unless all are numbers."""
    body = {"model": model, "prompt": prompt + forced, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    entries: Any = _complete(client, body).get("prompt_logprobs")
    try:
        return _numbers([entries[len(prompt) + i][str(token)]["logprob"] for i, token in enumerate(forced)])
    except (LookupError, TypeError) as error:
        raise LaunchError(Code.CANARY, f"the engine did not say the log-probabilities of its prompt ({error!r})") from error


def _manifest(folder: Path) -> list[tuple[str, str]]:
    """Name and sha256 of each file of a set of weights, by its manifest; empty without one. LaunchError for one that is damaged."""
    try:
        named = sets.read(folder.with_name(folder.name.removesuffix(CONVERTED)))
    except sets.Wrong as wrong:
        raise LaunchError(Code.WEIGHTS, f"{wrong}; pull the weights again") from None
    return [(file.name, file.sha256) for file in named or ()]


def stored_figures(folder: Path) -> dict[str, Any] | None:
    """What the reference computed of these weights: stored with them, or else in this package; None if nothing is.

    LaunchError if it is not what `reference --canary` writes.
    """
    path = folder / figures.FILE
    try:
        if path.exists():
            return figures.read(untrusted.contents(path, untrusted.MOST_BYTES))
    except (OSError, ValueError) as error:
        again = "pull the weights again, or, if it is so where they come from, publish them without that file"
        raise LaunchError(Code.CANARY, f"{path} is damaged ({error}); {again}") from error
    hashes = {sha256 for _, sha256 in _manifest(folder)}
    shipped = (figures.read(path.read_text("utf-8")) for path in sorted(SHIPPED.glob("*.json")))
    return next((one for one in shipped if one["weights_sha256"] in hashes), None)


def known_figures(node_dir: Path, key: str, sent: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the first engine with these weights computed: as the laptop sent it, or else as this node kept it."""
    path = node_dir / files.CANARIES.name / f"{key}.json"
    try:
        for one in sent:
            if one.get("weights") == key:
                return figures.read(json.dumps(one), key)
        return figures.read(untrusted.contents(path, untrusted.MOST_BYTES), key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        message = f"the figures {path}, or the laptop's of that name, are damaged ({error}); delete them, and they are made again"
        raise LaunchError(Code.CANARY, message) from error


def compare(client: Client, model: str, stored: dict[str, Any] | None, dtype: str, max_model_len: int) -> Verdict:
    """The verdict on the running engine; LaunchError if it computes something else than the figures.

    Not verified without figures, or where their prompt is longer than what this deployment takes.
    """
    if stored is None or len(stored["prompt_token_ids"]) + len(stored["forced_token_ids"]) >= max_model_len:
        return Verdict("not verified")
    got = forced_logprobs(client, model, stored["prompt_token_ids"], stored["forced_token_ids"])
    against, allowed, key = str(stored.get("source", "")), figures.tolerance(stored, dtype), stored.get("weights")
    difference = _difference(got, stored["logprobs"])
    if not difference <= allowed:
        what, why = "what the weights say", "the weights, the window or the rotary base are not those of the model"
        if key:
            file = f"{files.CANARIES.name}/{key}.json"
            what, why = "what the first engine with these weights did", f"one of the two is wrong; if it was the first, delete {file} " \
                "in the node's folder and in the laptop's MISTRALCTL_HOME, and the next start makes them anew"  # fmt: skip
        raise LaunchError(
            Code.CANARY,
            f"the engine does not compute {what}: a log-probability differs by {difference:.3f}, {allowed:g} is allowed (figures: "
            f"{against or 'without a source'}); {why}",
        )
    return Verdict("verified", round(difference, 6), allowed, against, key)


def _difference(got: list[float], expected: list[float]) -> float:
    try:
        return figures.difference(got, expected)
    except ValueError:
        raise NotFinite from None


def _said(choice: Mapping[str, Any]) -> list[float]:
    """The log-probabilities of what the engine generated; NotFinite unless all are numbers."""
    logprobs = choice.get("logprobs")
    return _numbers(logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None)


def make(client: Client, wanted: Contract, facts: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Figures by the running engine, the first with these weights; None where window, context or vocabulary are too small for them.

    Of its prompts the one whose answer is the most certain is taken: rounding moves log p by (1 - p) of what it moves the logit. What the engine
    said while it generated has to be what it says of the same tokens in a prompt; LaunchError if not.
    """
    count, length = MADE_BY[wanted.device]
    best: tuple[list[int], list[int], list[float]] | None = None
    for seed in range(count):
        try:
            prompt = canary_prompt(facts["sliding_window"], wanted.max_model_len - 1, facts["vocabulary"], seed, length)
        except ValueError:
            return None
        asked = {"max_tokens": CANARY_TOKENS, "temperature": 0, "logprobs": 0, "ignore_eos": True, "return_token_ids": True}
        choice = _complete(client, {"model": wanted.served_name, "prompt": prompt, **asked})
        said = _said(choice)
        if best is None or sum(said) > sum(best[2]):
            best = prompt, list(choice.get("token_ids") or ()), said
    assert best is not None  # noqa: S101
    prompt, forced, said = best
    logprobs = forced_logprobs(client, wanted.served_name, prompt, forced)
    dtype = facts["dtype"]
    difference, allowed = _difference(logprobs, said), 2 * figures.TOLERANCE.get(dtype, figures.TOLERANCE["bfloat16"])
    if not difference <= allowed:
        raise LaunchError(
            Code.CANARY,
            f"the engine contradicts itself: what it generates behind its cache differs by {difference:.3f} from the same tokens in a "
            f"prompt, {allowed:g} is allowed; the kernels of this machine compute something wrong",
        )
    at = time.strftime("%Y-%m-%d", time.gmtime())
    program = facts.get("program") or f"vLLM {facts['vllm']}"
    how = ", ".join(part for part in (program, dtype, wanted.quantization) if part)
    return {
        "schema": 1, "prompt_token_ids": prompt, "forced_token_ids": forced, "logprobs": [min(0.0, value) for value in logprobs],
        "dtype": dtype, "sliding_window": facts["sliding_window"], "source": f"made on {facts['device']} by {how}, {at}",
        "weights": key, "model": wanted.model,
    }  # fmt: skip


def keep(node_dir: Path, made: dict[str, Any]) -> None:
    """Keeps figures on this node for its later starts; the laptop takes a copy."""
    path = node_dir / files.CANARIES.name / f"{made['weights']}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        text = json.dumps(made) + "\n"
        figures.read(text, made["weights"])
        path.parent.mkdir(exist_ok=True)
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise LaunchError(Code.CANARY, f"the engine's figures cannot be kept in {path} ({error})") from error


def check(client: Client, wanted: Contract, folder: Path, facts: dict[str, Any], sent: list[dict[str, Any]]) -> Verdict:
    """The verdict on the running engine, against what is known of these weights; without anything known it is the first, and its own
    figures are kept for the next. The reference's figures are not of weights that are quantized while they are loaded.
    """
    found = None if wanted.quantization else stored_figures(folder)
    if found is None and (files := _manifest(folder)):
        key = figures.key(files, wanted.quantization or "")
        found = known_figures(wanted.node_dir, key, sent)
        if found is None and (made := make(client, wanted, facts, key)) is not None:
            keep(wanted.node_dir, made)
            return Verdict("made here", against=made["source"], weights=key)
    return compare(client, wanted.served_name, found, facts["dtype"], wanted.max_model_len)


def answers(client: Client, model: str) -> None:
    """LaunchError unless a completion comes back with finite log-probabilities."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    _said(_complete(client, body))
