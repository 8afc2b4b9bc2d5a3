"""The plain way to read a range: through the store's own SDK."""

from __future__ import annotations

from .errors import Kind, WeightsError
from .stores import Store, StoredFile


class PlainReader:
    """Fills buffers from `Store.read`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read_into(self, file: StoredFile, start: int, buffer: memoryview) -> None:
        done = 0
        for piece in self._store.read(file, start, start + len(buffer)):
            if done + len(piece) > len(buffer):
                raise WeightsError(Kind.UNREACHABLE, f"the store sent more of {file.name} than was asked for; try again")
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        if done != len(buffer):
            raise WeightsError(Kind.UNREACHABLE, f"the store sent {done} of {len(buffer)} bytes of {file.name}; try again")

    def close(self) -> None:
        """Nothing is held."""
