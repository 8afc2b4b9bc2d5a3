"""The plain way to read a range: through the store's own SDK."""

from __future__ import annotations

from . import digests
from .errors import Kind, WeightsError
from .stores import Store, StoredFile


class PlainReader:
    """Fills buffers from `Store.read`, and hashes them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read_into(self, file: StoredFile, start: int, buffer: memoryview) -> str:
        digest, done = digests.start("blake3", len(buffer)), 0
        for piece in self._store.read(file, start, start + len(buffer)):
            if done + len(piece) > len(buffer):
                raise WeightsError(Kind.UNREACHABLE, f"the store sent more of {file.name} than was asked for; try again")
            into = buffer[done : done + len(piece)]
            into[:] = piece
            digest.update(into)
            done += len(piece)
        if done != len(buffer):
            raise WeightsError(Kind.UNREACHABLE, f"the store sent {done} of {len(buffer)} bytes of {file.name}; try again")
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is held."""
