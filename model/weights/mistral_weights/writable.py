"""`python -m mistral_weights.writable URI`: whether a set can be put to an address, seen before the work whose result is to lie there."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import names
from .address import parse
from .errors import EXIT_CODES, Kind, WeightsError
from .patience import Patience
from .secrets import Secrets
from .stores import Opening, Store, open_store

ORDINARY = Patience()


def may_write(uri: str, patience: Patience = ORDINARY) -> None:
    """Write a small file to an address and take it away again; WeightsError if that may not be done."""
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        probe = Path(scratch) / f".mistralctl-{secrets.token_hex(8)}"
        probe.write_text("whether this place can be written\n", "ascii")
        store = _store(uri, Path(scratch), patience)
        store.write(probe.name, probe, None)
        store.delete(probe.name)


def strangers(uri: str, below: Iterable[str] = (), patience: Patience = ORDINARY) -> tuple[str, ...]:
    """Return the files at an address that no push put there, but for those in the folders `below`.

    Beside a manifest, or the mark of a push that was not finished, nothing is one.
    """
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        try:
            found = [file.name for file in _store(uri, Path(scratch), patience).list().files]
        except WeightsError as error:
            if error.kind is Kind.NOT_FOUND:
                return ()
            raise
    if names.MANIFEST in found or names.UNFINISHED in found:
        return ()
    return tuple(sorted(name for name in found if not name.startswith(tuple(f"{folder}/" for folder in below))))


def _store(uri: str, scratch: Path, patience: Patience) -> Store:
    return open_store(parse(uri), Opening(Secrets(), scratch, patience))


if __name__ == "__main__":
    try:
        may_write(sys.argv[1])
    except WeightsError as error:
        sys.stderr.write(f"{sys.argv[1]} cannot be written: {error}\n")
        raise SystemExit(EXIT_CODES[error.kind]) from None
