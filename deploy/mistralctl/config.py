"""From flags, MISTRALCTL_* variables and mistralctl.yaml to one DeploymentSpec; every error names where the value stood."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mistralctl.errors import UserError, figure
from mistralctl.spec import DeploymentSpec, parse_images

FILE = "mistralctl.yaml"
LARGEST_FILE = 1 << 20
DEEPEST = 10
LIST_FIELDS = ("cloud", "vllm_args", "allow")
DURATIONS = ("idle", "ttl")
NUMBERS = ("max_price", "max_model_len", "max_concurrency", "tensor_parallel", "port")
FLAGS = {"vllm_args": "--vllm-arg", "model": "MODEL"}

# Variables that mistralctl reads for other purposes than an option of a deployment.
OTHER_VARIABLES = frozenset({"MISTRALCTL_HOME", "MISTRALCTL_OWNER", "MISTRALCTL_DEBUG", "MISTRALCTL_NODE_DIR"})


@dataclass(frozen=True)
class Sourced:
    """A checked spec, and for each field that was set the words by which an error names its place; for numbers also as they were typed."""

    spec: DeploymentSpec
    sources: Mapping[str, str]
    typed: Mapping[str, str] = dataclass_field(default_factory=dict)

    def place(self, field: str) -> str:
        """How an error names this field: `--region`, `MISTRALCTL_REGION`, `mistralctl.yaml: region`."""
        return self.sources.get(field, FLAGS.get(field, "--" + field.replace("_", "-")))

    def number(self, field: str) -> str:
        """A field's number as an error repeats it: as it was typed."""
        return self.typed.get(field) or figure(getattr(self.spec, field))


class _Whole(int):
    """A whole number of a file that shows itself as it stands there."""

    text: str

    @classmethod
    def typed(cls, value: int, text: str) -> _Whole:
        """A number, and what stands for it."""
        number = cls(value)
        number.text = text
        return number

    def __repr__(self) -> str:
        return self.text


class _Fraction(float):
    """A number of a file that shows itself as it stands there."""

    text: str

    @classmethod
    def typed(cls, value: float, text: str) -> _Fraction:
        """A number, and what stands for it."""
        number = cls(value)
        number.text = text
        return number

    def __repr__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes neither aliases nor duplicate keys: a file of options needs none."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="an alias (*) is not allowed here; write the value out",
                                       problem_mark=event.start_mark)  # fmt: skip
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem="nested too deeply; options are at most two levels deep",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
            if key_node.value == "<<":
                raise yaml.MarkedYAMLError(
                    problem="a merge key (<<) is not allowed here; write the values out",
                    problem_mark=key_node.start_mark,
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value!r} stands twice; keep one of them",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> _Whole:
    return _Whole.typed(loader.construct_yaml_int(node), str(node.value))


def _fraction(loader: _Loader, node: yaml.ScalarNode) -> _Fraction:
    return _Fraction.typed(loader.construct_yaml_float(node), str(node.value))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _fraction)

# No option is a date: 2026-01-01 is text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """The mapping in `text`; UserError with line and column for anything that is not a plain mapping."""
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with more refusals
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        tab = "a tab stands where YAML takes spaces only; write a space" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{path}{where}: {tab or error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML ({error}); save it as UTF-8 text") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: a value cannot be read ({error}); put quotes around it") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: should be a mapping of options (name: value), is a {_kind(data)}")
    for key in data:
        if not isinstance(key, str):
            raise UserError(f"{path}: the key {key!r} is not a word; put quotes around it or correct it")
    return data


def _kind(value: object) -> str:
    kinds = {bool: "true/false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}
    return next((word for kind, word in kinds.items() if isinstance(value, kind)), type(value).__name__)


def read_file(path: Path) -> dict[str, Any]:
    """The options in a file."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: larger than 1 MiB; that is not a file of options")
        return _understood(parse_yaml(path.read_text("utf-8-sig"), str(path)), path)
    except FileNotFoundError as error:
        raise UserError(f"-f: {path} does not exist; name an existing file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"-f: {path} cannot be read ({error}); name a readable UTF-8 file") from error


# Files of other programs, by keys that ours never has, and what they are.
OTHERS = (
    (("apiVersion", "kind"), "a Kubernetes manifest"),
    (("services",), "a Docker Compose file"),
    (("type", "commands"), "a dstack configuration"),
    (("type", "ide"), "a dstack configuration"),
    (("resources",), "a SkyPilot task"),
    (("run",), "a SkyPilot task"),
    (("setup",), "a SkyPilot task"),
    (("service",), "a SkyPilot task"),
    (("model_type",), "a model's config.json"),
)


def _understood(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of a file, with one word where a list is meant as a list of it, and numbers in quotes as numbers."""
    for keys, what in OTHERS:
        if all(key in data for key in keys):
            raise UserError(
                f"{path}: this is {what}; {FILE} holds options of mistralctl such as model, cloud and max_price, from which it makes "
                "the task itself (mistralctl up --dry-run shows it)"
            )
    found = dict(data)
    for key, value in data.items():
        if key in DURATIONS and isinstance(value, (_Whole, _Fraction)):
            found[key] = repr(value)  # YAML takes 12:30 for 750
        if not isinstance(value, str):
            continue
        if key == "vllm_args":
            found[key] = re.split(r"\s+(?=--)", value.strip())
        elif key in LIST_FIELDS:
            found[key] = [part.strip() for part in value.split(",")]
        elif key in NUMBERS and re.fullmatch(r"[0-9]{1,9}", value):
            found[key] = _Whole.typed(int(value), value)
        elif key in NUMBERS and re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", value):
            found[key] = _Fraction.typed(float(value), value)
    return found


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in environ.items():
        field = name.removeprefix("MISTRALCTL_").lower()
        if not name.startswith("MISTRALCTL_") or field not in DeploymentSpec.model_fields or value == "":
            continue
        if name in OTHER_VARIABLES:
            continue
        if field == "cloud":
            found[field] = [part.strip() for part in value.split(",")]
        elif field == "vllm_args":
            found[field] = _json(name, value, list, '["--seed=7"]')
        elif field == "image":
            try:
                found[field] = parse_images([part.strip() for part in value.split(",")])
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
        elif field == "lora":
            found[field] = _json(name, value, dict, '{"sql": "s3://bucket/sql"}')
        else:
            found[field] = value
    return found


def _json(name: str, value: str, kind: type, example: str) -> Any:
    try:
        data = json.loads(value)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, kind):
        raise UserError(f"{name}: should be JSON, for example {example}")
    return data


