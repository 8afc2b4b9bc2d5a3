"""What each field of a spec is outside Python: its flag, its variable, its schema, its line in docs/options.md; all from the field."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mistralctl.errors import figure

Kind = Literal["text", "whole number", "number", "true/false", "list", "mapping"]
KINDS: dict[type, Kind] = {bool: "true/false", int: "whole number", float: "number", str: "text", tuple: "list", dict: "mapping"}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class About:
    """What a field says of itself beside type, bounds, default and description.

    `panel` groups it in the docs; `example` is a value as mistralctl.yaml has it; `flag` is another name than --FIELD, and one without
    hyphens is an argument; `otherwise` says what holds where it is left out; `separator` (a regular expression) splits one text into
    a list or a mapping; `noun` is what a mapping's keys are; `known` are the values to complete.
    """

    panel: str
    example: str
    metavar: str | None = None
    flag: str = ""
    otherwise: str = ""
    separator: str = r"\s*,\s*"
    noun: str = "key"
    known: Callable[[], Iterable[str]] | None = None


@dataclass(frozen=True)
class SpecField:
    """A field of a spec, with everything that follows from it."""

    name: str
    info: FieldInfo
    about: About

    @property
    def types(self) -> set[type]:
        return _types(self.info.annotation)

    @property
    def kind(self) -> Kind:
        """What its value is; one that may be text or a mapping is a mapping."""
        return next(KINDS[one] for one in (bool, tuple, dict, int, float, str) if one in self.types)

    @property
    def choices(self) -> tuple[str, ...]:
        return _choices(self.info.annotation)

    @property
    def flag(self) -> str:
        """`--max-price`, or for an argument `MODEL`."""
        return self.about.flag or "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return f"MISTRALCTL_{self.name.upper()}"

    @property
    def description(self) -> str:
        """The field's description; a `{}` in it stands for the words that it may be."""
        words = " or ".join(part for part in (", ".join(self.choices[:-1]), *self.choices[-1:]) if part)
        return str(self.info.description).replace("{}", words)

    @property
    def otherwise(self) -> str:
        """What holds where nothing is given, in words; empty for nothing worth a word."""
        plain = self.info.default is not None and self.kind not in ("true/false", "list", "mapping")
        return self.about.otherwise or (str(self.info.default) if plain else "")

    @property
    def help(self) -> str:
        repeatable = " (repeatable)" if self.kind in ("list", "mapping") else ""
        return self.description + repeatable + (f" [default: {self.otherwise}]" if self.otherwise else "")

    @property
    def values(self) -> str:
        """Its kind and bounds in words: `whole number, 16 to 1048576`."""
        words = {Ge: "at least", Gt: "more than", Le: "at most"}
        bounds = [
            f"{words[type(m)]} {figure(getattr(m, type(m).__name__.lower()))}" for m in self.info.metadata if type(m) in words
        ]
        return ", ".join([self.kind, *bounds])


def _types(annotation: Any) -> set[type]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return {kind for one in get_args(annotation) for kind in _types(one)} - {type(None)}
    if origin is Annotated:
        return _types(get_args(annotation)[0])
    if origin is Literal:
        return {str}
    return {origin or annotation}


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(get_args(annotation))
    return next((found for one in get_args(annotation) if (found := _choices(one))), ())


def fields(spec: type[BaseModel]) -> dict[str, SpecField]:
    """Every field of a spec, by its name and in its order."""
    found = {}
    for name, info in spec.model_fields.items():
        about = next((m for m in info.metadata if isinstance(m, About)), None)
        if about is None:
            raise TypeError(f"{spec.__name__}.{name} has no About(...) in its Annotated; see the fields beside it")
        found[name] = SpecField(name, info, about)
    return found


def words(spec: BaseModel) -> list[str]:
    """Return the command line's words that make a spec again: what differs from the defaults, arguments first.

    >>> from mistralctl.spec import DeploymentSpec
    >>> words(DeploymentSpec(model="smollm2-135m-instruct", cloud=("local",), lora={"sql": "s3://bucket/sql"}))
    ['smollm2-135m-instruct', '--cloud', 'local', '--lora', 'sql=s3://bucket/sql']
    """
    arguments, options = list[str](), list[str]()
    for one in fields(type(spec)).values():
        value = getattr(spec, one.name)
        if value == one.info.get_default(call_default_factory=True):
            continue
        if isinstance(value, bool):
            options.append(one.flag if value else f"--no-{one.flag.removeprefix('--')}")
            continue
        each = (
            [f"{key}={text}" for key, text in value.items()]
            if isinstance(value, dict)
            else value
            if isinstance(value, tuple)
            else [value]
        )
        for text in (item if isinstance(item, str) else figure(item) for item in each):
            if not one.flag.startswith("-"):
                arguments.append(text)
            else:
                options += [f"{one.flag}={text}"] if text.startswith("-") else [one.flag, text]
    return arguments + options


