"""The canary's figures that a first engine made: a copy on this machine, which goes to every later node that serves the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral_contract import figures, files

from mistralctl import own_files, runtime, state
from mistralctl.errors import UserError
from mistralctl.state import Record


def _folder() -> Path:
    return state.home() / files.CANARIES.name


def known(model: str, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The figures of all weights of a model that were ever served from here.

    Those that are damaged are set aside, of which `note` is told: the next engine is compared with what its node has kept, or makes them anew.
    UserError if another user may have written them.
    """
    found = []
    for path in sorted(_folder().glob("*.json")):
        try:
            one = figures.read(own_files.read(path), path.stem)
        except FileNotFoundError:  # another command has set it aside
            continue
        except (OSError, ValueError) as error:
            kept = path.with_name(f"{path.name}.damaged")
            with suppress(FileNotFoundError):
                path.replace(kept)
            note(
                f"the canary's figures {path} are damaged ({error}) and now lie in {kept.name}; if this machine is to be held to them, restore "
                "them before the next up: without them an engine is compared with what its node has kept, or with itself"
            )
            continue
        if one.get("model") == model:
            found.append(one)
    return found


def keep(record: Record, canary: dict[str, Any] | None) -> None:
    """Copies what a node's engine was compared with, or made, if it is not here yet: the first figures of some weights stay the first."""
    key = (canary or {}).get("weights")
    if not figures.is_key(key) or (path := _folder() / f"{key}.json").exists():
        return
    from filelock import FileLock

    with suppress(OSError, UserError, ValueError):  # a node that is out of reach, or has none: no `up` fails for that
        text = json.dumps(figures.read(runtime.of(record.cloud).read(record, f"{files.CANARIES.name}/{key}.json"), str(key)))
        with FileLock(own_files.folder(_folder()) / ".lock", mode=0o600):
            if not path.exists():
                state.write_private(path, f"{text}\n")
