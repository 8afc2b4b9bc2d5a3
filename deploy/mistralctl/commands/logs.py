"""`mistralctl logs`: what setup and server wrote."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from mistralctl import state
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record

BLOCK = 1 << 16


def _cloud(record: Record, *, follow: bool, lines: int | None) -> Iterator[str]:
    """What SkyPilot and set-up wrote, then the server's log from the machine; what is left here of it when that is gone."""
    from mistralctl.runtime import sky

    folder = state.folder(record.name)
    if lines is None and (folder / "up.log").exists():
        yield (folder / "up.log").read_text("utf-8", "replace")
    try:
        yield from sky.job_log(record.cluster, follow=follow, lines=lines)
    except UserError:
        if not (folder / "serve.log").exists():
            raise
        kept = (folder / "serve.log").read_text("utf-8", "replace").splitlines(keepends=True)
        yield "".join(kept[-lines:] if lines else kept)


def keep(record: Record) -> None:
    """Fetches what a machine's last server wrote, as far as it can be had, so that it is here when the machine goes."""
    from mistralctl.runtime import sky

    with contextlib.suppress(UserError):
        text = "".join(sky.job_log(record.cluster, follow=False, lines=None))
        if text:
            state.write_private(state.folder(record.name) / "serve.log", text)


def run(name: str, *, follow: bool, lines: int | None) -> Iterator[str]:
    """Pieces of the log's text: the last `lines` lines (None: all); with `follow`, what comes after until it ends."""
    from mistralctl.runtime import local

    record = state.known(name)
    if record.cluster:
        yield from _cloud(record, follow=follow, lines=lines)
        return
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
