"""The keys of a deployment: this laptop's own as it is, and those of all who may ask as hashes, which go to the node."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral_contract import files
from mistral_contract import keys as contract
from mistral_contract.keys import Key, Keys

from mistralctl import own_files, state
from mistralctl.errors import Exit, UserError

OWN = "own"  # the name of the key that `up` makes
MOST_BYTES = 4096  # of a file with a key: more than the longest one has, and /dev/zero has no end
HINT = "openssl rand -hex 32 > FILE; chmod 600 FILE"


def file(name: str) -> Path:
    """Where this laptop keeps what it last knew of a deployment's keys: hashes only."""
    return state.folder(name) / files.KEYS_FILE.name


def known(name: str) -> Keys:
    """The keys as this laptop last knew them; UserError if the file is damaged."""
    try:
        return contract.read(own_files.read(file(name)))
    except (FileNotFoundError, NotADirectoryError):
        return Keys()
    except ValueError as error:
        raise UserError(f"{file(name)} is damaged ({error}); delete it", Exit.CONFLICT) from error


def sent(name: str) -> str:
    """What the task carries of them; empty where there is none yet."""
    found = known(name)
    return found.dump() if found.keys else ""


def save(name: str, found: Keys) -> None:
    """Remembers them."""
    state.write_private(file(name), found.dump() + "\n")


def generate() -> str:
    """A new key of 256 random bits."""
    return f"mctl-{secrets.token_urlsafe(32)}"


def brought(path: Path, option: str = "--key-file") -> str:
    """The key in a user's own file; UserError if it is none, or one that could be guessed."""
    try:
        with path.open("rb") as file:
            return contract.check_secret(file.read(MOST_BYTES).decode("utf-8").strip())
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror}; make one with: {HINT}") from error
    except ValueError as error:  # also of bytes that are no text
        reason = "is no text" if isinstance(error, UnicodeError) else error
        raise UserError(f"{option}: {path}: {reason}") from None


def entry(secret: str, name: str, **limits: Any) -> Key:
    """A key as others may know it, made now; UserError naming what is wrong with it."""
    try:
        return contract.make(secret, name, round(time.time(), 3), **limits)
    except ValueError as error:
        raise UserError(str(error)) from None


def own(name: str, found: Keys) -> Key | None:
    """The entry of this laptop's own key."""
    path = state.folder(name) / "api_key"
    hashed = contract.digest(state.api_key(name)) if path.exists() else ""
    return next((key for key in found.keys if key.sha256 == hashed), None)


def _was_used(name: str) -> bool:
    """Whether this laptop's key is older than the end of a deployment's last life; one that was rotated since then is not."""
    folder = state.folder(name)
    with suppress(FileNotFoundError):
        return (folder / "api_key").stat().st_mtime_ns <= (folder / "record.json").stat().st_mtime_ns
    return False


def prepare(name: str, key_file: Path | None, *, running: bool) -> None:
    """Makes sure that this laptop has a key of its own, the one in `key_file` if given, and that it is one of the deployment's.

    A deployment that was down gets another key than in its last life, whose key clients and logs may still hold.

    UserError if another key is in use: only `keys rotate` exchanges it without losing a request.
    """
    path = state.folder(name) / "api_key"
    found = known(name)
    if key_file is not None:
        secret = brought(key_file)
        if path.exists() and secret != state.api_key(name):
            if running:
                raise UserError(
                    f"--key-file: {name} is up with another key; run mistralctl keys {name} rotate --key-file {key_file}",
                    Exit.CONFLICT,
                )
            before = own(name, found)
            found = found.changed(key for key in found.keys if key is not before)
        state.write_private(path, f"{secret}\n")
    elif path.exists() and not running and _was_used(name):
        before = own(name, found)
        found = found.changed(key for key in found.keys if key is not before)
        state.write_private(path, f"{generate()}\n")
    secret = state.api_key(name)
    if own(name, found) is None:
        found = found.changed((*found.keys, entry(secret, OWN)))
    if found != known(name):
        save(name, found)
