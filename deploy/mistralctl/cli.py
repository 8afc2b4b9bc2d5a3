"""The command line: reads options, calls one command, prints its result. Nothing imports it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

# pydantic would look through every installed package for plugins of its own: a tenth of the time of a dry run.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from mistralctl import cli_finetune, cli_keys, cli_weights, documents, interrupts, shells
from mistralctl.answers import (
    Commands,
    DeployedName,
    DeployedOrOnly,
    Form,
    Output,
    deployed,
    known_names,
    note,
    note_rights,
    only_one,
    say,
    say_task,
)
from mistralctl.errors import Exit, UserError
from mistralctl.flags import with_spec
from mistralctl.heavy import uncollected

if TYPE_CHECKING:
    from mistralctl.config import Sourced

app = typer.Typer(
    name="mistralctl",
    help="Mistral 7B on AWS, GCP, Azure or this machine: one command brings it up, one takes it away.",
    epilog="First steps: mistralctl up smollm2-135m-instruct --cloud local; then mistralctl chat smollm2-135m-instruct. "
    "mistralctl doctor says what is missing.",
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_weights.app, name="weights")


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
        say_task(task | {"steps": plan_command.steps(planned)} if output is Form.json else task, output)
        note_rights(planned.rights)
        return
    from mistralctl import progress
    from mistralctl.commands import up as up_command

    def confirm(question: str) -> bool:
        return yes or (sys.stdin.isatty() and typer.confirm(f"{question}. Do it?", err=True))

    with progress.shown(quiet=output is not Form.text) as on_phase:
        result = up_command.run(sourced, up_command.Talk(on_phase, confirm, note), offline=offline, key_file=key_file)
    say(result, output, "up_text")


@app.command(epilog="Example: mistralctl plan --cloud aws --cloud gcp --max-model-len 16384")
@with_spec
def plan(
    sourced: Sourced,
    quota: Annotated[bool, typer.Option("--quota", help="ask the clouds whether their quotas allow it")] = False,
    refresh: Annotated[
        bool,
        typer.Option(
            "--refresh",
            help="look at weights and adapters where they lie, and ask cloud and server whether what is up is as it was",
        ),
    ] = False,
    output: Output = Form.text,
) -> None:
    """Say what would run where: what fits, what it costs, why others were refused."""
    from mistralctl.commands import plan as plan_command

    planned = plan_command.refreshed(sourced, note) if refresh else plan_command.run(sourced)
    if quota:
        from dataclasses import replace

        from mistralctl.commands import preflight

        planned = replace(planned, quotas=preflight.run(planned))
    say(planned, output, "plan_text")
    for line in plan_command.difference(planned, refresh=refresh):
        note(f"{planned.name} is up: {line}", mark="")


cli_finetune.add(app)


@app.command(epilog="Examples: mistralctl down mistral-7b-instruct-v0-1; mistralctl down --all")
def down(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="names of deployments", autocompletion=known_names)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="every deployment that is known here")] = False,
    output: Output = Form.text,
) -> None:
    """Take deployments away and make sure that they are gone."""
    from mistralctl.commands import down as down_command

    done, failures = down_command.run([*map(deployed, names or [])], everything=everything)
    if done or not failures:
        say(done, output, "down_text")
    down_command.check(failures)


@app.command()
def status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="name of a deployment [default: all]", autocompletion=known_names),
    ] = None,
    output: Output = Form.text,
) -> None:
    """Say what is up, where, and for how long still."""
    from mistralctl.commands import status as status_command

    with uncollected():
        found = status_command.run(deployed(name) if name else None)
    say(found, output, "status_text")
    status_command.check(found)


@app.command(epilog="Example: mistralctl logs smollm2-135m-instruct -f")
def logs(
    name: DeployedOrOnly,
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
    say(result, output, "reap_text")
    reap_command.check(result)


@app.command(epilog="Example: mistralctl extend mistral 2h")
def extend(
    name: DeployedName,
    duration: Annotated[str, typer.Argument(metavar="DURATION", help="how much longer: 30m, 2h, 1d")],
    output: Output = Form.text,
) -> None:
    """Put the end of a deployment's life off."""
    from mistralctl.commands import extend as extend_command

    say(extend_command.run(name, duration), output, "extended_text")


@app.command(epilog="Example: mistralctl receipt mistral -o json")
def receipt(name: DeployedOrOnly, output: Output = Form.text) -> None:
    """Print what was brought up, from what, where, and how it was checked; also after down."""
    from mistralctl.commands import receipt as receipt_command

    say(receipt_command.run(name), output, "receipt_text")


