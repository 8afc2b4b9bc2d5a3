"""`mistralctl logs`: what setup and server wrote."""

from __future__ import annotations

from collections.abc import Iterator

from mistralctl import runtime, state


def run(name: str, *, follow: bool, lines: int | None) -> Iterator[str]:
    """Pieces of the log's text: the last `lines` lines (None: all); with `follow`, what comes after until it ends."""
    record = state.known(name)
    return runtime.of(record.cloud).logs(record, follow=follow, lines=lines)
