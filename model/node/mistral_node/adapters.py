"""The adapters on the node: judged before vLLM starts, asked before the launcher says ready."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mistral_contract import adapters, figures, untrusted
from mistral_contract.adapters import Adapter
from mistral_node import log, weights
from mistral_node.canary import NotFinite, forced_logprobs
from mistral_node.client import Client
from mistral_node.contract import Code, Contract, LaunchError

ASKED = list(range(3, 35))  # token ids that every vocabulary has


@dataclass(frozen=True)
class Answer:
    """`max_difference` is the largest that the adapter makes to a log-probability (natural logarithm); 0 for one of zeros."""

    state: Literal["answers", "changes nothing"]
    max_difference: float


def judged(wanted: Contract, model_dir: Path) -> dict[str, Adapter]:
    """The adapters by name; LaunchError, naming it, if one cannot be served with the model in `model_dir`."""
    found: dict[str, Adapter] = {}
    place = f"the configuration in {model_dir}"
    try:
        base = adapters.base_of(model_dir) if wanted.adapters else None
        for name, folder in wanted.adapters:
            place = f"the adapter {name}"
            weights.check_named(folder)
            found[name] = adapters.read(folder, base)
    except ValueError as error:
        raise LaunchError(Code.WEIGHTS, f"{place}: {error}") from None
    return found


def check(client: Client, wanted: Contract, found: dict[str, Adapter]) -> dict[str, Answer]:
    """What each adapter makes of a prompt; LaunchError if one answers like the model alone, although its tensors are not zero.

    vLLM loads an adapter whose tensors belong to none of its layers, and then serves the model without it.
    """
    ids = ASKED[: wanted.max_model_len - 1]

    def ask(model: str) -> list[float]:
        return forced_logprobs(client, model, ids[:1], ids[1:])

    answers: dict[str, Answer] = {}
    if not found:
        return answers
    bare = ask(wanted.served_name)
    noise = figures.difference(bare, ask(wanted.served_name))
    for name, folder in wanted.adapters:
        try:
            difference = figures.difference(ask(name), bare)
        except NotFinite:
            raise LaunchError(
                Code.CANARY, f"the adapter {name} makes log-probabilities that are not finite; its tensors are damaged"
            ) from None
        _as_proven(client, wanted, name, folder)
        if difference > noise:
            answers[name] = Answer("answers", round(difference, 6))
        elif adapters.changes_nothing(folder, found[name]):
            answers[name] = Answer("changes nothing", 0.0)
        else:
            raise LaunchError(
                Code.CANARY,
                f"the adapter {name} answers exactly like the model without it, although its tensors are not zero; it was trained for "
                "another model, or not at all",
            )
    return answers


def _as_proven(client: Client, wanted: Contract, name: str, folder: Path) -> None:
    """LaunchError if the engine computes something else with an adapter than what lies beside it says: a canary, as training publishes it.

    Nothing is compared without one, where its prompt is longer than this deployment takes, and where weights are quantized while they are loaded.
    """
    try:
        stored = figures.read(untrusted.contents(folder / figures.FILE, untrusted.MOST_BYTES))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise LaunchError(
            Code.CANARY, f"the adapter {name}: its {figures.FILE} is damaged ({error}); copy the adapter again"
        ) from None
    prompt, forced = stored["prompt_token_ids"], stored["forced_token_ids"]
    if wanted.quantization or len(prompt) + len(forced) >= wanted.max_model_len:
        return
    difference = figures.difference(forced_logprobs(client, name, prompt, forced), stored["logprobs"])
    allowed = figures.tolerance(stored, wanted.dtype)
    if not difference <= allowed:
        raise LaunchError(
            Code.CANARY,
            f"the adapter {name} does not compute what it did when it was published: a log-probability differs by {difference:.3f}, {allowed:g} "
            f"is allowed ({stored.get('source') or 'without a source'}); it belongs to another base model or revision, or its files were mixed",
        )
    log.line(f"the adapter {name} computes what it did when it was published: {difference:.2g} ({allowed:g} is allowed)")
