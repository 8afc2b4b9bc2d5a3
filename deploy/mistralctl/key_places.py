"""Where the keys of a deployment lie, and how they are changed there so that nobody's change is lost.

On its node while it is up; in an object of a bucket where it has a `--keys-uri`; else on this laptop, for its next `up`. Each place gives what it
holds with a stamp, and replaces that only if it is still there: who was slower reads again and makes the same change anew.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mistral_contract import files
from mistral_contract import keys as contract
from mistral_contract.keys import Keys

from mistralctl import keys, readiness, reported, runtime
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record
from mistralctl.tasks import env

HEARD_SECONDS = 15.0
TRIES = 20
# A node looks every 3 s at the object and its guard every 0.4 s at what came.
NOW, LATER, SOON = "now", "with the next up", "within 5 seconds"


@dataclass(frozen=True)
class Held:
    """The keys that a place holds; `stamp` tells them from those of another moment."""

    keys: Keys
    stamp: str


class Place(Protocol):
    """A place for keys."""

    def read(self) -> Held:
        """What it holds now; UserError if that cannot be read."""

    def replace(self, before: Held, after: Keys) -> bool:
        """Puts these there; False if it holds others by now than those before."""

    def settle(self, after: Keys) -> str:
        """Waits until a server that can be asked has them; when they are in force."""


@dataclass(frozen=True)
class Laptop:
    """This laptop's file, for the next `up`."""

    name: str

    def read(self) -> Held:
        return Held(keys.known(self.name), "")

    def replace(self, before: Held, after: Keys) -> bool:
        return True  # what `changed` saves is all

    def settle(self, after: Keys) -> str:
        return LATER


@dataclass(frozen=True)
class Node:
    """The file on the node of a deployment that is up."""

    record: Record

    def read(self) -> Held:
        name = self.record.name
        text = runtime.of(self.record.cloud).read(self.record, files.KEYS_FILE.of(name))
        if not text:
            raise UserError(
                f"{name}: its node has no file of keys; run {self.record.again} again, which replaces a server of an earlier version",
                Exit.CONFLICT,
            )
        try:
            return Held(contract.read(text), text)
        except ValueError as error:
            raise UserError(
                f"{name}: {files.KEYS_FILE.name} of its node {error}; run {self.record.again} again", Exit.CONFLICT
            ) from error

    def replace(self, before: Held, after: Keys) -> bool:
        return runtime.of(self.record.cloud).exchange(self.record, after.dump() + "\n", before.stamp)

    def settle(self, after: Keys) -> str:
        deadline = time.monotonic() + HEARD_SECONDS
        while usage(self.record).get("serial", 0) < after.serial:  # a later change may have come meanwhile
            if time.monotonic() > deadline:
                name = self.record.name
                raise UserError(
                    f"{name}: the keys are on its node, but its server has not read them; mistralctl status {name} says why",
                    Exit.SERVER,
                )
            time.sleep(0.1)
        return NOW


@dataclass(frozen=True)
class Bucket:
    """An object that nodes follow. Where nothing is there yet, what this laptop knows is what it will hold."""

    name: str
    uri: str
    up: bool = False

    def read(self) -> Held:
        from mistralctl import weights

        found = weights.read_object(self.uri)
        if found is None:
            return Held(keys.known(self.name), "")
        try:
            return Held(contract.read(found.data.decode("utf-8", "replace")), found.version)
        except ValueError as error:
            raise UserError(f"--keys-uri: {self.uri} {error}; correct it, or delete it", Exit.CONFLICT) from error

    def replace(self, before: Held, after: Keys) -> bool:
        from mistralctl import weights

        return weights.replace_object(self.uri, after.dump() + "\n", before.stamp)

    def settle(self, after: Keys) -> str:
        return SOON if self.up else LATER


def of(record: Record) -> Place:
    """The place of a deployment's keys now."""
    up = record.state == "up"
    if uri := env(record.task, "keys_uri"):
        return Bucket(record.name, uri, up)
    return Node(record) if up else Laptop(record.name)


def changed(place: Place, name: str, change: Callable[[Keys], Keys]) -> Keys:
    """Makes a change where the keys lie, again on what is there by then if somebody was quicker; the keys from then on, remembered here.

    UserError if there are too many of them, or what `change` itself raises.
    """
    for attempt in range(TRIES):
        before = place.read()
        after = change(before.keys)
        if len(after.keys) > contract.MOST_KEYS or len(after.dump()) > contract.LARGEST:
            raise UserError(
                f"{name} has {len(after.keys)} keys, and {contract.MOST_KEYS} are the most; revoke some", Exit.CONFLICT
            )
        if (after == before.keys and before.stamp) or place.replace(before, after):
            keys.save(name, after)
            return after
        time.sleep(random.uniform(0.05, 0.2) * min(attempt + 1, 5))  # noqa: S311 - so that two do not meet again
    raise UserError(f"{name}: others change its keys again and again; try again", Exit.CONFLICT)


def join(name: str, uri: str) -> None:
    """Lets this laptop's own key in by the object at `uri`, which is made where it is missing; UserError if it may not be read or written."""
    mine = keys.own(name, keys.known(name))
    if mine is None:
        raise ValueError("this laptop has a key before it joins")

    def change(found: Keys) -> Keys:
        there = any(key.sha256 == mine.sha256 for key in found.keys)
        return found if there else found.changed([*found.keys, mine])

    changed(Bucket(name, uri), name, change)


def leave(record: Record) -> str:
    """Takes this laptop's own key out of the object of a deployment that is to end; why it could not be, empty if nothing of it is left there."""
    uri, mine = env(record.task, "keys_uri"), keys.own(record.name, keys.known(record.name))
    if not uri or mine is None:
        return ""

    def change(found: Keys) -> Keys:
        kept = [key for key in found.keys if key.sha256 != mine.sha256]
        return found.changed(kept) if len(kept) < len(found.keys) else found

    place = Bucket(record.name, uri)
    try:
        if place.read().stamp:
            changed(place, record.name, change)
    except UserError as error:
        return f"its key {mine.id} is still let in by {uri}: {error}"
    return ""


def let_in(record: Record, secret: str) -> None:
    """Waits until the server of a deployment lets a new key in; UserError if it does not in time."""
    deadline = time.monotonic() + HEARD_SECONDS
    while not readiness.answers(record, secret):
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: the new key is in {env(record.task, 'keys_uri')}, but its server does not let it in; the old one stays this "
                f"laptop's own; mistralctl status {record.name} says why", Exit.SERVER,
            )  # fmt: skip
        time.sleep(0.2)


def usage(record: Record) -> dict[str, Any]:
    """What the guard of a deployment that is up has counted, and the serial of the keys that it knows; empty if there is nothing."""
    return reported.usage(runtime.of(record.cloud).read(record, files.USAGE.of(record.name)))
