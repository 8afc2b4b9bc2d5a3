"""The command line: reads options, calls one command, prints its result. Nothing imports it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

# pydantic would look through every installed package for plugins of its own: a tenth of the time of a dry run.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from mistralctl import documents
from mistralctl.errors import Exit, UserError
from mistralctl.flags import with_spec
from mistralctl.heavy import uncollected

if TYPE_CHECKING:
    from mistralctl.config import Sourced
    from mistralctl.rights import Right

app = typer.Typer(
    name="mistralctl",
    help="Mistral 7B on AWS, GCP, Azure or this machine: one command brings it up, one takes it away.",
    epilog="First steps: mistralctl up smollm2-135m-instruct --cloud local; then mistralctl chat smollm2-135m-instruct. "
    "mistralctl doctor says what is missing.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


class Form(str, Enum):
    """How a result is printed."""

    text = "text"
    json = "json"
    yaml = "yaml"


Output = Annotated[Form, typer.Option("-o", "--output", help="text, json or yaml")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="name of a deployment")]


def _known_names(incomplete: str) -> list[str]:
    from mistralctl import state

    return [name for name in state.names() if name.startswith(incomplete)]


DeployedName = Annotated[str, typer.Argument(metavar="NAME", help="name of a deployment", autocompletion=_known_names)]


def _say(result: Any, form: Form, text: str = "fields_text") -> None:
    """Prints a result in the form that was asked for; `text` names the function of `output` that makes the text."""
    from mistralctl import output

    typer.echo(output.dumped(result, form.value, getattr(output, text)))


def _say_task(task: dict[str, Any], form: Form) -> None:
    """Prints a SkyPilot task alone, as YAML, or with what JSON has beside it."""
    if form is Form.json:
        typer.echo(documents.as_json(task))
        return
    from mistralctl.tasks import dump

    typer.echo(dump(task), nl=False)


def _note(text: str, mark: str = "note: ") -> None:
    """Says on standard error what ends nothing; a line of JSON under -o json."""
    sys.stderr.write((documents.note(text) if documents.asked_for(sys.argv[1:]) else mark + text) + "\n")


def _note_rights(rights: Sequence[Right]) -> None:
    """Says on standard error which right a node lacks to use a bucket; the task itself stays alone on standard output."""
    for right in rights:
        if right.has != "yes":
            _note(right.line)


@app.command(epilog="Examples: mistralctl up --cloud gcp --dry-run; mistralctl up smollm2-135m-instruct --cloud local")
@with_spec
def up(
    sourced: Sourced,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the SkyPilot task and do nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="do not ask first: the weights' place, the hub, the clouds for quotas")
    ] = False,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="a key of your own, 128 bits or more [default: a new one]")
    ] = None,
    output: Output = Form.text,
) -> None:
    """Bring a model up and wait until it answers."""
    if dry_run:
        from mistralctl.commands import plan as plan_command

        planned = plan_command.run(sourced)
        task = plan_command.render_plan(planned)
        _say_task(task | {"steps": plan_command.steps(planned)} if output is Form.json else task, output)
        _note_rights(planned.rights)
        return
    from mistralctl import progress
    from mistralctl.commands import up as up_command

    def confirm(question: str) -> bool:
        return yes or (sys.stdin.isatty() and typer.confirm(f"{question}. Do it?", err=True))

    with progress.shown(quiet=output is not Form.text) as on_phase:
        result = up_command.run(sourced, up_command.Talk(on_phase, confirm, _note), offline=offline, key_file=key_file)
    _say(result, output, "up_text")


@app.command(epilog="Example: mistralctl plan --cloud aws --cloud gcp --max-model-len 16384")
@with_spec
def plan(
    sourced: Sourced,
    quota: Annotated[bool, typer.Option("--quota", help="ask the clouds whether their quotas allow it")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="ask where the weights lie, and cloud and server whether what is up is as it was")
    ] = False,
    output: Output = Form.text,
) -> None:
    """Say what would run where: what fits, what it costs, why others were refused."""
    from mistralctl.commands import plan as plan_command

    planned = plan_command.run(sourced, ask=refresh)
    if quota:
        from dataclasses import replace

        from mistralctl.commands import preflight

        planned = replace(planned, quotas=preflight.run(planned))
    _say(planned, output, "plan_text")
    for line in plan_command.difference(planned, refresh=refresh):
        _note(f"{planned.name} is up: {line}", mark="")


@app.command(epilog="Examples: mistralctl down mistral-7b-instruct-v0-1; mistralctl down --all")
def down(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="names of deployments", autocompletion=_known_names)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="every deployment that is known here")] = False,
    output: Output = Form.text,
) -> None:
    """Take deployments away and make sure that they are gone."""
    from mistralctl.commands import down as down_command

    _say(down_command.run(names or [], everything=everything), output, "down_text")


@app.command()
def status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="name of a deployment [default: all]", autocompletion=_known_names),
    ] = None,
    output: Output = Form.text,
) -> None:
    """Say what is up, where, and for how long still."""
    from mistralctl.commands import status as status_command

    with uncollected():
        _say(status_command.run(name), output, "status_text")


@app.command(epilog="Example: mistralctl logs smollm2-135m-instruct -f")
def logs(
    name: DeployedName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on with what comes")] = False,
    lines: Annotated[int | None, typer.Option("-n", "--lines", min=0, help="only the last so many lines")] = None,
) -> None:
    """Print what setup and server wrote."""
    from mistralctl.commands import logs as logs_command

    for text in logs_command.run(name, follow=follow, lines=lines):
        typer.echo(text, nl=False)


@app.command(epilog="Examples: mistralctl reap --dry-run; mistralctl reap --yes, from cron")
def reap(
    cloud: Annotated[list[str] | None, typer.Option(help="cloud to ask (repeatable) [default: all that you use]")] = None,
    all_owners: Annotated[bool, typer.Option("--all-owners", help="also what others of this account brought up")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="delete without asking")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show")] = False,
    output: Output = Form.text,
) -> None:
    """Find machines past their lifetime, and disks and addresses without a machine, and delete them."""
    from mistralctl.commands import reap as reap_command
    from mistralctl.output import parts_text

    def confirm(due: list[reap_command.Found]) -> bool:
        if yes:
            return True
        if not sys.stdin.isatty():
            raise UserError(f"{len(due)} to delete; say --yes to do it, or --dry-run to see them", Exit.CONFLICT)
        typer.echo(parts_text(due), err=True)
        return typer.confirm("Delete these?", err=True)

    result = reap_command.run(cloud or [], all_owners=all_owners, dry_run=dry_run, confirm=confirm)
    _say(result, output, "reap_text")
    reap_command.check(result)


@app.command(epilog="Example: mistralctl extend mistral 2h")
def extend(
    name: DeployedName,
    duration: Annotated[str, typer.Argument(metavar="DURATION", help="how much longer: 30m, 2h, 1d")],
    output: Output = Form.text,
) -> None:
    """Put the end of a deployment's life off."""
    from mistralctl.commands import extend as extend_command

    _say(extend_command.run(name, duration), output, "extended_text")


