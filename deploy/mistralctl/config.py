"""From flags, MISTRALCTL_* variables and a file to one checked spec; every error names where the value stood."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, Generic

import yaml
from mistral_contract.suggest import suggest
from mistral_contract.untrusted import line
from pydantic import BaseModel, ValidationError
from typing_extensions import TypeVar

from mistralctl.errors import UserError, figure
from mistralctl.fields import FALSE, TRUE, SpecField, fields
from mistralctl.spec import DeploymentSpec

FILE = "mistralctl.yaml"
LARGEST_FILE = 1 << 20
DEEPEST = 10
Spec = TypeVar("Spec", bound=BaseModel, default=DeploymentSpec)
Held = TypeVar("Held", bound=BaseModel, default=DeploymentSpec, covariant=True)


@dataclass(frozen=True)
class Sourced(Generic[Held]):
    """A checked spec, and for each field that was set the words by which an error names its place; for numbers also as they were typed."""

    spec: Held
    sources: Mapping[str, str]
    typed: Mapping[str, str] = dataclass_field(default_factory=dict)

    def place(self, field: str) -> str:
        """How an error names this field: `--region`, `MISTRALCTL_REGION`, `mistralctl.yaml:2: region`."""
        return self.sources.get(field) or fields(type(self.spec))[field].flag

    def number(self, field: str) -> str:
        """A field's number as an error repeats it: as it was typed."""
        return self.typed.get(field) or figure(getattr(self.spec, field))


@dataclass(frozen=True)
class Scalar:
    """One value as it was written, and what YAML makes of it (of a flag or a variable: text); `line` is 0 outside a file."""

    text: str
    value: Any
    line: int = 0

    def __repr__(self) -> str:
        number = not isinstance(self.value, str) or (self.line and NUMBER.fullmatch(self.text))
        return self.text if number else repr(self.text)


NUMBER = re.compile(r"[+-]?[0-9][0-9_]*(\.[0-9_]*)?([eE][+-]?[0-9]+)?")
WHOLE = re.compile(r"[+-]?[0-9][0-9_]{0,30}|0x[0-9a-fA-F]{1,16}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes neither aliases nor deep nests: a file of options needs none."""

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


# No option is a date: 2026-01-01 is text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _tree(loader: _Loader, node: yaml.Node) -> Any:
    """A node as mappings, lists and scalars."""
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        found: dict[str, Any] = {}
        for key, value in node.value:
            if wrong := _wrong_key(key, found):
                raise yaml.MarkedYAMLError(problem=wrong, problem_mark=key.start_mark)
            found[key.value] = _tree(loader, value)
        return found
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_tree(loader, item) for item in node.value]
    try:
        value = loader.construct_object(node, deep=True)
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):  # PyYAML's, of a tag that the text is none of
        value = node.value
    return Scalar(str(node.value), value, node.start_mark.line + 1)


def _wrong_key(key: yaml.Node, before: Iterable[str]) -> str | None:
    """What is wrong with a key, after those before it."""
    if not isinstance(key, yaml.ScalarNode):
        return "a key must be a plain word"
    if key.value == "<<":
        return "a merge key (<<) is not allowed here; write the values out"
    return f"the key {key.value!r} stands twice; keep one of them" if key.value in before else None