# What other programs call our options.
ELSEWHERE = {
    "use_spot": "spot", "ports": "port", "autostop": "idle", "max_hourly_cost": "max_price", "infra": "cloud", "gpu": "accelerators",
    "gpus": "accelerators", "any_of": "cloud", "lora_modules": "lora", "context_length": "max_model_len", "max_seq_len": "max_model_len",
    "max_num_seqs": "max_concurrency", "tensor_parallel_size": "tensor_parallel", "tp": "tensor_parallel", "extra_args": "vllm_args",
    "cidr": "allow", "adapters": "lora", "timeout": "ttl",
}  # fmt: skip


def _unknown(key: str) -> str:
    if ours := ELSEWHERE.get(key.replace("-", "_").lower()):
        return f"mistralctl calls it {ours}"
    near = difflib.get_close_matches(key.replace("-", "_").lower(), DeploymentSpec.model_fields, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(DeploymentSpec.model_fields)}"


def _given(layer: Any, path: Sequence[int | str], otherwise: object) -> object:
    """What stands at a place of a layer, with its numbers as they were typed."""
    for part in path:
        try:
            layer = layer[part]
        except (KeyError, IndexError, TypeError):
            return otherwise
    return layer


def _sentence(error: Mapping[str, Any], given: object) -> str:
    """pydantic's error about a value as one of ours: what is wrong, then what to do."""
    context, kind = error.get("ctx", {}), str(error["type"])
    shown = repr(given) if len(repr(given)) <= 80 else repr(given)[:77] + "..."
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        options = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        near = difflib.get_close_matches(str(given).lower(), options.split(", "), 1, 0.4)
        return f"{shown} is not one of {options}" + (f"; did you mean {near[0]}?" if near else "")
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        bound = next(iter(context.values()))
        words = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than",
                 "less_than_equal": "at most"}  # fmt: skip
        return f"{shown} is out of range; it must be {words[kind]} {figure(bound)}"
    if kind == "string_pattern_mismatch":
        return f"{shown} is misspelt; small letters, digits and hyphens, for example us-east-1"
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "str": "text",
              "tuple": "a list", "dict": "a mapping of names to URIs", "finite": "a number"}  # fmt: skip
    word = next((words for start, words in wanted.items() if kind.startswith(start)), None)
    if word:
        return f"should be {word}, is {_kind(given)} {shown}"
    return f"{shown}: {error['msg']}"


def _check(layer: Mapping[str, Any], place: dict[str, str], *, strict: bool) -> DeploymentSpec:
    try:
        if not strict:
            return DeploymentSpec.model_validate(dict(layer))
        # YAML has types, so a wrong one is an error; lists stand for tuples, whole numbers for numbers.
        return DeploymentSpec.model_validate_json(json.dumps(layer), strict=True)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] == "extra_forbidden")
        if first["type"] == "extra_forbidden":
            first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "?"
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])
        if first["type"] == "extra_forbidden":
            raise UserError(f"{place.get(key, key)}: unknown key {key!r}; {_unknown(key)}") from None
        raise UserError(
            f"{place.get(key, key)}{path}: {_sentence(first, _given(layer, first['loc'], first.get('input')))}"
        ) from None
    except (TypeError, ValueError, RecursionError):
        key = next((key for key, value in layer.items() if not _is_plain(value)), next(iter(layer)))
        raise UserError(f"{place.get(key, key)}: should be plain text, numbers or lists of them; put quotes around it") from None


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _set(spec: DeploymentSpec) -> Iterator[tuple[str, Any]]:
    for field in DeploymentSpec.model_fields:
        if field in spec.model_fields_set:
            yield field, getattr(spec, field)


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None, directory: Path = Path()) -> Sourced:
    """The spec that flags, then variables, then the file, then the defaults make together.

    `flags` holds only what was given on the command line. Without `file`, mistralctl.yaml in `directory` is read if it
    is there.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    typed: dict[str, str] = {}
    path = file or (directory / FILE if (directory / FILE).is_file() else None)
    from_file = read_file(path) if path else {}
    layers = (
        (from_file, {key: f"{path}: {key}" for key in from_file}, True),
        (_from_environ(environ), {f: f"MISTRALCTL_{f.upper()}" for f in DeploymentSpec.model_fields}, False),
        (flags, {f: FLAGS.get(f, "--" + f.replace("_", "-")) for f in DeploymentSpec.model_fields}, False),
    )
    for layer, place, strict in layers:
        for field, value in _set(_check(layer, place, strict=strict)) if layer else ():
            if value is None:
                continue
            values[field] = value
            sources[field] = place.get(field, field)
            typed.pop(field, None)
            if isinstance(layer[field], (str, _Whole, _Fraction)):
                typed[field] = layer[field] if isinstance(layer[field], str) else repr(layer[field])
    return Sourced(DeploymentSpec.model_validate(values), sources, typed)
