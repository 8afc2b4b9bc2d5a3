"""How commands answer: the form that was asked for, results on standard output, notes on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralctl import documents

if TYPE_CHECKING:
    from mistralctl.rights import Right


class Form(str, Enum):
    """How a result is printed."""

    text = "text"
    json = "json"
    yaml = "yaml"


Output = Annotated[Form, typer.Option("-o", "--output", help="text, json or yaml")]


def known_names(incomplete: str) -> list[str]:
    from mistralctl import state

    return [name for name in state.names() if name.startswith(incomplete) and state.is_name(name)]


DeployedName = Annotated[str, typer.Argument(metavar="NAME", help="name of a deployment", autocompletion=known_names)]


def say(result: Any, form: Form, text: str = "fields_text") -> None:
    """Prints a result in the form that was asked for; `text` names the function of `output` that makes the text."""
    from mistralctl import output

    typer.echo(output.dumped(result, form.value, getattr(output, text)))


def say_task(task: dict[str, Any], form: Form) -> None:
    """Prints a SkyPilot task alone, as YAML, or with what JSON has beside it."""
    if form is Form.json:
        typer.echo(documents.as_json(task))
        return
    from mistralctl.tasks import dump

    typer.echo(dump(task), nl=False)


def note(text: str, mark: str = "note: ") -> None:
    """Says on standard error what ends nothing; a line of JSON under -o json."""
    sys.stderr.write((documents.note(text) if documents.asked_for(sys.argv[1:]) else mark + text) + "\n")


def note_rights(rights: Sequence[Right]) -> None:
    """Says on standard error which right a node lacks to use a bucket; the task itself stays alone on standard output."""
    for right in rights:
        if right.has != "yes":
            note(right.line)


def say_result(result: Any, form: Form) -> None:
    """Prints the result of a command that told its progress: with JSON, as the last of its lines."""
    from mistralctl import output

    if form is Form.json:
        typer.echo(output.event(result))
    else:
        say(result, form, "weights_text")
