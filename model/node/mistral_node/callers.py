"""Who may ask: the keys of a file that is read again when it changes, and what each of them has asked so far."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral_contract import keys, untrusted
from mistral_contract.keys import Key, Keys
from mistral_node.limits import Account

LOOK_SECONDS = 0.2
USAGE_VERSION = 1


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class Callers:
    """Finds a caller by what it shows.

    A token is looked up by its sha256. How long that takes depends on the token's length, and on how its hash compares with those in the
    table: a caller could learn bits of hashes that anybody may read, and no other ones, since for each bit it would have to find a token
    with such a hash. Nothing is compared with a key itself, of which there is none here.

    `node_key` is the sha256 of the launcher's own key, which has no limits and is in no file.
    """

    def __init__(self, file: Path, usage: Path, node_key: str = "") -> None:
        self._file, self._usage = file, usage
        self._own = {bytes.fromhex(node_key): Key("launcher", "launcher", node_key, 0.0)} if node_key else {}
        self._looked = 0.0
        self._seen = self._stamp()
        self._take(keys.read(file.read_text("utf-8")))
        self.refused: dict[str, int] = {}
        self.accounts = self._counted()
        self._written = ""

    def _stamp(self) -> tuple[int, int, int] | None:
        with suppress(OSError):
            found = self._file.stat()
            return found.st_mtime_ns, found.st_ino, found.st_size
        return None

    def _take(self, found: Keys) -> None:
        self._serial = found.serial
        self._known = {bytes.fromhex(key.sha256): key for key in found.keys}

    def _counted(self) -> dict[str, Account]:
        """What a server before this one has counted on this node; nothing if that cannot be read."""
        try:
            found = untrusted.read_file(self._usage)
            self.refused = {str(why): int(count) for why, count in found.get("refused", {}).items()}
            data = found["keys"]
            known = {key.id for key in self._known.values()}
            return {name: Account.load(one) for name, one in data.items() if name in known}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return {}

    def look(self) -> None:
        """Reads the file again if it has changed, at most five times a second. One that is damaged or gone changes nothing, and is logged."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if (stamp := self._stamp()) == self._seen:
            return
        self._seen = stamp
        try:
            self._take(keys.read(self._file.read_text("utf-8")))
        except (OSError, ValueError) as error:
            sys.stderr.write(f"{self._file}: {error}; the keys before it stay\n")
            return
        known = {key.id for key in self._known.values()}
        self.accounts = {name: account for name, account in self.accounts.items() if name in known}

    @property
    def count(self) -> int:
        """How many keys are in force."""
        return len(self._known)

    def find(self, token: bytes) -> Key | None:
        """Whose key this is."""
        return self._known.get(_digest(token)) if token else None

    def launcher(self, token: bytes) -> Key | None:
        """The launcher's own key, if this is it."""
        return self._own.get(_digest(token)) if token else None

    def account(self, key: Key) -> Account:
        """What a key has asked."""
        return self.accounts.setdefault(key.id, Account())

    def save(self, refused: Mapping[str, int] | None = None) -> None:
        """Writes the counts, which keys are in force, and how often strangers were refused and why, if anything is new."""
        counted: dict[str, Any] = {name: account.dump() for name, account in self.accounts.items()}
        text = json.dumps({"version": USAGE_VERSION, "serial": self._serial, "keys": counted, "refused": dict(refused or {})})
        if text == self._written:
            return
        handle, temporary = tempfile.mkstemp(dir=self._usage.parent, prefix=".usage.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            Path(temporary).chmod(0o644)
            Path(temporary).replace(self._usage)
        except OSError:  # a full disk: the next one tries again, and no pieces stay
            Path(temporary).unlink(missing_ok=True)
            raise
        self._written = text
