"""`mistralctl keys`: who may ask a deployment, and how much; changed while it serves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mistral_contract import files
from mistral_contract import keys as contract
from mistral_contract.keys import Key, Keys

from mistralctl import durations, keys, runtime, state
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record

HEARD_SECONDS = 15.0
NOW, LATER = "now", "with the next up"


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
    """The keys of a deployment; `live` says that its node was asked, else they are those of the last time, or of the next `up`."""

    name: str
    live: bool
    keys: tuple[Row, ...]


@dataclass(frozen=True)
class KeyChange:
    """What was changed. `key` is a new key that is stored nowhere, `key_file` where this laptop's own lies; `effective`: now, or with the next up."""

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


def _is_up(record: Record) -> bool:
    return record.state == "up"


def _there(record: Record) -> Keys:
    """The keys in force: the node's where it runs, else those of the next `up`."""
    if not _is_up(record):
        return keys.known(record.name)
    text = runtime.of(record.cloud).read(record, files.KEYS_FILE.of(record.name))
    if not text:
        raise UserError(
            f"{record.name}: its node has no file of keys; run mistralctl up again, which replaces a server of an earlier version",
            Exit.CONFLICT,
        )
    try:
        return contract.read(text)
    except ValueError as error:
        raise UserError(
            f"{record.name}: {files.KEYS_FILE.name} of its node {error}; run mistralctl up again", Exit.CONFLICT
        ) from error


def _usage(record: Record) -> dict[str, Any]:
    try:
        found = json.loads(runtime.of(record.cloud).read(record, files.USAGE.of(record.name)))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _put(record: Record, found: Keys) -> str:
    """Makes these the deployment's keys, here and on its node; when they are in force."""
    if len(found.keys) > contract.MOST_KEYS or len(found.dump()) > contract.LARGEST:
        raise UserError(
            f"{record.name} has {len(found.keys)} keys, and {contract.MOST_KEYS} are the most; revoke some", Exit.CONFLICT
        )
    if not _is_up(record):
        keys.save(record.name, found)
        return LATER
    runtime.of(record.cloud).write(record, files.KEYS_FILE.of(record.name), found.dump() + "\n")
    keys.save(record.name, found)
    deadline = time.monotonic() + HEARD_SECONDS
    while _usage(record).get("serial") != found.serial:
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: the keys are on its node, but its server has not read them; mistralctl status {record.name} says why",
                Exit.SERVER,
            )
        time.sleep(0.1)
    return NOW


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
    """The keys of a deployment, with what was asked with each."""
    record = state.known(name)
    found, own = _there(record), keys.own(name, keys.known(name))
    counted = _usage(record).get("keys", {}) if _is_up(record) else None
    rows = []
    for key in found.keys:
        counts = {} if counted is None else {"requests": 0, "tokens": 0, "refused": 0} | counted.get(key.id, {})
        mine = own is not None and own.sha256 == key.sha256
        seen = {field.name: getattr(key, field.name, None) for field in fields(Row)}
        rows.append(Row(**seen | {"own": mine, **{name: counts.get(name) for name in ("requests", "tokens", "refused")}}))
    return KeyList(name, counted is not None, tuple(rows))


def add(name: str, wanted: Wanted) -> KeyChange:
    """Lets another key in; it is in the result and nowhere else, unless the user brought it."""
    secret = keys.brought(wanted.key_file) if wanted.key_file else keys.generate()
    expires = _later("--expires", wanted.expires)
    with _alone(name) as record:
        found = _there(record)
        if any(key.sha256 == contract.digest(secret) for key in found.keys):
            raise UserError(f"{name} has this key already; mistralctl keys {name} list shows it", Exit.CONFLICT)
        key = keys.entry(secret, wanted.name or f"key-{len(found.keys)}", expires=expires, **wanted.limits)
        effective = _put(record, found.changed([*_current(found), key]))
    return KeyChange(name, "added", key.id, key.name, "" if wanted.key_file else secret, "", effective, expires)


def revoke(name: str, wanted: str) -> KeyChange:
    """Shuts a key out; answers that run with it run on."""
    with _alone(name) as record:
        found = _there(record)
        key = _one(found, wanted, name)
        mine = keys.own(name, found)
        if mine is not None and key.id == mine.id:
            raise UserError(
                f"{wanted} is this laptop's own key; run mistralctl keys {name} rotate, or mistralctl down {name}", Exit.CONFLICT
            )
        effective = _put(record, found.changed(one for one in _current(found) if one.id != key.id))
    return KeyChange(name, "revoked", key.id, key.name, "", "", effective)


def rotate(name: str, wanted: str, key_file: Path | None, grace: str) -> KeyChange:
    """Exchanges a key, this laptop's own if none is named: a new one with the same limits is let in, then the old one stays for `grace`."""
    secret = keys.brought(key_file) if key_file else keys.generate()
    until = _later("--grace", grace)
    if until is None:
        raise UserError("--grace: never would keep the old key; write for example 10m")
    with _alone(name) as record:
        found = _there(record)
        mine = keys.own(name, found)
        old = _one(found, wanted, name) if wanted else mine
        if old is None:
            raise UserError(f"{name}: this laptop's own key is none of its keys; run mistralctl up again", Exit.CONFLICT)
        made = keys.entry(secret, keys.OWN if old == mine else old.name)
        made = replace(old, id=made.id, sha256=made.sha256, created=made.created)
        if any(key.sha256 == made.sha256 for key in found.keys):
            raise UserError(f"{name} has this key already; give another one", Exit.CONFLICT)
        found = found.changed([*_current(found), made])
        _put(record, found)
        path = state.folder(name) / "api_key"
        if old == mine:  # from now on this laptop asks with the new one; whatever goes wrong later, it has one that is let in
            state.write_private(path, f"{secret}\n")
        last = min(until, old.expires or until)
        effective = _put(record, found.changed(replace(key, expires=last) if key.id == old.id else key for key in found.keys))
    shown = "" if old == mine or key_file else secret
    return KeyChange(
        name, "rotated", made.id, made.name, shown, str(path) if old == mine else "", effective, made.expires, old.id, last
    )  # fmt: skip
