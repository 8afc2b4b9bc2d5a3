"""`mistralctl keys`: who may ask a deployment, and how much; changed while it serves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mistral_contract import keys as contract
from mistral_contract.keys import Key, Keys

from mistralctl import durations, key_places, keys, state
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record


@dataclass(frozen=True)
class Row:
    """A key and what was asked with it. Times are in seconds since the epoch; None: no limit, or a count that is not known here."""

    id: str
    name: str
    created: float
    expires: float | None
    requests_at_once: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    own: bool
    requests: int | None
    tokens: int | None
    refused: int | None


@dataclass(frozen=True)
class KeyList:
    """The keys of a deployment; `live` says that its node was asked what it counted, `why` why it was not although it is up.

    Without a `--keys-uri` they are then those of the next `up`.
    """

    name: str
    live: bool
    keys: tuple[Row, ...]
    why: str = ""


@dataclass(frozen=True)
class KeyChange:
    """What was changed. `key` is a new key that is stored nowhere, `key_file` where this laptop's own lies; `effective`: now, within 5 seconds (by an
    object in a bucket), or with the next up."""

    name: str
    action: str
    id: str
    key_name: str
    key: str
    key_file: str
    effective: str
    expires: float | None = None
    old_id: str = ""
    old_expires: float | None = None


@dataclass(frozen=True)
class Wanted:
    """The options of a new key, as they were typed."""

    name: str = ""
    key_file: Path | None = None
    requests_at_once: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    expires: str = "never"

    @property
    def limits(self) -> dict[str, int | None]:
        """Those that a key has."""
        return {limit: getattr(self, limit) for limit in contract.LIMITS}


def _later(option: str, text: str) -> float | None:
    try:
        minutes = durations.minutes(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    return None if minutes is None else round(time.time() + 60 * minutes, 3)


def _current(found: Keys) -> list[Key]:
    """Without those whose time is over."""
    now = time.time()
    return [key for key in found.keys if not key.expired(now)]


def _one(found: Keys, wanted: str, name: str) -> Key:
    """The key of an id, or of a name that only one has."""
    matching = [key for key in found.keys if wanted in (key.id, key.name)]
    if len(matching) != 1:
        what = f"{len(matching)} keys are named {wanted}; give an id" if matching else f"there is no key {wanted!r}"
        raise UserError(f"{name}: {what}; mistralctl keys {name} list shows them", Exit.CONFLICT if matching else Exit.NOT_FOUND)
    return matching[0]


@contextmanager
def _alone(name: str) -> Iterator[Record]:
    """The record of a deployment that nobody else on this laptop changes meanwhile."""
    state.known(name)
    with state.locked(name, "keys"):
        yield state.known(name)


def run(name: str) -> KeyList:
    """The keys of a deployment, with what was asked with each as far as its node can be asked."""
    record = state.known(name)
    place = key_places.of(record)
    found, own = place.read().keys, keys.own(name, keys.known(name))
    counted, why = None, ""
    if record.state == "up":
        try:
            counted = key_places.usage(record).get("keys", {})
        except UserError as error:  # of keys in a bucket all but the counts is known
            if not isinstance(place, key_places.Bucket):
                raise
            why = f"cannot be asked what was counted: {error}"
    rows = []
    for key in found.keys:
        counts = {} if counted is None else {"requests": 0, "tokens": 0, "refused": 0} | (counted.get(key.id) or {})
        mine = own is not None and own.sha256 == key.sha256
        seen = {field.name: getattr(key, field.name, None) for field in fields(Row)}
        rows.append(Row(**seen | {"own": mine, **{name: counts.get(name) for name in ("requests", "tokens", "refused")}}))
    return KeyList(name, counted is not None, tuple(rows), why)


def add(name: str, wanted: Wanted) -> KeyChange:
    """Lets another key in; it is in the result and nowhere else, unless the user brought it."""
    secret = keys.brought(wanted.key_file) if wanted.key_file else keys.generate()
    expires = _later("--expires", wanted.expires)
    made: list[Key] = []

    def change(found: Keys) -> Keys:
        if any(one.sha256 == contract.digest(secret) for one in found.keys):
            raise UserError(f"{name} has this key already; mistralctl keys {name} list shows it", Exit.CONFLICT)
        made.append(keys.entry(secret, wanted.name or f"key-{len(found.keys)}", expires=expires, **wanted.limits))
        return found.changed([*_current(found), made[-1]])

    with _alone(name) as record:
        place = key_places.of(record)
        effective = place.settle(key_places.changed(place, name, change))
    shown = "" if wanted.key_file else secret
    return KeyChange(name, "added", made[-1].id, made[-1].name, shown, "", effective, expires)


def revoke(name: str, wanted: str) -> KeyChange:
    """Shuts a key out; answers that run with it run on."""
    gone: list[Key] = []

    def change(found: Keys) -> Keys:
        key = _one(found, wanted, name)
        mine = keys.own(name, found)
        if mine is not None and key.id == mine.id:
            raise UserError(
                f"{wanted} is this laptop's own key; run mistralctl keys {name} rotate, or mistralctl down {name}", Exit.CONFLICT
            )
        gone.append(key)
        return found.changed(one for one in _current(found) if one.id != key.id)

    with _alone(name) as record:
        place = key_places.of(record)
        effective = place.settle(key_places.changed(place, name, change))
    return KeyChange(name, "revoked", gone[-1].id, gone[-1].name, "", "", effective)


def rotate(name: str, wanted: str, key_file: Path | None, grace: str) -> KeyChange:
    """Exchanges a key, this laptop's own if none is named: a new one with the same limits is let in, then the old one stays for `grace`."""
    secret = keys.brought(key_file) if key_file else keys.generate()
    until = _later("--grace", grace)
    if until is None:
        raise UserError("--grace: never would keep the old key; write for example 10m")
    pairs: list[tuple[Key, Key, bool]] = []  # the old one, the new one, and whether they are this laptop's own

    def begin(found: Keys) -> Keys:
        mine = keys.own(name, found)
        old = _one(found, wanted, name) if wanted else mine
        if old is None:
            raise UserError(f"{name}: this laptop's own key is none of its keys; run {state.again(name)} again", Exit.CONFLICT)
        made = keys.entry(secret, keys.OWN if old == mine else old.name)
        made = replace(old, id=made.id, sha256=made.sha256, created=made.created)
        if any(key.sha256 == made.sha256 for key in found.keys):
            raise UserError(f"{name} has this key already; give another one", Exit.CONFLICT)
        pairs.append((old, made, old == mine))
        return found.changed([*_current(found), made])

    with _alone(name) as record:
        place = key_places.of(record)
        place.settle(key_places.changed(place, name, begin))
        old, made, own = pairs[-1]
        path = state.folder(name) / "api_key"
        if own:  # from now on this laptop asks with the new one; whatever goes wrong later, it has one that is let in
            if record.state == "up" and isinstance(place, key_places.Bucket):
                key_places.let_in(record, secret)
            state.write_private(path, f"{secret}\n")
        last = min(until, old.expires or until)
        found = key_places.changed(
            place,
            name,
            lambda found: found.changed(replace(key, expires=last) if key.id == old.id else key for key in found.keys),
        )
        effective = place.settle(found)
    shown = "" if own or key_file else secret
    return KeyChange(
        name, "rotated", made.id, made.name, shown, str(path) if own else "", effective, made.expires, old.id, last
    )  # fmt: skip
