"""`mistralctl receipt`: what was brought up, from what, where, how it was checked, and until when. Written by `up`, closed by `down`."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from mistral_contract import files, sets

import mistralctl
from mistralctl import own_files, reported, runtime, state, tasks
from mistralctl.errors import Exit, UserError
from mistralctl.phases import Phase
from mistralctl.runtime import facts
from mistralctl.state import Record
from mistralctl.tasks import env, finetune

SCHEMA = 1


@dataclass(frozen=True)
class WeightsFile:
    """A file of the weights, as the node checked it: size in bytes, checksums of the whole."""

    name: str
    size: int
    sha256: str
    blake3: str


@dataclass(frozen=True)
class Receipt:
    """A deployment. Times are in seconds since the epoch, `price` in USD an hour; None: not known, or not come yet.

    `flags` are those of `vllm serve`, `engine` is what the running engine said of itself, `task` is what was run, `node` what its
    machine said of itself when the server was ready (model/node/machine.py), `weights_digest` stands for all its files.
    `evaluations` are the files with what `eval` found, by served model. No secret is in it.
    """

    schema: int
    name: str
    cloud: str
    region: str
    machine: str
    spot: bool
    price: float | None
    model: str
    served_model_name: str
    up_at: float
    down_at: float | None
    versions: dict[str, str | None]
    weights: str
    revision: str
    files: tuple[WeightsFile, ...]
    flags: tuple[str, ...]
    engine: dict[str, Any] | None
    phases: tuple[dict[str, Any], ...]
    canary: dict[str, Any] | None
    gate: dict[str, Any] | None
    task: dict[str, Any]
    node: dict[str, Any] | None = None
    weights_digest: str = ""
    evaluations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingReceipt:
    """A run of fine-tuning that was published. Times are in seconds since the epoch, `price` in USD an hour, `usd` of the whole run.

    `result` is the receipt that lies beside what was published: options, losses, the proof in vLLM, libraries.
    """

    schema: int
    kind: str
    name: str
    cloud: str
    region: str
    machine: str
    spot: bool
    price: float | None
    usd: float | None
    model: str
    out: str
    up_at: float
    down_at: float | None
    phases: tuple[dict[str, Any], ...]
    result: dict[str, Any]
    task: dict[str, Any]


def path(name: str) -> Path:
    """Where a deployment's receipt lies."""
    return state.folder(name) / "receipt.json"


def _save(receipt: Receipt | TrainingReceipt) -> None:
    state.write_private(path(receipt.name), json.dumps(asdict(receipt), indent=1) + "\n")


def write_training(record: Record, result: dict[str, Any], run: Sequence[Phase], usd: float | None) -> None:
    """Write the receipt of a run of fine-tuning that was published: `result` is what lies beside it."""
    found = tuple(asdict(phase) for phase in run)
    _save(
        TrainingReceipt(
            SCHEMA, record.kind, record.name, record.cloud, record.region, record.machine, record.spot, record.price, usd, record.model,
            env(record.task, "out"), round(record.created_at, 1), None, found, result, record.task,
        )
    )  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(record: Record, file: str) -> str:
    """The text of a file of the node's folder; empty if it cannot be had, for which no `up` shall fail."""
    with suppress(UserError):
        return runtime.of(record.cloud).read(record, file)
    return ""


def _held(record: Record) -> tuple[WeightsFile, ...]:
    """The files of the weights by their manifest; empty if it cannot be had."""
    from pydantic import TypeAdapter

    manifest = _said(record, files.MANIFEST.path.replace("WEIGHTS_ID", env(record.task, "weights_id")))
    with suppress(ValueError):
        return TypeAdapter(tuple[WeightsFile, ...]).validate_json(json.dumps(reported.listed(manifest)), strict=True)
    return ()


