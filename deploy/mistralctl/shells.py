"""Environment variables in the words of a shell or of a file that tools read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from enum import Enum


class Shell(str, Enum):
    """Who reads the variables."""

    sh = "sh"
    fish = "fish"
    powershell = "powershell"
    dotenv = "dotenv"
    json = "json"


def _fish(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _powershell(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


LINES: Mapping[Shell, Callable[[str, str], str]] = {
    Shell.sh: lambda name, value: f"export {name}={shlex.quote(value)}",
    Shell.fish: lambda name, value: f"set -gx {name} {_fish(value)}",
    Shell.powershell: lambda name, value: f"$Env:{name} = {_powershell(value)}",
    Shell.dotenv: lambda name, value: f"{name}={_fish(value)}",  # as python-dotenv reads it
}


def lines(variables: Mapping[str, str], shell: Shell) -> str:
    """Return what sets the variables there.

    >>> lines({"KEY": "it's"}, Shell.powershell)
    "$Env:KEY = 'it''s'"
    """
    if shell is Shell.json:
        return json.dumps(variables, indent=2)
    return "\n".join(LINES[shell](name, value) for name, value in variables.items())
