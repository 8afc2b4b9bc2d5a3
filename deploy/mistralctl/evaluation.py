"""Evaluation on this machine: the tool `mistral_evaluate` in an environment of its own, and what it found, in files.

The one module that imports the tool, of which it reads tables and types alone; lm-eval is only in that environment.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mistral_contract import files, untrusted
from mistral_contract.suggest import suggest

from mistralctl import node, own_files, package_dir, state
from mistralctl.errors import Exit, UserError
from mistralctl.tasks import digest

sys.path.insert(0, str(package_dir("model") / "evaluate"))

from mistral_evaluate.job import Address, Job
from mistral_evaluate.results import Value
from mistral_evaluate.suites import SUITES, TASKS

__all__ = ["SUITES", "Address", "Job", "Value"]

SCHEMA = 1
FOLDER, JOURNAL, LOG = "evaluations", "journal.jsonl", "eval.log"
# What of the user's environment a process of evaluation needs: a proxy has no place before a tunnel, and a key of another service none there.
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "TMPDIR",
    "UV_FIND_LINKS",
    "UV_INDEX_URL",
    "UV_DEFAULT_INDEX",
    "SSL_CERT_FILE",
    "XDG_CACHE_HOME",
)


@dataclass(frozen=True)
class Requests:
    """The requests of an evaluation: `all` that it has, those `asked` in this run, those `sent` and `refused` (429) meanwhile."""

    all: int
    asked: int
    sent: int
    refused: int


@dataclass(frozen=True)
class Evaluated:
    """What was found of a served model. `at` is in seconds since the epoch; `identity` is all that answers depend on besides their requests.

    `items` of each value stay in `file`.
    """

    schema: int
    name: str
    model: str
    suite: str
    limit: int | None
    at: float
    seconds: float
    harness: str
    identity: Mapping[str, Any]
    requests: Requests
    values: tuple[Value, ...]
    file: str = ""


@dataclass(frozen=True)
class Row:
    """A metric of two evaluations: `difference` is the second less the first, `sigmas` that in its standard errors, None where one is not known.

    `paired`: both were asked the same items, whose differences the standard error is of.
    """

    task: str
    metric: str
    n: int
    first: float
    second: float
    difference: float
    stderr: float | None
    sigmas: float | None
    paired: bool


def names(suite: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the tasks that were asked for; UserError if one is not known."""
    if suite not in SUITES:
        raise UserError(f"--suite: there is no suite {suite!r}; there are {', '.join(SUITES)}")
    for task in tasks:
        if task not in TASKS:
            near = suggest(task, TASKS)
            raise UserError(
                f"--tasks: there is no task {task!r}; {f'did you mean {near}?' if near else 'there are ' + ', '.join(TASKS)}"
            )
    return tuple(dict.fromkeys(tasks)) or SUITES[suite]


def _environment() -> Path:
    """Return where the environment of evaluation is, whether or not it was made already: named by what it is made from."""
    evaluate = package_dir("model") / "evaluate"
    made_from = [(evaluate / name).read_text("utf-8") for name in ("requirements.txt", "environment.sh")]
    return (
        node.local_dir() / files.ENVIRONMENTS.name / f"evaluate-{digest([node.local_python_version(), sys.version, *made_from])}"
    )


def _environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in PASSED_ON}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])  # uv is beside this Python
    if found := os.environ.get("PIP_FIND_LINKS"):
        kept.setdefault("UV_FIND_LINKS", found)
    return kept