@app.command(epilog="Example: mistralctl receipt mistral -o json")
def receipt(name: DeployedName, output: Output = Form.text) -> None:
    """Print what was brought up, from what, where, and how it was checked; also after down."""
    from mistralctl.commands import receipt as receipt_command

    _say(receipt_command.run(name), output, "receipt_text")


@app.command(epilog="Example: mistralctl connect mistral, after a reboot of this machine")
def connect(name: DeployedName, output: Output = Form.text) -> None:
    """Open the tunnel to a deployment on a cloud again, on the same port."""
    from mistralctl.commands import connect as connect_command

    _say(connect_command.run(name), output, "connect_text")


@app.command(context_settings={"ignore_unknown_options": True}, epilog="Example: mistralctl ssh mistral nvidia-smi")
def ssh(
    name: DeployedName,
    words: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]...", help="a command to run there")] = None,
) -> None:
    """Open a shell on a deployment's machine, or run a command there."""
    from mistralctl.runtime import ssh as node

    command = node.command(name, *([] if words else ["-t"]), node.HOST, *(words or []))
    sys.stdout.flush()
    os.execvp(command[0], command)  # noqa: S606 - no shell, which is what we want


@app.command(epilog='Example: eval "$(mistralctl env smollm2-135m-instruct)"')
def env(name: DeployedName, output: Output = Form.text) -> None:
    """Print shell lines for clients of the OpenAI API."""
    from mistralctl.commands import env as env_command

    _say(env_command.run(name), output, "env_text")