def json_schema(spec: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a file with these fields, for editors: it accepts every spelling that `config` takes."""
    schema = spec.model_json_schema()
    for one in fields(spec).values():
        found = schema["properties"][one.name]
        kept = {key: found.pop(key) for key in ("description", "title", "default") if key in found}
        kept["description"] = one.description + (f" (otherwise: {one.otherwise})" if one.about.otherwise else "")
        forms = [*found.pop("anyOf", [])] or [found]
        schema["properties"][one.name] = {"anyOf": [*forms, *_spellings(one)]} | kept
    return schema


def _spellings(one: SpecField) -> list[dict[str, Any]]:
    """Other forms of a value than pydantic knows, as JSON schemas."""
    if one.kind == "true/false":
        return [{"enum": [*TRUE, *FALSE, 1, 0]}]
    if one.kind == "whole number":
        return [{"type": "string", "pattern": "^[0-9][0-9_]*$"}]
    if one.kind == "number":
        return [{"type": "string", "pattern": r"^[0-9.][0-9._e+-]*$"}]
    if one.kind == "mapping":
        pair = {"type": "string"} if str in one.types else {"type": "string", "pattern": "^[^=]+=."}
        return [{"type": "array", "items": pair}, pair]
    if one.kind == "list" and one.choices:
        word = f"({'|'.join(map(re.escape, one.choices))})"
        return [{"type": "string", "pattern": f"^{word}({one.about.separator}{word})*$"}]
    return [{"type": "string"}] if one.kind == "list" else [] if one.choices else [{"type": ["number", "boolean"]}]


def docs(spec: type[BaseModel]) -> str:
    """docs/options.md: a table of the fields for each panel."""
    lines = [
        "# Which options are there?",
        "",
        "An option is given as a flag of `up` and `plan`, as a variable, or in `mistralctl.yaml`; flags come before variables, variables before",
        "the file, the file before the defaults. `make schema` writes this page from `deploy/mistralctl/spec.py`.",
        *tables(spec),
    ]
    return "\n".join([*lines, "", *SPELLINGS])


def tables(spec: type[BaseModel], file: str = "`mistralctl.yaml`") -> list[str]:
    """The lines of a table of the fields for each panel."""
    lines: list[str] = []
    every = fields(spec).values()
    for panel in dict.fromkeys(one.about.panel for one in every):
        lines += [
            "",
            f"## {panel}",
            "",
            f"| flag | variable | {file} | what | value | if left out |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            "| "
            + " | ".join(
                cell.replace("|", r"\|")
                for cell in (
                    f"`{one.flag}`" if one.kind != "true/false" else f"`{one.flag}`, `--no-{one.flag[2:]}`",
                    f"`{one.variable}`", f"`{one.name}: {one.about.example}`", one.description, one.values, one.otherwise or "-",
                )
            )
            + " |"
            for one in every if one.about.panel == panel
        ]  # fmt: skip
    return lines


def between(page: str, spec: type[BaseModel]) -> str:
    """A page with the tables of a spec between its two marks."""
    before, mark, rest = page.partition("<!-- options -->\n")
    end = rest.index("<!-- end -->")
    return "\n".join([f"{before}{mark}".removesuffix("\n"), *tables(spec, "in a file"), "", rest[end:]])


SPELLINGS = """## Spellings

- Where a list is meant, one text with commas is taken too (`cloud: aws, gcp`), and for `vllm_args` one with spaces before `--`.
- Where a mapping is meant, `lora: [sql=./sql]`, `lora: sql=./sql` and `lora: {sql: ./sql}` are the same.
- Numbers may be in quotes and may have underscores. true, yes, on and 1 are the same, so are false, no, off and 0.
- A variable holds the same text; a list or a mapping may be JSON there.
- Anything else is refused in one line: `mistralctl.yaml:3: port: should be a whole number, is text 'http'; write for example 8001`.
""".splitlines()


def dumped_schema(spec: type[BaseModel]) -> str:
    """The schema as its file has it."""
    return json.dumps(json_schema(spec), indent=1) + "\n"
