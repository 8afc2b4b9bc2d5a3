"""`mistralctl logs`: what setup and server wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator

from mistralctl import state
from mistralctl.errors import Exit, UserError

BLOCK = 1 << 16


def run(name: str, *, follow: bool, lines: int | None) -> Iterator[str]:
    """Pieces of the log's text: the last `lines` lines (None: all); with `follow`, what comes after until it ends."""
    from mistralctl.runtime import local

    record = state.known(name)
    path = state.folder(name) / "up.log"
    if not path.exists():
        raise UserError(f"{name} has no log yet; run mistralctl up first", Exit.NOT_FOUND)
    with path.open("rb") as file:
        if lines is not None:
            position, block = file.seek(0, 2), b""
            while position > 0 and block.count(b"\n") <= lines:
                position = max(0, position - BLOCK)
                file.seek(position)
                block = file.read()
            kept = block.splitlines(keepends=True)[-lines:] if lines else []
            yield b"".join(kept).decode("utf-8", "replace")
        while True:
            block = file.read(BLOCK)
            if block:
                yield block.decode("utf-8", "replace")
            elif not follow:
                return
            else:
                record = state.known(name)
                if record.state == "down" or not local.alive(record.pid, record.pid_started):
                    return
                time.sleep(0.2)