@app.command(epilog='Examples: mistralctl chat mistral -m "Why is the sky blue?"; mistralctl chat mistral')
def chat(
    name: DeployedName,
    message: Annotated[str | None, typer.Option("-m", "--message", help="one question; without it, a conversation")] = None,
) -> None:
    """Ask one question, or talk until an empty line."""
    from mistralctl.commands import chat as chat_command
    from mistralctl.commands import env as env_command

    client = env_command.run(name)
    messages: list[dict[str, str]] = []
    while True:
        question = message if message is not None else _read_question()
        if not question.strip():
            if message is not None:
                raise UserError("-m: the question is empty; write one")
            return
        messages.append({"role": "user", "content": question})
        answer = ""
        for piece in chat_command.ask(client, messages):
            answer += piece
            typer.echo(piece, nl=False)
        typer.echo()
        if message is not None:
            return
        messages.append({"role": "assistant", "content": answer})


def _read_question() -> str:
    """A line from the person at the terminal, empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


@app.command()
def models(output: Output = Form.text) -> None:
    """Print the table of models."""
    from mistralctl.commands import tables

    _say(tables.models(), output, "models_text")


@app.command()
def gpus(output: Output = Form.text) -> None:
    """Print the table of GPUs, with prices, their date and their source."""
    from mistralctl.commands import tables

    _say(tables.gpus(), output, "gpus_text")


@app.command(epilog="Examples: mistralctl doctor; mistralctl doctor --cloud aws; mistralctl doctor --node mistral")
def doctor(
    cloud: Annotated[
        list[str] | None, typer.Option(help="also ask this cloud, and SkyPilot about it (repeatable) [default: asks nobody]")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ask a deployment's machine instead: GPU, driver, image, memory, disk",
            autocompletion=_known_names,
        ),
    ] = None,
    output: Output = Form.text,
) -> None:
    """Say what is missing on this machine or account, and the command that mends it."""
    from mistralctl.commands import doctor as doctor_command

    if node is None:
        _say(doctor_command.run(cloud or ()), output, "doctor_text")
    elif cloud:
        raise UserError("--node: asks one machine and means nothing with --cloud; leave one of the two out")
    else:
        _say(doctor_command.node_facts(node), output, "node_text")


keys_app = typer.Typer(
    help="Keys: who may ask a deployment, and how much; changed while it serves.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(keys_app, name="keys")

Limit = Annotated[int | None, typer.Option(metavar="N", min=1, max=1_000_000_000_000, help="no more than N [default: no limit]")]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="bring your own key: 128 bits or more, in the file's one line")
]
KeyName = Annotated[str, typer.Argument(metavar="KEY", help="id or name of a key", show_default=False)]


@keys_app.callback()
def _keys(context: typer.Context, name: DeployedName) -> None:
    context.obj = name


@keys_app.command("list", epilog="Example: mistralctl keys mistral list -o json")
def keys_list(context: typer.Context, output: Output = Form.text) -> None:
    """Print the keys with their limits, and what was asked with each."""
    from mistralctl.commands import keys

    _say(keys.run(context.obj), output, "keys_text")


@keys_app.command("add", epilog="Example: mistralctl keys mistral add --name ci --requests-per-minute 60 --expires 30d")
def keys_add(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="whose it is [default: key-N]", show_default=False)] = "",
    key_file: KeyFile = None,
    requests_at_once: Limit = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    tokens_per_day: Limit = None,
    expires: Annotated[str, typer.Option(metavar="30d|never", help="let it in for so long")] = "never",
    output: Output = Form.text,
) -> None:
    """Let another key in, and print it this once."""
    from mistralctl.commands import keys

    wanted = keys.Wanted(
        name, key_file, requests_at_once, requests_per_minute, tokens_per_minute, tokens_per_day, expires
    )  # fmt: skip
    _say(keys.add(context.obj, wanted), output, "key_change_text")


@keys_app.command("revoke", epilog="Example: mistralctl keys mistral revoke ci")
def keys_revoke(context: typer.Context, key: KeyName, output: Output = Form.text) -> None:
    """Shut a key out."""
    from mistralctl.commands import keys

    _say(keys.revoke(context.obj, key), output, "key_change_text")


@keys_app.command("rotate", epilog="Examples: mistralctl keys mistral rotate; mistralctl keys mistral rotate ci --grace 1h")
def keys_rotate(
    context: typer.Context,
    key: Annotated[
        str, typer.Argument(metavar="[KEY]", help="id or name of a key [default: this laptop's own]", show_default=False)
    ] = "",
    key_file: KeyFile = None,
    grace: Annotated[str, typer.Option(metavar="10m", help="how long the old key is still let in")] = "10m",
    output: Output = Form.text,
) -> None:
    """Exchange a key for a new one without losing a request."""
    from mistralctl.commands import keys

    _say(keys.rotate(context.obj, key, key_file, grace), output, "key_change_text")


weights_app = typer.Typer(
    help="Weights: pulled, mirrored to a bucket of yours, verified to the last bit.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(weights_app, name="weights")


@weights_app.callback()
def _weights() -> None:
    from mistralctl import system

    system.require_renting("weights")


Revision = Annotated[str, typer.Option(metavar="COMMIT", help="commit, tag or branch of a hub's repository")]
Weights = Annotated[
    str, typer.Argument(metavar="URI", help="hf:// s3:// gs:// az:// file:// pypi://, or a row of `mistralctl models`")
]


def _say_result(result: Any, form: Form) -> None:
    """Prints the result of a command that told its progress: with JSON, as the last of its lines."""
    from mistralctl import output

    if form is Form.json:
        typer.echo(output.event(result))
    else:
        _say(result, form, "weights_text")


@weights_app.command(
    "mirror",
    epilog="Examples: mistralctl weights mirror mistral-7b-instruct-v0.1 s3://bucket/v01 --here; "
    "mistralctl weights mirror hf://mistralai/Mistral-7B-v0.1 gs://bucket/base --dry-run",
)
def weights_mirror(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a URI, or a row of `mistralctl models`")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="s3:// gs:// az:// or file://")],
    revision: Revision = "",
    here: Annotated[bool, typer.Option("--here", help="on this machine, by way of its disk")] = False,
    stage: Annotated[Path | None, typer.Option(metavar="DIR", help="with --here: a folder with room for the set, kept")] = None,
    region: Annotated[str | None, typer.Option(help="region of the target's bucket, for the machine near it")] = None,
    canary: Annotated[
        bool, typer.Option("--canary", help="compute the figures that a start is checked by: an hour for 7B")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the SkyPilot task and do nothing")] = False,
    output: Output = Form.text,
) -> None:
    """Bring weights from one place to another: on a cheap machine near the bucket, or --here."""
    from mistralctl import stores
    from mistralctl.tasks import mirror

    spec = mirror.checked(
        mirror.MirrorSpec(source, target, revision, region, stores.endpoints((source, target), os.environ), canary)
    )
    if here and (dry_run or region):
        raise UserError(f"--here: means nothing with {'--dry-run' if dry_run else '--region'}; leave one of the two out")
    if stage and not here:
        raise UserError("--stage: is a folder of this machine; add --here")
    from mistralctl.commands import weights

    if dry_run:
        _say_task(weights.render(spec), output)
        _note_rights(mirror.rights(spec))
        return
    from mistralctl import progress

    if not here:
        with progress.shown(quiet=output is not Form.text) as on_phase:
            there = weights.mirror_there(spec, on_phase)
        _say(there, output, "mirrored_text")
        return

    with progress.of_bytes(output.value) as report:
        result = weights.mirror_here(spec, stage, report)
    _say_result(result, output)


@weights_app.command("pull", epilog="Example: mistralctl weights pull s3://bucket/v01 weights/v01")
def weights_pull(
    uri: Weights,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="appears when the set is complete and right")],
    revision: Revision = "",
    full: Annotated[bool, typer.Option("--full", help="hash every byte of a set that is there already")] = False,
    output: Output = Form.text,
) -> None:
    """Bring weights into a folder; run again after any failure, it continues."""
    from mistralctl import progress
    from mistralctl.commands import weights

    with progress.of_bytes(output.value) as report:
        result = weights.pull(uri, folder, revision, report, full=full)
    _say_result(result, output)


@weights_app.command(
    "verify", epilog="Examples: mistralctl weights verify s3://bucket/v01; mistralctl weights verify weights/v01"
)
def weights_verify(
    where: Annotated[str, typer.Argument(metavar="URI|DIR", help="a URI, or a folder of this machine")],
    revision: Revision = "",
    output: Output = Form.text,
) -> None:
    """Read every byte of a set and hold it against its manifest."""
    from mistralctl import progress
    from mistralctl.commands import weights

    with progress.of_bytes(output.value) as report:
        result = weights.verify(where, revision, report)
    _say_result(result, output)
    weights.check(result)


@weights_app.command("ls", epilog="Example: mistralctl weights ls hf://mistralai/Mistral-7B-Instruct-v0.1")
def weights_ls(uri: Weights, revision: Revision = "", output: Output = Form.text) -> None:
    """List what lies at a place, what a pull brings of it, and whether you may read it."""
    from mistralctl.commands import weights

    _say(weights.ls(uri, revision), output, "weights_text")


def _version(wanted: bool) -> None:
    if wanted:
        from mistralctl import __version__

        typer.echo(f"mistralctl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="MISTRALCTL_DEBUG", help="show where an error comes from")] = False,
) -> None:
    pass


def _end(message: str, code: int, details: str = "") -> NoReturn:
    message = " ".join(message.split())
    if documents.asked_for(sys.argv[1:]):
        sys.stderr.write(documents.error(message, code, details) + "\n")
    else:
        sys.stderr.write(f"mistralctl: {message}\n{details}{chr(10) if details else ''}")
    raise SystemExit(code)


def main() -> NoReturn:
    """The entry point: runs the command line and turns what went wrong into one line and an exit code."""
    debug = "--debug" in sys.argv or os.environ.get("MISTRALCTL_DEBUG", "") not in ("", "0")
    try:
        code = app(standalone_mode=False)
        if code == Exit.INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        sys.stdout.flush()
        raise SystemExit(code if isinstance(code, int) else 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        _end("interrupted; nothing was left half-done", Exit.INTERRUPTED)
    except Exception as error:
        if debug:
            sys.tracebacklimit = 1000  # SkyPilot leaves it at 0, and then there is none
            raise
        if isinstance(error, UserError):
            _end(str(error), error.code, error.details)
        if hasattr(error, "format_message"):  # what typer says of the words on the command line
            _end(f"{error.format_message().replace('Value error, ', '')} (mistralctl --help)", Exit.USAGE)
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{where}{error.strerror}; free some space or correct the rights there, then try again", Exit.MACHINE)
        _end(
            f"a bug of mistralctl: {type(error).__name__}: {error}; run it with --debug and report what it says",
            Exit.BUG,
        )