def _parsed(text: str, path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in `text`, and the line of each of its keys; UserError with line and column for anything else."""
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = {} if node is None else _tree(loader, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        tab = "a tab stands where YAML takes spaces only; write a space" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{path}{where}: {tab or error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML ({error}); save it as UTF-8 text") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: a value cannot be read ({error}); put quotes around it") from error
    finally:
        loader.dispose()
    if isinstance(data, Scalar) and data.value is None:
        return {}, {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: should be a mapping of options (name: value), is a {_kind(data)}")
    for key, _ in node.value if node else ():
        if key.tag != "tag:yaml.org,2002:str":
            line = key.start_mark.line + 1
            raise UserError(f"{path}:{line}: the key {key.value} is not a word; put quotes around it or correct it")
    return data, {key.value: key.start_mark.line + 1 for key, _ in node.value} if node else {}


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """The mapping in `text`, of `Scalar`s; UserError with line and column for anything that is not a plain mapping."""
    return _parsed(text, path)[0]


def _kind(value: object) -> str:
    kinds = {bool: "true/false", int: "whole number", float: "number", str: "text", list: "list", tuple: "list", dict: "mapping",
             type(None): "null"}  # fmt: skip
    if isinstance(value, Scalar):
        if isinstance(value.value, str) and NUMBER.fullmatch(value.text):
            return "whole number" if WHOLE.fullmatch(value.text) else "number"
        value = value.value
    return next((word for kind, word in kinds.items() if isinstance(value, kind)), type(value).__name__)


@dataclass(frozen=True)
class _Layer:
    """Values from one source; `places` says for each key where it stands, `line` of a value inside it is better where known."""

    values: Mapping[str, Any]
    places: Mapping[str, str]
    file: str = ""

    def place(self, key: str, inside: Any) -> str:
        """How an error names a value that stands below a key."""
        if self.file and isinstance(inside, Scalar):
            return f"{self.file}:{inside.line}: {key}"
        return self.places.get(key, key)


def read_file(path: Path) -> _Layer:
    """The options in a file."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise UserError(f"{path}: larger than 1 MiB; that is not a file of options")
        values, lines = _parsed(data.decode("utf-8-sig"), str(path))
    except FileNotFoundError as error:
        raise UserError(f"-f: {path} does not exist; name an existing file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"-f: {path} cannot be read ({error}); name a readable UTF-8 file") from error
    for keys, what in OTHERS:
        if all(key in values for key in keys):
            raise UserError(
                f"{path}: this is {what}; {FILE} holds options of mistralctl such as model, cloud and max_price, from which it makes "
                "the task itself (mistralctl up --dry-run shows it)"
            )
    return _Layer(values, {key: f"{path}:{line}: {key}" for key, line in lines.items()}, str(path))


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


# What other programs call our options.
ELSEWHERE = {
    "use_spot": "spot", "ports": "port", "autostop": "idle", "max_hourly_cost": "max_price", "infra": "cloud", "gpu": "accelerators",
    "gpus": "accelerators", "any_of": "cloud", "lora_modules": "lora", "context_length": "max_model_len", "max_seq_len": "max_model_len",
    "max_num_seqs": "max_concurrency", "tensor_parallel_size": "tensor_parallel", "tp": "tensor_parallel", "extra_args": "vllm_args",
    "cidr": "allow", "adapters": "lora", "timeout": "ttl",
}  # fmt: skip


def _unknown(key: str, known: Iterable[str]) -> str:
    if ours := ELSEWHERE.get(key.replace("-", "_").lower()):
        return f"mistralctl calls it {ours}"
    near = suggest(key.replace("-", "_"), known, 0.5)
    return f"did you mean {near}?" if near else f"the keys are {', '.join(known)}"


def _plain(value: Any) -> Any:
    """A value as YAML makes it."""
    if isinstance(value, Scalar):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _meant(field: SpecField, given: Any) -> Any:
    """What was given as pydantic gets it: one text where a list or a mapping is meant, numbers in quotes, words for true and false."""
    if isinstance(given, Scalar) and not isinstance(given.value, str | int | float | None):
        raise ValueError("should be plain text; leave the tag out")
    if isinstance(given, Scalar) and isinstance(given.value, str) and field.kind in ("list", "mapping"):
        if given.text.lstrip().startswith(("[", "{")) and (data := _json(given.text)) is not None:
            given = data
        elif field.kind == "mapping" and str in field.types and "=" not in given.text:
            return given.text
        else:
            given = [Scalar(part, part, given.line) for part in re.split(field.about.separator, given.text.strip())]
    if field.kind == "list":
        return (
            tuple(one.text if isinstance(one, Scalar) else _plain(one) for one in given)
            if isinstance(given, list | tuple)
            else _plain(given)
        )
    if field.kind == "mapping":
        return _pairs(field, given) if isinstance(given, list | tuple) else _plain(given)
    if not isinstance(given, Scalar):
        return _plain(given)
    if given.value is None and (field.info.default is None or field.kind != "text"):
        return None
    text = given.text if given.value is not None else "null"
    if field.kind == "true/false":
        return True if text.lower() in TRUE else False if text.lower() in FALSE else text
    if field.kind == "whole number" and WHOLE.fullmatch(text):
        return int(text, 16) if text.startswith("0x") else int(text)
    if field.kind == "number" and NUMBER.fullmatch(text):
        return float(text)
    return text


def _pairs(field: SpecField, given: Sequence[Any]) -> Any:
    """The mapping that a list of NAME=VALUE means; ValueError with what to write."""
    texts = [str(_plain(one)) if isinstance(one, Scalar | str) else "" for one in given]
    if str in field.types and len(texts) == 1 and texts[0] and "=" not in texts[0]:
        return texts[0]
    found: dict[str, str] = {}
    for one, text in zip(given, texts, strict=True):
        key, separator, value = text.partition("=")
        if not separator or not key or not value:
            form = re.sub(r"[\[\]]", "", field.about.metavar or "NAME=VALUE")
            wrong = f"does not say its {field.about.noun}; write {form} for each" if str in field.types else f"should be {form}"
            raise ValueError(f"{one!r} {wrong}, for example {field.about.example.strip('{}').replace(': ', '=')}")
        if key in found:
            raise ValueError(f"the {field.about.noun} {key!r} is given twice; keep one of them")
        found[key] = value
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _inside(value: Any, path: Sequence[int | str]) -> Any:
    """What stands at a place of a value as it was written; the value itself where that is not to be found."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            break
    return value


def _sentence(error: Mapping[str, Any], given: object, field: SpecField) -> str:
    """pydantic's error about a value as one of ours: what is wrong, then what to write."""
    context, kind = error.get("ctx", {}), str(error["type"])
    shown = repr(given) if len(repr(given)) <= 80 else repr(given)[:77] + "..."
    text = given.text if isinstance(given, Scalar) else str(given)
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        near = suggest(text, field.choices, 0.4)
        return f"{shown} is not one of {', '.join(field.choices)}" + (f"; did you mean {near}?" if near else "")
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
    if word is None:
        return f"{shown}: {error['msg']}"
    found = "null" if _kind(given) == "null" else f"{_kind(given)} {shown}"
    return f"should be {word}, is {found}; {_spelling(field, given)}"


def _spelling(field: SpecField, given: Any) -> str:
    """How to write what was probably meant."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], Scalar):
        return f"write {given[0].text}"
    text = given.text if isinstance(given, Scalar) else ""
    if field.kind == "whole number" and (size := re.fullmatch(r"([0-9]{1,6})\s*([kKmM])(i?[bB])?", text)):
        power = "km".index(size[2].lower()) + 1
        return f"write {int(size[1]) * 1024**power}, or {int(size[1]) * 1000**power}"
    number = re.search(r"[0-9]+(\.[0-9]+)?", re.sub(r"(?<=[0-9]),(?=[0-9]{3}\b)", "", text))
    if number and field.kind == "number":
        return f"write {number[0]}"
    if number and field.kind == "whole number" and float(number[0]).is_integer():
        return f"write {number[0].partition('.')[0]}"
    return f"write for example {field.about.example}"


def _check(layer: _Layer, kind: type[Spec]) -> Spec:
    """The spec of one layer alone; UserError where a value of it is wrong."""
    known = fields(kind)
    values: dict[str, Any] = {}
    for key, given in layer.values.items():
        try:
            values[key] = _meant(known[key], given) if key in known else _plain(given)
        except ValueError as error:
            raise UserError(line(f"{layer.place(key, given)}: {error}")) from None
    try:
        return kind.model_validate(values, strict=True)
    except ValidationError as errors:
        first = min(errors.errors(), key=lambda e: e["type"] == "extra_forbidden")
        loc = first["loc"]
        key = str(loc[0])
        if key not in known:
            raise UserError(f"{layer.places.get(key, key)}: unknown key {key!r}; {_unknown(key, known)}") from None
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[1:])
        given = _written(known[key], layer.values[key], loc[1:])
        raise UserError(line(f"{layer.place(key, given)}{path}: {_sentence(first, given, known[key])}")) from None


def _written(field: SpecField, given: Any, path: Sequence[int | str]) -> Any:
    """What stands at a place of a value, with its numbers as they were typed."""
    if isinstance(given, Scalar) and path and isinstance(given.value, str):
        inside = _inside(_meant(field, given), path)
        return Scalar(inside, inside, given.line) if isinstance(inside, str) else inside
    return _inside(given, path)


def _typed(value: Any) -> Any:
    """A flag's or a variable's words, as scalars."""
    if isinstance(value, str):
        return Scalar(value, value)
    return [_typed(one) for one in value] if isinstance(value, list | tuple) else value


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None, directory: Path = Path(),
    kind: type[Spec] = DeploymentSpec,  # type: ignore[assignment]  # what a type variable has as its default
) -> Sourced[Spec]:  # fmt: skip
    """The spec that flags, then variables, then the file, then the defaults make together.

    `flags` holds only what was given on the command line. Without `file`, mistralctl.yaml in `directory` is read if it
    is there, for a deployment.
    """
    known = fields(kind)
    found = directory / FILE if issubclass(kind, DeploymentSpec) else None
    path = file or (found if found is not None and found.is_file() else None)
    variables = {name: environ[one.variable] for name, one in known.items() if environ.get(one.variable)}
    layers = (
        read_file(path) if path else _Layer({}, {}),
        _Layer({name: _typed(text) for name, text in variables.items()}, {name: one.variable for name, one in known.items()}),
        _Layer({name: _typed(value) for name, value in flags.items()}, {name: one.flag for name, one in known.items()}),
    )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    typed: dict[str, str] = {}
    for layer in layers:
        spec = _check(layer, kind)
        for name in known:
            if name not in spec.model_fields_set or (value := getattr(spec, name)) is None:
                continue
            values[name], sources[name] = value, layer.places[name]
            given = layer.values[name]
            typed |= {name: given.text} if isinstance(given, Scalar) else {}
            if not isinstance(given, Scalar):
                typed.pop(name, None)
    return Sourced(kind.model_validate(values), sources, typed)
