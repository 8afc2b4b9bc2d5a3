"""`mistralctl eval`: what a deployment that serves is worth, by lm-eval's tasks; and two evaluations beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_contract.envs import Serve, value

from mistralctl import certificates, evaluation, own_files, state, training_data
from mistralctl.commands import env as clients
from mistralctl.commands import receipt
from mistralctl.errors import Exit, UserError
from mistralctl.evaluation import Address, Evaluated, Job, Row
from mistralctl.state import Record
from mistralctl.tasks import env

MOST_AT_ONCE = 64  # requests; more keep no server busier, and hold the rest of its users up


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated: a suite, or some tasks, whole or the first `limit` items of each, of a served model; empty: the deployment's own."""

    name: str
    suite: str = "quick"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    model: str = ""


@dataclass(frozen=True)
class Talk:
    """How `eval` speaks with the user: of what it is going to ask, of how far it is, of what else is worth a line."""

    on_plan: Callable[[Ahead], None]
    on_progress: Callable[[Progress], None]
    note: Callable[[str], None]


@dataclass(frozen=True)
class Ahead:
    """What an evaluation takes: its requests, those that had no answer, those `asked` since, and the time of the rest; None: not known yet.

    `usd` is what the machine costs in that time by the snapshot's price, None on this machine.
    """

    requests: int
    open: int
    asked: int
    left_seconds: float | None
    usd: float | None = None


@dataclass(frozen=True)
class Progress:
    """How many requests are answered, of how many, and the time of the rest; None: not known yet."""

    done: int
    of: int
    left_seconds: float | None


@dataclass(frozen=True)
class Compared:
    """Two evaluations beside each other; the names of their deployments and models, and a row for each metric that both have."""

    first: str
    second: str
    rows: tuple[Row, ...]


def run(asked: Asked, talk: Talk) -> Evaluated:
    """Evaluate a deployment that is up; what is found is kept beside its record. UserError for whatever is known to go wrong, first."""
    tasks = evaluation.names(asked.suite, asked.tasks)
    client = clients.run(asked.name)
    record = state.known(asked.name)
    model = asked.model or client.model
    folder = own_files.folder(state.folder(asked.name) / evaluation.FOLDER)
    job = Job(
        _address(record, client.api_key, model), _identity(record, model), _tokenizer(record),
        env(record.task, "tokenizer_mode"), int(env(record.task, "max_model_len")), min(MOST_AT_ONCE, int(env(record.task, "max_num_seqs"))),
        tasks, folder / evaluation.JOURNAL, asked.limit,
    )  # fmt: skip
    log = folder / evaluation.LOG
    own_files.begin_log(log)
    python = evaluation.prepare(talk.note, log)
    began = time.time()

    def heard(event: dict[str, Any]) -> None:
        if event["event"] == "plan":
            left = event["left_seconds"]
            usd = None if record.price is None or left is None else round(record.price * left / 3600, 3)
            talk.on_plan(Ahead(event["requests"], event["open"], event["asked"], left, usd))
        elif event["event"] == "progress":
            talk.on_progress(Progress(event["done"], event["of"], event["left_seconds"]))

    found = evaluation.evaluated(
        evaluation.run(job, python, log, heard), name=asked.name, model=model, suite="" if asked.tasks else asked.suite, limit=asked.limit,
        at=round(began, 1), seconds=round(time.time() - began, 1), identity=job.identity,
    )  # fmt: skip
    kept = evaluation.keep(found)
    receipt.note_evaluation(asked.name, model, kept.file)
    return replace(kept, values=tuple(replace(one, items=()) for one in kept.values))


def _address(record: Record, key: str, model: str) -> Address:
    if not record.public:
        return Address(f"http://127.0.0.1:{record.port}", key, model)
    return Address(f"https://{record.address}:{record.port}", key, model, str(certificates.server_file(record.name)), record.host)


def _tokenizer(record: Record) -> Path:
    place = training_data.Place(*(env(record.task, field) for field in ("weights", "revision", "weights_id")))
    folder = training_data.tokenizer_folder(place)
    if folder is None:
        raise UserError(
            f"the tokenizer of {record.model} is not here, and {place.weights.partition('#')[0]} does not give it now; mirror the weights to a "
            "bucket or folder that this machine may read (weights mirror)",
            Exit.WEIGHTS,
        )
    return folder


def _identity(record: Record, model: str) -> dict[str, Any]:
    """Return all that the model's answers depend on besides their requests; UserError if the deployment serves no such model.

    What is known by no digest and no commit is known by the start of this deployment alone.
    """
    envs = record.task.get("envs", {})
    adapters = value(Serve, "lora", envs)
    if model != record.served_model_name and model not in adapters:
        served = ", ".join((record.served_model_name, *adapters))
        raise UserError(f"--model: {record.name} serves no {model}; it serves {served}", Exit.NOT_FOUND)
    made = receipt.made_of(record.name)
    found: dict[str, Any] = {
        field: env(record.task, field)
        for field in ("weights", "revision", "device", "dtype", "quantization", "sliding_window", "tokenizer_mode", "engine")
    }
    found |= {
        "model": record.model,
        "weights_digest": record.weights_digest or made.get("weights_digest", ""),
        "versions": made.get("versions", {}),
    }
    pinned = bool(found["weights_digest"] or found["revision"])
    if model in adapters:
        version = value(Serve, "lora_versions", envs).get(model, "")
        found |= {"adapter": adapters[model], "adapter_version": version}
        pinned = pinned and bool(version)
    return found if pinned else found | {"up_at": record.created_at}


def compare(asked: Sequence[str]) -> Compared:
    """Return two evaluations beside each other; UserError unless two are named that have a metric in common."""
    if len(asked) != 2:
        raise UserError(f"--compare: takes two evaluations, each NAME, NAME/MODEL or a file, and not {len(asked)}")
    first, second = map(evaluation.read, asked)
    rows = evaluation.compared(first, second)
    if not rows:
        raise UserError(
            f"--compare: {asked[0]} and {asked[1]} have no task in common; evaluate both by the same suite", Exit.CONFLICT
        )
    return Compared(f"{first.name}/{first.model}", f"{second.name}/{second.model}", rows)
