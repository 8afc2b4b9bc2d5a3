"""Who a machine belongs to: an id that each home makes before its first machine and keeps, which is the label `mistralctl-owner` of its machines."""

from __future__ import annotations

import getpass
import os
import platform
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from mistralctl import own_files, state
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record
from mistralctl.tasks import digest, owner_label

FORM = re.compile(r"[a-z0-9_-]{1,63}")  # what every cloud takes as a label's value
FILE = "owner"
Asked = tuple[str | None, str | None]  # an owner and a deployment; None: any


def current(environ: Mapping[str, str]) -> str:
    """Return the owner of what is brought up from now on: a hash of MISTRALCTL_OWNER, or this home's id.

    Before the first machine there is no id, because a dry run writes nothing; then it is what older versions took.
    """
    if given := environ.get("MISTRALCTL_OWNER"):
        return digest(given)
    path = state.home(environ) / FILE
    try:
        found = own_files.read(path).strip()
    except (FileNotFoundError, NotADirectoryError):
        return former()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); make it readable for you alone: chmod 600 {path}", Exit.CONFLICT
        ) from error
    if not FORM.fullmatch(found):
        raise UserError(
            f"{path} does not hold an owner's id; write into it the value of the label mistralctl-owner that your machines have, or "
            "delete it if you have none: the next up makes another id",
            Exit.CONFLICT,
        )
    return found


def make(environ: Mapping[str, str]) -> None:
    """Write this home's id before its first machine, unless it has one or another process is faster; UserError if it cannot be written."""
    from filelock import FileLock

    path = state.home(environ) / FILE
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(path.with_name(f".{FILE}.lock"), mode=0o600):
                if not path.exists():
                    state.write_private(path, f"{secrets.token_hex(10)}\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); set MISTRALCTL_HOME to a folder of yours", Exit.MACHINE) from error


def former() -> str:
    """Return the owner that older versions took: a hash of the user's and this machine's name. Machines may still bear it."""
    return digest(f"{getpass.getuser()}@{platform.node()}")


def label(record: Record | None) -> str:
    """Return the owner's label of a deployment: that of the machine that it has, or the current one for a new machine."""
    kept = owner_label(record.task) if record is not None and record.state != "down" else ""
    return kept or current(os.environ)


def known(environ: Mapping[str, str]) -> list[Asked]:
    """Return what this home's machines may bear: its owner, the older hash, and the owners in its records, each for that deployment alone.

    With MISTRALCTL_OWNER it is that one alone.
    """
    if environ.get("MISTRALCTL_OWNER"):
        return [(current(environ), None)]
    found: dict[Asked, None] = {(current(environ), None): None, (former(), None): None}
    for name in state.names():
        try:
            record = state.read(name)
        except UserError:  # a record that is damaged hides no other
            continue
        owner = owner_label(record.task) if record is not None else ""
        if owner and (owner, None) not in found:
            found[owner, name] = None
    return list(found)


def skypilot_user(environ: Mapping[str, str] = os.environ) -> str:
    """Return SkyPilot's hash of this user, which ends the names of its clusters on a cloud; empty where it never ran."""
    try:
        return environ.get("SKYPILOT_USER_ID") or Path("~/.sky/user_hash").expanduser().read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
