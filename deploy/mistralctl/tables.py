"""Rows of cells as aligned lines: the one formatter of tables, in results and below errors."""

from __future__ import annotations

from collections.abc import Sequence


def lines(rows: Sequence[Sequence[str]], least: Sequence[int] = ()) -> list[str]:
    """A line for each row, its columns as wide as their widest cell, or as `least` says; the last one is not padded.

    >>> lines([["a", "bb"], ["cc", "d"]])
    ['a   bb', 'cc  d']
    """
    count = max((len(row) for row in rows), default=0)
    floors = [*least, *[0] * count]
    widths = [max(floors[i], *(len(row[i]) for row in rows)) for i in range(count)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows below a head."""
    return "\n".join(lines([head, *rows]))
