"""`mistralctl keys NAME ...`: the options of its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mistralctl.answers import Commands, DeployedName, Form, Output, say

app = typer.Typer(
    help="Keys: who may ask a deployment, and how much; changed while it serves.", cls=Commands, rich_markup_mode=None
)

Limit = Annotated[int | None, typer.Option(metavar="N", min=1, max=1_000_000_000_000, help="no more than N [default: no limit]")]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="bring your own key: 128 bits or more, in the file's one line")
]
KeyName = Annotated[str, typer.Argument(metavar="KEY", help="id or name of a key", show_default=False)]


@app.callback()
def _keys(context: typer.Context, name: DeployedName) -> None:
    context.obj = name


@app.command("list", epilog="Example: mistralctl keys mistral list -o json")
def keys_list(context: typer.Context, output: Output = Form.text) -> None:
    """Print the keys with their limits, and what was asked with each."""
    from mistralctl.commands import keys

    say(keys.run(context.obj), output, "keys_text")


@app.command("add", epilog="Example: mistralctl keys mistral add --name ci --requests-per-minute 60 --expires 30d")
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
    say(keys.add(context.obj, wanted), output, "key_change_text")


@app.command("revoke", epilog="Example: mistralctl keys mistral revoke ci")
def keys_revoke(context: typer.Context, key: KeyName, output: Output = Form.text) -> None:
    """Shut a key out."""
    from mistralctl.commands import keys

    say(keys.revoke(context.obj, key), output, "key_change_text")


@app.command("rotate", epilog="Examples: mistralctl keys mistral rotate; mistralctl keys mistral rotate ci --grace 1h")
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

    say(keys.rotate(context.obj, key, key_file, grace), output, "key_change_text")