@app.command("eval", epilog="Examples: mistralctl eval mistral --limit 20; mistralctl eval --compare mistral mistral/my-adapter")
def evaluate(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="name of a deployment [default: the only one]; with --compare two of NAME, NAME/MODEL, FILE",
            autocompletion=known_names,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="ask nothing: print two evaluations beside each other, differences in standard errors"),
    ] = False,
    suite: Annotated[str, typer.Option("--suite", help="tasks that belong together; quick needs no hub")] = "quick",
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="TASK", help="only this task (repeatable, or with commas) [default: the suite's]"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="only the first so many items of each task")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="ADAPTER", help="an adapter that the deployment serves [default: its model]")
    ] = None,
    output: Output = Form.text,
) -> None:
    """Evaluate what a deployment serves with tasks of lm-eval; a run that was ended goes on."""
    from mistralctl.commands import eval as eval_command

    if compare:
        if tasks or limit or model:
            raise UserError("--compare: asks nothing and means nothing with --tasks, --limit or --model; leave them out")
        say(eval_command.compare(names or []), output, "compared_text")
        return
    if names and len(names) > 1:
        raise UserError(f"NAME: one deployment at a time is evaluated, and not {len(names)}; --compare takes two evaluations")
    from mistralctl import progress

    chosen = tuple(one for given in tasks or () for one in given.split(",") if one)
    asked = eval_command.Asked(deployed(names[0]) if names else only_one(), suite, chosen, limit, model or "")
    on_plan, on_progress = progress.of_requests(quiet=output is not Form.text)
    say(eval_command.run(asked, eval_command.Talk(on_plan, on_progress, note)), output, "evaluated_text")


@app.command(epilog="Example: mistralctl connect mistral, after a reboot of this machine")
def connect(name: DeployedOrOnly, output: Output = Form.text) -> None:
    """Open the tunnel to a deployment on a cloud again, on the same port."""
    from mistralctl.commands import connect as connect_command

    say(connect_command.run(name), output, "connect_text")


@app.command(context_settings={"ignore_unknown_options": True}, epilog="Example: mistralctl ssh mistral nvidia-smi")
def ssh(
    name: DeployedName,
    words: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]...", help="a command to run there")] = None,
) -> None:
    """Open a shell on a deployment's machine, or run a command there."""
    from mistralctl.runtime import ssh as node

    node.verify(name)
    command = node.command(name, *([] if words else ["-t"]), node.HOST, *(words or []))
    sys.stdout.flush()
    os.execvp(command[0], command)  # noqa: S606 - no shell, which is what we want


@app.command(epilog='Examples: eval "$(mistralctl env mistral)"; mistralctl env mistral --shell fish | source')
def env(
    name: DeployedOrOnly,
    shell: Annotated[shells.Shell, typer.Option(help="whose words")] = shells.Shell.sh,
    output: Output = Form.text,
) -> None:
    """Print what clients of the OpenAI API read: address, key, model, authorities."""
    from mistralctl.commands import env as env_command

    client = env_command.run(name)
    if output is Form.text:
        typer.echo(shells.lines(client.variables, shell))
    else:
        say(client, output)


@app.command(epilog='Examples: mistralctl chat mistral -m "Why is the sky blue?"; mistralctl chat mistral')
def chat(
    name: DeployedOrOnly,
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

    say(tables.models(), output, "models_text")


@app.command()
def gpus(output: Output = Form.text) -> None:
    """Print the table of GPUs, with prices, their date and their source."""
    from mistralctl.commands import tables

    say(tables.gpus(), output, "gpus_text")


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
            autocompletion=known_names,
        ),
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE",
            help="print a role for a cloud with this home's owner in it instead: aws, aws-node, azure, gcp, gcp-condition",
        ),
    ] = None,
    output: Output = Form.text,
) -> None:
    """Say what is missing on this machine or account, and the command that mends it."""
    from mistralctl.commands import doctor as doctor_command

    if role is not None:
        if cloud or node:
            raise UserError("--role: prints one file and means nothing with --cloud or --node; leave one of them out")
        sys.stdout.write(doctor_command.role(role))
    elif node is None:
        say(doctor_command.run(cloud or ()), output, "doctor_text")
    elif cloud:
        raise UserError("--node: asks one machine and means nothing with --cloud; leave one of the two out")
    else:
        say(doctor_command.node_facts(node), output, "node_text")


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
    text = f"mistralctl: {message}\n{details}{chr(10) if details else ''}"
    if documents.asked_for(sys.argv[1:]):
        text = documents.error(message, code, details) + "\n"
    if code == Exit.INTERRUPTED:  # threads may still wait for a network
        interrupts.at_once(text)
    sys.stderr.write(text)
    raise SystemExit(code)


def main() -> NoReturn:
    """The entry point: runs the command line and turns what went wrong into one line and an exit code."""
    debug = "--debug" in sys.argv or os.environ.get("MISTRALCTL_DEBUG", "") not in ("", "0")
    interrupts.listen()
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
        _end(interrupts.said(sys.argv[1:]), Exit.INTERRUPTED)
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