def prepare(note: Callable[[str], None], log: Path) -> Path:
    """Return the Python of the environment of evaluation, which is made once; UserError if it cannot be."""
    folder = _environment()
    python = folder / "bin" / "python"
    if (folder / ".complete").exists():
        return python
    note("installing what evaluates into an environment of its own: once, 150 MB of downloads")
    script = package_dir("model") / "evaluate" / "environment.sh"
    with log.open("ab") as output:
        done = subprocess.run(
            ["bash", str(script), sys.executable, str(folder)], env=_environ(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"what evaluates cannot be installed ({_last(log)}); see {log}", Exit.MACHINE)
    return python


def _last(log: Path) -> str:
    """Return the last line of a log, of which libraries may have written the others."""
    lines = log.read_bytes()[-20000:].decode("utf-8", "replace").strip().splitlines()
    return untrusted.printable(lines[-1])[:600] if lines else "no reason was given"


def run(job: Job, python: Path, log: Path, heard: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Evaluate, and tell `heard` of the plan and of progress; the result as the tool tells it. UserError with the reason if it fails."""
    env = _environ() | {"PYTHONPATH": str(package_dir("model") / "evaluate"), "HF_HOME": str(job.journal.parent / "cache")}
    result: dict[str, Any] = {}
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [str(python), "-m", "mistral_evaluate"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdin is not None  # noqa: S101 - both are pipes
            assert process.stdout is not None  # noqa: S101
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(job.dump())
            for line in process.stdout:
                event = json.loads(line)
                result = event if event["event"] == "result" else result
                heard(event)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code or not result:
        raise UserError(_last(log), Exit.SERVER)
    return result


def evaluated(found: Mapping[str, Any], **more: Any) -> Evaluated:
    """Return what the tool tells as a result; `more` are the other fields."""
    values = tuple(
        Value(**(one | {"items": tuple((str(item), float(score)) for item, score in one["items"])})) for one in found["values"]
    )
    return Evaluated(SCHEMA, harness=str(found["harness"]), requests=Requests(**found["requests"]), values=values, **more)


def file_of(name: str, model: str) -> Path:
    """Return where the last evaluation of a served model of a deployment is kept."""
    return state.folder(name) / FOLDER / f"{model.replace('/', '--')}.json"


def keep(found: Evaluated) -> Evaluated:
    """Write an evaluation beside the record."""
    path = file_of(found.name, found.model)
    own_files.write(path, json.dumps(asdict(found), indent=1) + "\n")
    return replace(found, file=str(path))


def read(asked: str) -> Evaluated:
    """Return the evaluation that a name, NAME/MODEL or a file says; UserError if there is none, or it cannot be read."""
    path = Path(asked).expanduser()
    if not path.is_file():
        name, _, model = asked.partition("/")
        if not state.is_name(name) or (record := state.read(name)) is None:
            raise UserError(f"{asked}: there is neither a deployment nor a file of that name", Exit.NOT_FOUND)
        path = file_of(name, model or record.served_model_name)
        if not path.is_file():
            raise UserError(
                f"{asked} was not evaluated yet; run mistralctl eval {name}{f' --model {model}' if model else ''}", Exit.NOT_FOUND
            )
    from pydantic import TypeAdapter

    try:
        data = json.loads(untrusted.contents(path, own_files.LARGEST))
        if isinstance(data, dict) and type(data.get("schema")) is int and data["schema"] > SCHEMA:
            raise UserError(f"{path} was made by a newer version of mistralctl (schema {data['schema']}); upgrade", Exit.CONFLICT)
        known = {one.name: data[one.name] for one in fields(Evaluated) if one.name in data}
        return replace(TypeAdapter(Evaluated).validate_python(known), file=str(path))
    except (OSError, ValueError, TypeError, RecursionError, untrusted.NotRead) as error:
        raise UserError(f"{path} is no evaluation ({state.first_problem(error)}); name one that mistralctl eval wrote") from None


def compared(first: Evaluated, second: Evaluated) -> tuple[Row, ...]:
    """Return a row for each metric that both evaluations have.

    Of the same items the standard error is that of their differences, which is smaller than that of two independent values.
    """
    others = {(value.task, value.metric, value.version): value for value in second.values}
    pairs = [(one, other) for one in first.values if (other := others.get((one.task, one.metric, one.version))) is not None]
    return tuple(_row(one, other) for one, other in pairs)


def _row(one: Value, other: Value) -> Row:
    paired = bool(one.items) and [item for item, _ in one.items] == [item for item, _ in other.items]
    difference, stderr = other.value - one.value, None
    if paired and len(one.items) > 1:
        every = [b - a for (_, a), (_, b) in zip(one.items, other.items, strict=True)]
        mean = math.fsum(every) / len(every)
        stderr = math.sqrt(math.fsum((each - mean) ** 2 for each in every) / (len(every) - 1) / len(every))
    elif not paired and one.stderr is not None and other.stderr is not None:
        stderr = math.hypot(one.stderr, other.stderr)
    sigmas = 0.0 if not difference else difference / stderr if stderr else None
    return Row(one.task, one.metric, min(one.n, other.n), one.value, other.value, difference, stderr, sigmas, paired)
