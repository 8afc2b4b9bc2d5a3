"""The weights tool on the laptop: the very sources that a node gets, from the folder that travels with this package.

The one module that imports `mistral_weights`; its errors become ours here. Each store needs an SDK, which comes with an
extra of mistralctl.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mistral_contract import files

from mistralctl import package_dir
from mistralctl.clouds import buckets, facts
from mistralctl.errors import Exit, UserError

sys.path.insert(0, str(package_dir("model") / "weights"))

from mistral_weights import writable
from mistral_weights.cli import text
from mistral_weights.describe import Describe, Described, describe
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.events import Report
from mistral_weights.fetch import fetch
from mistral_weights.ls import Listed, Ls, ls
from mistral_weights.mirror import Mirror, Mirrored, mirror
from mistral_weights.objects import Found, open_object
from mistral_weights.patience import Patience
from mistral_weights.peek import Peeked, peek
from mistral_weights.progress import progress
from mistral_weights.pull import Pull, Pulled, pull
from mistral_weights.verify import Verified, Verify, verify

__all__ = [
    "Described", "Kind", "Listed", "Ls", "Mirror", "Mirrored", "Peeked", "Pull", "Pulled", "Report", "Verified", "Verify",
    "described", "explained", "hub_token", "ls", "may_pull", "mirror", "progress", "pull", "text", "verify",
]  # fmt: skip

CODES = {
    Kind.USAGE: Exit.USAGE,
    Kind.NOT_FOUND: Exit.NOT_FOUND,
    Kind.DENIED: Exit.CLOUD,
    Kind.CHANGED: Exit.CONFLICT,
    Kind.DAMAGED: Exit.WEIGHTS,
    Kind.UNREACHABLE: Exit.NETWORK,
    Kind.DISK: Exit.MACHINE,
    Kind.BUSY: Exit.CONFLICT,
    Kind.REFUSED: Exit.WEIGHTS,
    Kind.MISSING: Exit.MACHINE,
    Kind.INTERRUPTED: Exit.INTERRUPTED,
}
HUB = "hf://"
# Long enough for a slow hub, short enough to wait for before a machine is rented.
BRIEFLY = Patience(connect=5.0, stall=15.0, tries=3, tries_refused=1, longest_wait=2.0)
LOOK_SECONDS = 30.0


@contextmanager
def explained() -> Iterator[None]:
    """What the tool raises inside, as the one kind of error that a user sees."""
    try:
        yield
    except WeightsError as error:
        message = str(error)
        for scheme, bucket in buckets().items():  # the SDKs of the other stores are always there
            message = message.replace(f"install mistral-weights[{scheme}]", facts(bucket.cloud).install)
        raise UserError(message, CODES[error.kind]) from error
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command again: it continues where it was", Exit.INTERRUPTED) from None


def _hub_is_off() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def described(uri: str, revision: str = "", place: str = "") -> Described | None:
    """What weights are, by a look at them; UserError, beginning with `place`, if they are damaged or nothing can serve them.

    None where this machine cannot look, and that says nothing of the node, which has a role of its own: no SDK or pip here, no right to the
    bucket, no way to it or to pip's index, a wheel too large for LOOK_SECONDS, HF_HUB_OFFLINE.
    """
    scheme = uri.partition("://")[0]
    if scheme == "hf" and _hub_is_off():
        return None
    patience = BRIEFLY if scheme == "hf" else replace(BRIEFLY, tries=1)
    try:
        return describe(Describe(uri, revision, patience=patience, seconds=LOOK_SECONDS))
    except WeightsError as error:
        if scheme in (*buckets(), "pypi") and error.kind in (Kind.DENIED, Kind.MISSING, Kind.UNREACHABLE):
            return None
        theirs = error.kind in (Kind.DENIED, Kind.UNREACHABLE)  # not a fault of what was written there
        raise UserError(str(error) if theirs or not place else f"{place}: {error}", CODES[error.kind]) from error


def hub_token() -> str | None:
    """This user's token for the hub: HF_TOKEN, or what `hf auth login` left."""
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def may_pull(sources: Iterable[tuple[str, str]]) -> None:
    """Asks the hub for a byte of each (URI, revision) of it that serving needs: UserError, naming the page, if it refuses.

    Only the hub is asked: a bucket is read by a node's role, of which this machine knows nothing. HF_ENDPOINT names
    another hub; with HF_HUB_OFFLINE nobody is asked.
    """
    if _hub_is_off():
        return
    with explained():
        for uri, revision in sources:
            if uri.startswith(HUB):
                ls(Ls(uri, revision, patience=BRIEFLY))


def read_object(uri: str) -> Found | None:
    """A small object with its version, by this machine's credentials; None if nothing is there. UserError if it cannot be read."""
    with explained():
        try:
            return open_object(uri).get()
        except WeightsError as error:
            if error.kind is Kind.NOT_FOUND:
                return None
            raise


def replace_object(uri: str, text: str, version: str) -> bool:
    """Replaces the version that was read, empty where nothing was there; False if another one is there by now."""
    with explained():
        try:
            open_object(uri).put(text.encode(), version)
        except WeightsError as error:
            if error.kind is Kind.CHANGED:
                return False
            raise
        return True


def fetched(uri: str, target: Path, most: int) -> bool:
    """Bring one file of a bucket, of at most so many bytes; False where this machine cannot look, which says nothing of the node's role."""
    try:
        fetch(uri, target, most, replace(BRIEFLY, tries=1))
    except WeightsError as error:
        if error.kind in (Kind.DENIED, Kind.MISSING, Kind.UNREACHABLE):
            return False
        raise UserError(str(error), CODES[error.kind]) from error
    return True


def sealed_revision(uri: str) -> str | None:
    """Return the revision of the sealed folder at an address; None if there is none. UserError if that cannot be seen."""
    try:
        return ls(Ls(uri, form="folder", patience=replace(BRIEFLY, tries=1))).revision
    except WeightsError as error:
        if error.kind in (Kind.NOT_FOUND, Kind.DAMAGED):
            return None
        raise UserError(str(error), CODES[error.kind]) from error


def may_write(uri: str) -> None:
    """Write a small file to an address and take it away again; UserError if this machine may not."""
    with explained():
        writable.may_write(uri, replace(BRIEFLY, tries=1))


def strangers(uri: str, below: Iterable[str]) -> tuple[str, ...]:
    """Return the files at an address that no push put there, but for those in the folders `below`; UserError if that cannot be seen."""
    with explained():
        return writable.strangers(uri, below, replace(BRIEFLY, tries=1))


@contextmanager
def briefly(uri: str) -> Iterator[Peeked | None]:
    """What a store holds of a set; None if HF_HUB_OFFLINE keeps the hub from being asked."""
    if uri.startswith(HUB) and _hub_is_off():
        yield None
        return
    patience = BRIEFLY if uri.startswith(HUB) else replace(BRIEFLY, tries=1)
    with explained(), peek(Ls(uri, patience=patience)) as found:
        yield found


def is_there(folder: Path) -> bool:
    """Whether a set of weights lies in a folder."""
    return (folder / files.MANIFEST.name).is_file()
