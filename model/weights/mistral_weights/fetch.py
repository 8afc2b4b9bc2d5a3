"""`python -m mistral_weights.fetch URI FILE`: brings one file of any kind from a store, as a whole or not at all."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .address import parse
from .disk import explained, replacing, require_space
from .errors import EXIT_CODES, Kind, WeightsError
from .events import silent
from .patience import Patience
from .retrying import tried
from .secrets import Secrets
from .stores import Opening, StoredFile, open_store

ORDINARY = Patience()


def fetch(uri: str, target: Path, most: int = 0, patience: Patience = ORDINARY) -> int:
    """Return the bytes of a file that was brought; WeightsError if it is not there, or has more than `most` bytes (0: any)."""
    folder, _, name = uri.rpartition("/")
    address = parse(f"{folder}/" if folder == "file://" else folder)
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(Secrets(), Path(scratch), patience))
        held = {file.name: file for file in tried(uri, patience, silent, store.list).files}
        if name not in held:
            raise WeightsError(Kind.NOT_FOUND, f"{uri} is not there; name a file in {folder}")
        file = held[name]
        if most and file.size > most:
            raise WeightsError(Kind.REFUSED, f"{uri} has {file.size:,} bytes; at most {most:,} are read here")
        target.parent.mkdir(parents=True, exist_ok=True)
        require_space(target.parent, file.size)

        def bring(file: StoredFile = file) -> None:
            with explained(target), replacing(target) as out:
                for piece in store.read(file, 0, file.size):
                    out.write(piece)

        tried(uri, patience, silent, bring)
    return file.size


if __name__ == "__main__":
    try:
        fetch(sys.argv[1], Path(sys.argv[2]))
    except WeightsError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(EXIT_CODES[error.kind]) from None
