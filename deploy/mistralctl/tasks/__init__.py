"""A task, whichever its kind: plain data that SkyPilot accepts whole, and what it is told apart by."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import yaml
from mistral_contract.envs import variable

from mistralctl import durations, package_dir
from mistralctl.clouds import buckets
from mistralctl.errors import Exit, UserError, figure

Task = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of task: what its file here is called, and so its template and `Record.kind`; `what` is one of it, for people.

    `serves`: it has an endpoint that answers.
    """

    name: str
    what: str
    serves: bool

    def require_endpoint(self, name: str) -> None:
        """UserError unless a task of this kind answers: for commands that ask it."""
        if not self.serves:
            raise UserError(
                f"{name} is {self.what}, so there is no endpoint to ask; mistralctl status {name} says how far it is",
                Exit.CONFLICT,
            )


def kinds() -> dict[str, Kind]:
    """Return every kind of task, by name: the files beside this one."""
    every = (import_module(f"{__name__}.{one.name}").KIND for one in iter_modules(__path__))
    return {kind.name: kind for kind in every}


def kind(name: str) -> Kind:
    """Return a kind by the name that a record has."""
    found: Kind = import_module(f"{__name__}.{name}").KIND
    return found


NODE_DIR = "~/.mistralctl"
NODE_PORT = 8000
NODE_PYTHON = "3.11"
# As long as the laptop waits for a launch (runtime/sky.py): 24 GB of environment and weights come within it at 7 MB/s.
SETUP_MINUTES = 60


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    node = dumper.represent_float(value)
    return dumper.represent_scalar(node.tag, figure(value)) if "e" in node.value else node


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)


def dump(task: Task) -> str:
    """The task as YAML: keys in the template's order, scripts as blocks."""
    return yaml.dump(task, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def digest(data: object, length: int = 12) -> str:
    """A short hash of plain data, the same wherever it is computed."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:length]


@cache
def tree(folder: Path) -> str:
    """A hash of all files below a folder, by their names and contents; hidden ones do not travel in a wheel."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(folder).parts):
            found.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def environment_id(device: str, python: str) -> str:
    """The name of the node's environment: what it is made from, hashed."""
    node = package_dir("model") / "node"
    script = (node / "environment.sh").read_text("utf-8")
    return f"{device}-{digest([python, script, tree(node / f'vllm-{device}')])}"


# What a node's set-up is made from; everything else is the server's alone.
_SETUP = ("node_dir", "env_id", "weights", "revision", "weights_id", "lora", "lora_versions", "keys_uri")


def env(task: Task, field: str) -> str:
    """Return the text of an env of a task, by its field in the contract; empty if the task has none."""
    return str(task.get("envs", {}).get(variable(field), ""))


def budget_minutes(task: Task) -> int | None:
    """Return how many whole minutes of its machine a task's budget buys; None without one."""
    budget, price = env(task, "budget"), env(task, "price")
    return math.floor(float(budget) / float(price) * 60) if budget and price else None


def what_ends(task: Task) -> str:
    """Return what ends a task's rented machine by itself, in words."""
    setup, idle, ttl, budget = (env(task, name) for name in ("setup_minutes", "idle_minutes", "ttl_minutes", "budget"))
    found = [
        setup and f"a set-up of {durations.text(int(setup))}",
        idle and f"{durations.text(int(idle))} without a request",
        ttl and f"{durations.text(int(ttl))} of life",
        budget and f"{float(budget):.2f} USD",
    ]
    return ", ".join(filter(None, found))


def setup_id(task: Task) -> str:
    """A hash of what the node's set-up is made from: with the same one, a changed server needs no new set-up."""
    endpoints = [task["envs"].get(bucket.variables[0], "") for bucket in buckets().values()]
    return digest([*(env(task, name) for name in _SETUP), *endpoints, tree(package_dir("model"))])


def serving_name(task: Task) -> str:
    """Return the name of a task's job on a rented machine: another server, another name."""
    serving_id = env(task, "serving_id")
    return f"{env(task, 'name')}-{serving_id}" if serving_id else str(task["name"])


def _label(task: Task, key: str) -> str:
    return str(task.get("resources", {}).get("labels", {}).get(f"mistralctl-{key}", ""))


def owner_label(task: Task) -> str:
    """Return the owner in the labels of a task's machine; empty for this machine."""
    return _label(task, "owner")


def resources_id(task: Task) -> str:
    """The hash, in the machine's labels, of what cannot change without another machine; empty for this machine."""
    return _label(task, "resources")
