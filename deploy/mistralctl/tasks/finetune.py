"""From the plan of a run of fine-tuning to its task: the template with only data set on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mistral_contract import envs, files
from mistral_contract.envs import Finetune

from mistralctl import images, package_dir
from mistralctl.clouds import facts
from mistralctl.errors import UserError
from mistralctl.fit import disk_bytes
from mistralctl.gpus import GIB
from mistralctl.plan import SMALLEST_CPU_NODE
from mistralctl.tasks import NODE_DIR, NODE_PYTHON, SETUP_MINUTES, Kind, Task, digest, environment_id, tree
from mistralctl.training import DISK_BASE_GIB, Run

KIND = Kind("finetune", "a run of fine-tuning", serves=False)
CHATS, HELD_OUT = "chats", "held-out"  # names of files that go with the task, less their endings
# On a disk beside the weights: of all weights three checkpoints with their optimizer, of an adapter the merged weights.
FULL_COPIES, MERGED_COPIES = 3 * 12 / 2 + 2, 2


@dataclass(frozen=True)
class Node:
    """Where a run lies on its machine: the node's folder, and the Python of vLLM's environment."""

    folder: str = NODE_DIR
    python: str = NODE_PYTHON


RENTED = Node()


def tune_environment_id(device: str, python: str) -> str:
    """The name of the environment that trains: what it is made from, hashed."""
    tune = package_dir("model") / "tune"
    made_from = [(tune / name).read_text("utf-8") for name in ("requirements.txt", "environment.sh")]
    return f"tune-{digest([environment_id(device, python), *made_from])}"


def _resources(run: Run) -> dict[str, Any]:
    spec, shape = run.spec, run.model.shape
    entries: list[dict[str, Any]] = []
    for option in run.options:
        entry: dict[str, Any] = {"infra": "/".join(part for part in (option.cloud, spec.region) if part)}
        if option.accelerator:
            entry["accelerators"] = f"{option.accelerator}:{option.count}"
        else:
            entry |= {"cpus": f"{SMALLEST_CPU_NODE[0]}+", "memory": f"{SMALLEST_CPU_NODE[1]}+"}
        if image := images.asked_for(option.cloud, option.accelerator, None):
            entry["image_id"] = image
        if option.accelerator and (tier := facts(option.cloud).disk_tier):
            entry["disk_tier"] = tier
        if entry not in entries:
            entries.append(entry)
    found: dict[str, Any] = dict(entries[0]) if len(entries) == 1 else {"ordered": entries}
    copies = 1 + (FULL_COPIES if spec.method == "full" else MERGED_COPIES if spec.merge else 0)
    weights = disk_bytes(shape, run.model.stored) / GIB if shape else 32
    found["disk_size"] = DISK_BASE_GIB + round(weights * (1 + copies))
    if spec.spot:
        found["use_spot"] = True
    if spec.max_price is not None:
        found["max_hourly_cost"] = spec.max_price
    found["autostop"] = {"idle_minutes": 5, "down": True, "wait_for": "jobs"}
    return found


def _chats(run: Run, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """(values of the contract by field, file mounts): a file of this machine goes with the task, under a name of its own."""
    values, mounts = {"data": run.data, "eval_data": run.eval_data}, {}
    for name, title in (("data", CHATS), ("eval_data", HELD_OUT)):
        value = values[name]
        if value and "://" not in value:
            values[name] = f"{title}{Path(value).suffix or '.jsonl'}"
            mounts[f"{folder}/{files.DATA.of(run.name)}/{values[name]}"] = value
    return values, mounts


def run_id(run: Run) -> str:
    """A hash of what the result of a run depends on, as far as this machine knows it."""
    spec, base = run.spec, run.base
    return digest(
        [
            run.weights, run.revision, *base, run.contents or [run.data, run.eval_data], run.model.tokenizer_mode, spec.method, spec.epochs,
            spec.rank, run.learning_rate, run.batch_tokens, spec.seed, spec.max_length, run.chosen.count, run.device,
        ]
    )  # fmt: skip


def render(run: Run, *, owner: str, node: Node = RENTED, restart: bool = False) -> Task:
    """The task of a run: plain data that SkyPilot accepts whole, and that the local runtime runs as well. No secret is in it."""
    task: Task = yaml.safe_load((package_dir("task_templates") / "finetune.yaml").read_text("utf-8"))
    spec, model = run.spec, run.model
    values, mounts = _chats(run, node.folder)
    repository, commit = run.base
    wanted = {} if run.local else _resources(run)
    labels = {} if run.local else {
        "labels": {
            "mistralctl-name": run.name,
            "mistralctl-owner": owner,
            "mistralctl-resources": digest(wanted),
            "mistralctl-ttl": "never" if run.life_minutes is None else str(run.life_minutes),
        }
    }  # fmt: skip
    if run.price is not None:
        wanted["max_hourly_cost"] = run.price
    told = Finetune(
        name=run.name,
        node_dir=Path(node.folder),
        device=run.device,
        python=node.python,
        env_id=environment_id(run.device, node.python),
        tune_env_id=tune_environment_id(run.device, node.python),
        gpus=max(1, run.chosen.count),
        model=model.name,
        base=repository,
        base_revision=commit,
        weights=run.weights,
        revision=run.revision,
        weights_id=run.weights_id,
        sliding_window=model.shape.sliding_window if model.shape else None,
        dtype=run.dtype,
        tokenizer_mode=model.tokenizer_mode,
        data=values["data"],
        eval_data=values["eval_data"],
        out=run.out,
        method=spec.method,
        epochs=spec.epochs,
        max_length=run.max_length,
        rank=spec.rank,
        learning_rate=run.learning_rate,
        batch_tokens=run.batch_tokens,
        seed=spec.seed,
        save_minutes=run.save_minutes,
        merge=spec.merge,
        restart=restart,
        run_id=run_id(run),
        secrets=("hf_token",) if run.secret else (),
        ttl_minutes=run.ttl_minutes,
        setup_minutes=None if run.local else SETUP_MINUTES,
        budget=spec.budget,
        price=run.price,
    )
    try:
        task["envs"] = {**envs.write(told), **run.endpoints}
    except ValueError as error:
        raise UserError(f"{run.name}: the machine would refuse {error}; change the option that it comes from") from error
    task["name"] = run.name
    task["resources"] = wanted | labels
    task["file_mounts"] = {f"{node.folder}/{files.MODEL.of(run.name)}": str(package_dir("model")), **mounts}
    return task


def sources(run: Run) -> str:
    """A hash of what runs on the machine: with another one a run that is at work there is another."""
    return digest([run_id(run), tree(package_dir("model"))])
