"""How commands answer: the form that was asked for, results on standard output, notes on standard error."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mistralctl import documents
from mistralctl.errors import Exit, UserError

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


def deployed(name: str) -> str:
    """A deployment's name as its record has it: a model's may be written for it, mistral-7b-v0.1 for mistral-7b-v0-1."""
    from mistralctl import state

    alias = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return alias if name not in state.names() and alias in state.names() else name


def only_one() -> str:
    """The name that is meant where none is given: that of the only deployment that is up, or of the only one that is known."""
    from mistralctl import state

    records = state.every()[0]
    live = [record.name for record in records if record.state != "down"] or [record.name for record in records]
    if len(live) == 1:
        return live[0]
    said = f"say which of {', '.join(sorted(live))} is meant" if live else "nothing is up; mistralctl up brings a model up"
    raise UserError(f"NAME: {said}", Exit.USAGE if live else Exit.NOT_FOUND)


DeployedName = Annotated[
    str, typer.Argument(metavar="NAME", help="name of a deployment", autocompletion=known_names, callback=deployed)
]
DeployedOrOnly = Annotated[
    str, typer.Argument(metavar="NAME", help="name of a deployment [default: the only one]", autocompletion=known_names,
                        callback=deployed, default_factory=only_one, show_default=False)
]  # fmt: skip


class Commands(TyperGroup):
    """A command with commands: alone it prints its help, and `help COMMAND` is `COMMAND --help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] == "help":
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Print the first paragraph of each command's help whole."""
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [(name, " ".join((one.help or "").split("\n\n")[0].split())) for name, one in commands if one and not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


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
