"""What is published: the adapter with its base's name, a canary, a card, a receipt and the curves; merged weights where they are wanted."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mistral_contract import figures as canary
from mistral_node import weights
from mistral_weights.seal import seal, sealed

from mistral_tune import figures, job, log, prove
from mistral_tune.checkpoints import Checkpoints
from mistral_tune.errors import TuneError
from mistral_tune.job import Job
from mistral_tune.store import Store
from mistral_tune.training_files import HISTORY

ADAPTER = "adapter_config.json"
# What a server reads beside weights, which training does not change.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model*", "tekken.json", "chat_template.*", "vocab.json",
    "merges.txt", "added_tokens.json", "generation_config.json", "LICENSE*",
)  # fmt: skip


def publish(run: Job) -> None:
    """Put what was proven to its address, manifest last; then take the checkpoints away. TuneError if it was not proven."""
    store = Store.of(run)
    folder = brought(run) or run.result
    if folder != run.result or store.look(run.wanted.out)[0] == run.identity:
        log.line(f"{run.wanted.out} holds this run already")
    else:
        folder = prepared(run)
        found = store.ask("push", folder, run.wanted.out)
        log.line(f"{run.wanted.out} holds {len(found['files'])} files, {found['bytes']} bytes")
    whole, revision = f"{run.wanted.out.rstrip('/')}/merged", _revision(folder)
    if run.wanted.merge and run.wanted.method != "full" and store.look(whole)[0] != revision:
        merged = _merged(run, folder, revision)
        store.ask("push", merged, whole)
        shutil.rmtree(merged)
    Checkpoints(run, store).clear()
    run.begun.unlink(missing_ok=True)


def brought(run: Job) -> Path | None:
    """Return the sealed folder of this run that lies at the address already, brought here, if another machine has trained it.

    None if it is not there, if it is to be trained again, or if this machine has a result of its own.
    """
    if run.wanted.restart or run.result.exists():
        return None
    folder, store = run.folder / "published", Store.of(run)
    if not store.look(run.wanted.out)[0].startswith(f"{run.wanted.run_id}-"):
        return None
    store.ask("pull", run.wanted.out, folder, "--format", "folder")
    return folder


def _revision(folder: Path) -> str:
    done = sealed(folder)
    if done is None:
        raise TuneError(f"{folder} is not whole; run train first")
    return done.manifest.revision


def prepared(run: Job) -> Path:
    """Return the sealed folder that is published; TuneError without a whole result and its proof."""
    done = sealed(run.result)
    if done is None or done.manifest.revision != run.identity:
        raise TuneError(f"{run.result} holds no whole result of this run; run train first")
    proof, figured = prove.read(run), figures.read(run)
    folder = run.folder / "published"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in done.manifest.files:
        if file.name != HISTORY:
            shutil.copy(run.result / file.name, folder)
    if run.wanted.method == "full":
        _beside(run, folder)
    else:
        _name_base(folder / ADAPTER, run)
    (folder / canary.FILE).write_text(json.dumps(_canary(run, figured)) + "\n", "utf-8")
    history = json.loads((run.result / HISTORY).read_text("utf-8"))
    told = receipt(run, proof, history)
    (folder / "receipt.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "README.md").write_text(card(run, told), "utf-8")
    _picture(folder / "loss.png", history)
    _events(folder / "tensorboard", history)
    seal(folder, run.wanted.out, run.identity)
    return folder


def _name_base(path: Path, run: Job) -> None:
    """Write into an adapter's configuration which model it belongs to, by its name and commit on the hub."""
    config = json.loads(path.read_text("utf-8"))
    config |= {"base_model_name_or_path": run.wanted.base, "revision": run.wanted.base_revision or None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _beside(run: Job, folder: Path) -> None:
    for pattern in BESIDE:
        for path in weights.model_dir(run.weights).glob(pattern):
            shutil.copy(path, folder)


def _canary(run: Job, found: figures.Figures) -> dict[str, Any]:
    """Return the canary's figures: of the held-out answer that the training changed most."""
    chosen = max(found.asked, key=lambda one: max(abs(a - b) for a, b in zip(one.after, one.before, strict=True)))
    # `weights` says that a computation which rounds made them, so that both roundings are allowed for.
    return {
        "schema": 1, "prompt_token_ids": list(chosen.prompt), "forced_token_ids": list(chosen.answer), "logprobs": list(chosen.after),
        "dtype": found.dtype, "sliding_window": run.wanted.sliding_window, "source": f"peft, of the run {run.identity}",
        "weights": run.identity, "model": run.wanted.model,
    }  # fmt: skip


def receipt(run: Job, proof: prove.Proof, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was done, in numbers: options, losses, proof, samples."""
    wanted = run.wanted
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "version": 1, "run": run.identity, "name": wanted.name, "model": wanted.model, "base": wanted.base, "base_revision": wanted.base_revision,
        "method": wanted.method, "rank": wanted.rank if wanted.method != "full" else None, "epochs": wanted.epochs, "steps": len(losses),
        "learning_rate": wanted.learning_rate, "batch_tokens": wanted.batch_tokens, "max_length": wanted.max_length,
        "sliding_window": wanted.sliding_window, "dtype": wanted.dtype, "seed": wanted.seed, "processes": wanted.gpus, "device": wanted.device,
        "libraries": job.libraries() | {"vllm": proof.vllm},
        "loss": {"first": losses[0], "last": losses[-1], "held_out": held_out[-1] if held_out else None} if losses else {},
        "proof": asdict(proof), "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def card(run: Job, told: dict[str, Any]) -> str:
    """Return the card: what this is, how it was made, what it says before and after."""
    wanted, proof = run.wanted, told["proof"]
    base = wanted.base + (f" at {wanted.base_revision}" if wanted.base_revision else "")
    what = "The weights" if wanted.method == "full" else "A LoRA adapter"
    lines = [
        "---", f"base_model: {json.dumps(wanted.base)}", f"library_name: {'transformers' if wanted.method == 'full' else 'peft'}",
        "pipeline_tag: text-generation", "---", "", f"# {wanted.name}", "",
        f"{what} of {base}, trained with {wanted.method} for {wanted.epochs} epochs ({told['steps']} steps) at a learning rate of at most "
        f"{wanted.learning_rate:g}.", "",
        f"Before it was published, vLLM {proof['vllm']} computed the held-out answers: its log-probabilities and peft's differ by at most "
        f"{proof['difference']:.2g} ({proof['tolerance']:g} is allowed). The training raised the log-probability of a held-out token by "
        f"{proof['gain']:.2f} in the mean.", "",
    ]  # fmt: skip
    if proof["seen"]:
        lines += ["The chats were too few to hold any out: the answers below were learnt.", ""]
    lines += ["| question | before | after |", "|---|---|---|"]
    for sample in proof["samples"]:
        lines.append("| " + " | ".join(_cell(sample[name]) for name in ("question", "before", "after")) + " |")
    return "\n".join([*lines, "", "![Loss](loss.png)", ""])


def _cell(text: str) -> str:
    found = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return found if len(found) <= 300 else found[:300] + "..."


def _points(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
    return [step for step, _ in found], [value for _, value in found]


def _picture(path: Path, history: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*_points(history, "loss"), label="chats that are learnt", linewidth=1)
    axes.plot(*_points(history, "eval_loss"), label="chats that are held out", marker="o")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def _events(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write TensorBoard's files of all steps, those before a kill, too."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for entry in history:
            for name, value in entry.items():
                if name not in ("step", "epoch") and isinstance(value, int | float):
                    writer.add_scalar(name, value, entry["step"])


def _merged(run: Job, adapter: Path, revision: str) -> Path:
    """Return a sealed folder with the weights that an adapter makes of the base, merged in float32 and written in the base's dtype."""
    import torch

    from mistral_tune import model

    base = model.base_folder(run)
    folder = run.folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    merged = model.with_adapter(model.load(base, run.wanted.sliding_window, torch.float32, "cpu"), adapter).merge_and_unload()
    merged.to(model.DTYPES[run.wanted.dtype]).save_pretrained(folder)
    _beside(run, folder)
    seal(folder, run.wanted.out, revision)
    return folder