def write(record: Record) -> Receipt:
    """The receipt of a deployment that is up, with what its node says of itself now; it is written."""
    launcher, held = reported.status(_said(record, files.STATUS.of(record.name))) or {}, _held(record)
    engine = launcher.get("engine") or {}
    versions = {
        "mistralctl": mistralctl.__version__, "skypilot": _version("skypilot") if "skypilot" in runtime.of(record.cloud).packages else None,
        "vllm": engine.get("vllm"), "torch": engine.get("torch"),
    }  # fmt: skip
    node = None
    with suppress(UserError):  # a receipt without it is better than none
        node = facts.read(record)
    receipt = Receipt(
        SCHEMA, record.name, record.cloud, record.region, record.machine, record.spot, record.price, record.model,
        record.served_model_name, round(time.time(), 1), None, versions, env(record.task, "weights"), env(record.task, "revision"),
        held, tuple(launcher.get("flags") or ()), engine or None, record.phases, launcher.get("canary"),
        record.gate or None, record.task, node, sets.digest(sets.File(one.name, one.size, one.sha256) for one in held) if held else "",
    )  # fmt: skip
    _save(receipt)
    return receipt


def _data(name: str) -> dict[str, Any] | None:
    """What a receipt holds, also of a newer version."""
    try:
        found = json.loads(own_files.read(path(name)))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path(name)} is damaged ({error}); delete it", Exit.CONFLICT) from error


Kind = TypeVar("Kind", Receipt, TrainingReceipt)


def _read(name: str, kind: type[Kind]) -> Kind | None:
    from pydantic import TypeAdapter

    if (data := _data(name)) is None:
        return None
    if type(data.get("schema")) is int and data["schema"] > SCHEMA:
        raise UserError(
            f"{path(name)} was made by a newer version of mistralctl (schema {data['schema']}); use that version, or upgrade",
            Exit.CONFLICT,
        )
    try:
        known = {field.name: data[field.name] for field in fields(kind) if field.name in data}
        return TypeAdapter(kind).validate_json(json.dumps(known, allow_nan=False), strict=True)
    except ValueError as error:
        raise UserError(f"{path(name)} is damaged ({state.first_problem(error)}); delete it", Exit.CONFLICT) from error


def _serving(name: str) -> Receipt | None:
    """The receipt of a server, with what its node said only as far as that is of the right types."""
    found = _read(name, Receipt)
    if found is None:
        return None
    node = None if found.node is None else reported.machine(found.node)
    return replace(found, node=node, gate=reported.gate(found.gate), canary=reported.canary(found.canary))


def canary(name: str) -> dict[str, Any]:
    """What the canary found when a deployment was brought up; empty if no receipt says so."""
    with suppress(UserError):
        found = _serving(name)
        return (found.canary if found else None) or {}
    return {}


def made_of(name: str) -> dict[str, Any]:
    """What the receipt of a server says of its weights and versions; empty if there is none that can be read."""
    with suppress(UserError):
        found = _serving(name)
        return {"weights_digest": found.weights_digest, "versions": found.versions} if found else {}
    return {}


def note_evaluation(name: str, model: str, file: str) -> None:
    """Name an evaluation in the receipt of a deployment, if it has one."""
    data = _data(name)
    if data is not None:
        named = data.get("evaluations")
        known = (named if isinstance(named, dict) else {}) | {model: file}
        state.write_private(path(name), json.dumps(data | {"evaluations": known}, indent=1) + "\n")


def close(name: str) -> None:
    """Notes the end of a deployment in its receipt, if it has an open one."""
    data = _data(name)
    if data is not None and data.get("down_at") is None:
        state.write_private(path(name), json.dumps(data | {"down_at": round(time.time(), 1)}, indent=1) + "\n")


def training(name: str) -> TrainingReceipt:
    """The receipt of a run of fine-tuning."""
    receipt = _read(name, TrainingReceipt)
    if receipt is None:
        raise UserError(
            f"{name} has published nothing yet, so it has no receipt; mistralctl status {name} says how far it is", Exit.NOT_FOUND
        )
    return receipt


def run(name: str) -> Receipt | TrainingReceipt:
    """The receipt of a deployment; it is kept after `down`, until the name is brought up again."""
    kind = state.known(name).kind
    if kind == finetune.KIND.name:
        return training(name)
    tasks.kind(kind).require_endpoint(name)
    receipt = _serving(name)
    if receipt is None:
        raise UserError(f"{name} was never brought up to its end, so it has no receipt; run {state.again(name)}", Exit.NOT_FOUND)
    return receipt
