"""`mistralctl weights ...`: the options of its commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mistralctl.answers import Commands, Form, Output, note, note_rights, say, say_result, say_task
from mistralctl.errors import UserError

app = typer.Typer(
    help="Weights: pulled, mirrored to a bucket of yours, verified to the last bit.", cls=Commands, rich_markup_mode=None
)


@app.callback()
def _weights() -> None:
    from mistralctl import system

    system.require_renting("weights")


Revision = Annotated[str, typer.Option(metavar="COMMIT", help="commit, tag or branch of a hub's repository")]
Digest = Annotated[str, typer.Option(metavar="sha256:HEX", help="what the set must have; pull and verify print it")]
Weights = Annotated[
    str, typer.Argument(metavar="URI", help="hf:// s3:// gs:// az:// file:// pypi://, or a row of `mistralctl models`")
]


@app.command(
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

    if spec.terms:
        note(spec.terms)
    if dry_run:
        say_task(weights.render(spec), output)
        note_rights(mirror.rights(spec))
        return
    from mistralctl import progress

    if not here:
        with progress.shown(quiet=output is not Form.text) as on_phase:
            there = weights.mirror_there(spec, on_phase, note)
        say(there, output, "mirrored_text")
        return

    with progress.of_bytes(output.value) as report:
        result = weights.mirror_here(spec, stage, report)
    say_result(result, output)


@app.command("pull", epilog="Example: mistralctl weights pull s3://bucket/v01 weights/v01")
def weights_pull(
    uri: Weights,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="appears when the set is complete and right")],
    revision: Revision = "",
    full: Annotated[bool, typer.Option("--full", help="hash every byte of a set that is there already")] = False,
    digest: Digest = "",
    output: Output = Form.text,
) -> None:
    """Bring weights into a folder; run again after any failure, it continues."""
    from mistralctl import progress
    from mistralctl.commands import weights

    with progress.of_bytes(output.value) as report:
        result = weights.pull(weights.Source(uri, revision, digest), folder, report, full=full)
    say_result(result, output)


@app.command("verify", epilog="Examples: mistralctl weights verify s3://bucket/v01; mistralctl weights verify weights/v01")
def weights_verify(
    where: Annotated[str, typer.Argument(metavar="URI|DIR", help="a URI, or a folder of this machine")],
    revision: Revision = "",
    digest: Digest = "",
    output: Output = Form.text,
) -> None:
    """Read every byte of a set and hold it against its manifest."""
    from mistralctl import progress
    from mistralctl.commands import weights

    with progress.of_bytes(output.value) as report:
        result = weights.verify(weights.Source(where, revision, digest), report)
    say_result(result, output)
    weights.check(result)


@app.command("ls", epilog="Example: mistralctl weights ls hf://mistralai/Mistral-7B-Instruct-v0.1")
def weights_ls(uri: Weights, revision: Revision = "", output: Output = Form.text) -> None:
    """List what lies at a place, what a pull brings of it, and whether you may read it."""
    from mistralctl.commands import weights

    say(weights.ls(uri, revision), output, "weights_text")
