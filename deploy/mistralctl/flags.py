"""The flags of the commands that take a spec, made from its fields."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import BaseModel

from mistralctl import config
from mistralctl.fields import SpecField, fields
from mistralctl.spec import DeploymentSpec


def file_option(spec: type[BaseModel]) -> Any:
    """The type of the parameter `file`: of a deployment it has a default."""
    otherwise = f" [default: {config.FILE}]" if issubclass(spec, DeploymentSpec) else ""
    return Annotated[Path | None, typer.Option("-f", "--file", metavar="FILE", help=f"options in YAML{otherwise}")]


def parameter(field: SpecField) -> inspect.Parameter:
    """The parameter that makes typer take a field's flag: always text, which `config` reads as it reads a file's."""
    kinds: dict[str, Any] = {"true/false": bool, "list": list[str], "mapping": list[str]}
    shown: dict[str, Any] = {"help": field.help, "metavar": field.about.metavar}
    if known := field.about.known:
        shown["autocompletion"] = lambda incomplete: [one for one in known() if one.startswith(incomplete)]
    if not field.flag.startswith("-"):
        option: Any = typer.Argument(show_default=False, **shown)
    elif field.kind == "true/false":
        option = typer.Option(f"{field.flag}/--no-{field.flag.removeprefix('--')}", **shown)
    else:
        option = typer.Option(field.flag, **shown)
    annotation: Any = Annotated[kinds.get(field.kind, str) | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_spec(function: Callable[..., None], spec: type[BaseModel] = DeploymentSpec) -> Callable[..., None]:
    """Gives a command a flag for each field, and `--file`; it gets what they make together as `sourced`, checked."""
    shared = [parameter(field) for field in fields(spec).values()]
    file = inspect.Parameter("file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file_option(spec))
    hints = get_type_hints(function, localns={"Sourced": config.Sourced}, include_extras=True)
    own = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name])
        for p in inspect.signature(function).parameters.values()
        if p.name != "sourced"
    ]

    def command(*, file: Path | None, **values: Any) -> None:
        given = {p.name: value for p in shared if (value := values.pop(p.name)) not in (None, [])}
        function(config.load(given, os.environ, file, kind=spec), **values)

    parameters = [*shared, file, *own]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
