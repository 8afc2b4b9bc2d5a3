"""`mistralctl finetune`: its options beside those of FinetuneSpec, and what it says while a run is at work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from mistralctl import flags
from mistralctl.answers import Form, Output, note, note_rights, say, say_task
from mistralctl.finetune_spec import FinetuneSpec

if TYPE_CHECKING:
    from mistralctl.commands.finetune import Step
    from mistralctl.config import Sourced

EVERY_SECONDS = 5.0  # at most one line of progress in so long


def on_step(*, quiet: bool) -> Callable[[Step], None]:
    """A function that tells the steps of a training on standard error, the last one always."""
    said = [0.0]

    def told(step: Step) -> None:
        if quiet or (time.monotonic() - said[0] < EVERY_SECONDS and step.step < step.steps):
            return
        said[0] = time.monotonic()
        from mistralctl.output import step_text

        sys.stderr.write(f"{step_text(step)}\n")
        sys.stderr.flush()

    return told


def _finetune(
    sourced: Sourced[FinetuneSpec],
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="print N examples, what is learnt in colour, and stop")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the chats, print the SkyPilot task and do nothing")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="begin anew: checkpoints at --out are removed")] = False,
    output: Output = Form.text,
) -> None:
    """Fine-tune a model on chats: checked and priced first, proven in vLLM, published for up --lora."""
    from mistralctl.commands import finetune

    planned = finetune.plan(sourced, note, show=show, colour=_in_colour())
    if show:
        typer.echo(planned.examples)
        return
    if dry_run:
        task = finetune.render(planned.run, restart=restart)
        say_task(task | {"plan": list(planned.run.lines)} if output is Form.json else task, output)
        for text in planned.run.lines if output is not Form.json else ():
            note(text)
        note_rights(planned.run.rights)
        return
    for text in planned.run.lines:
        note(text)
    note_rights(planned.run.rights)
    from mistralctl import progress

    quiet = output is not Form.text
    with progress.shown(quiet=quiet) as on_phase:
        result = finetune.run(sourced, planned, finetune.Talk(on_phase, on_step(quiet=quiet), note), restart=restart)
    say(result, output, "finetuned_text")


def _in_colour() -> bool:
    from mistralctl import chats

    return chats.in_colour(sys.stdout.isatty())


def add(app: typer.Typer) -> None:
    """Give an application the command `finetune`."""
    _finetune.__name__ = "finetune"
    app.command(
        epilog="Examples: mistralctl finetune --data chats.jsonl --out s3://bucket/adapter --dry-run; mistralctl finetune smollm2-135m-instruct "
        "--data chats.jsonl --out ./adapter --cloud local"
    )(flags.with_spec(_finetune, FinetuneSpec))
