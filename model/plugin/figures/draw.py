"""Draws window.svg and paged_cache.svg, beside this file, from the reference's own block table. Needs matplotlib.

PYTHONPATH=model/plugin python model/plugin/figures/draw.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from vllm_mistral.reference import RECYCLED, BlockTable

WINDOW, BLOCK, CHUNK, LENGTH = 6, 4, 4, 20
SEEN, REACHED, FREE, BEHIND, INK = "#2a6f97", "#a9d6e5", "#ffffff", "#e3e3e3", "#333333"
STYLE: Any = {"svg.hashsalt": "mistral", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}


def cell(axis: Any, at: tuple[float, float], colour: str, text: str = "", width: float = 1.0) -> None:
    x, y = at
    axis.add_patch(Rectangle((x, y), width, 1, facecolor=colour, edgecolor="#9a9a9a", linewidth=0.6))
    if text:
        axis.text(x + width / 2, y + 0.5, text, ha="center", va="center", color="white" if colour == SEEN else INK, fontsize=8)


def canvas(width: float, height: float, columns: float, rows: float) -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(width, height), constrained_layout=True)
    axis.set_xlim(-0.2, columns)
    axis.set_ylim(rows, -0.2)
    axis.set_aspect("equal")
    axis.axis("off")
    return figure, axis


def save(figure: Any, name: str) -> None:
    figure.savefig(Path(__file__).with_name(name), metadata={"Date": None})
    plt.close(figure)


def draw_window() -> None:
    """The mask: a band of W keys a query; and how far two layers reach."""
    figure, axis = canvas(6.6, 3.6, 30, 16)
    size = 14
    for query in range(size):
        for key in range(size):
            distance = query - key
            seen = 0 <= distance < WINDOW
            reached = WINDOW <= distance <= 2 * (WINDOW - 1)
            cell(axis, (key, query + 1), SEEN if seen else REACHED if reached else BEHIND if distance > 0 else FREE)
    axis.text(0, 0.6, "key 0, 1, 2, ...", fontsize=9)
    notes = [
        (SEEN, f"distance below W: seen by the layer (W = {WINDOW})"),
        (REACHED, "masked, but reached through\nwhat the layer below has seen"),
        (BEHIND, "masked, out of reach of two layers"),
        (FREE, "later than the query: masked"),
    ]
    for i, (colour, text) in enumerate(notes):
        cell(axis, (15.5, 2 + 3 * i), colour)
        axis.text(17, 2.5 + 3 * i, text, va="center")
    axis.text(-0.1, 15.7, "one row a query", fontsize=9)
    save(figure, "window.svg")


def draw_paged_cache() -> None:
    """One sequence of 20 tokens in chunks of 4, then two decoded tokens: its block table and the pool after each step."""
    pool = list(range(6))[::-1]
    table = BlockTable(pool, BLOCK, WINDOW)
    chunks = [(start, start + CHUNK) for start in range(0, LENGTH, CHUNK)] + [(LENGTH, LENGTH + 1)]
    figure, axis = canvas(9.2, 3.9, 44, 2.2 * len(chunks) + 3)
    for x, text in ((0, "step computes"), (9, "block table: entry i holds tokens 4i .. 4i + 3"), (31, "pool of 6 blocks")):
        axis.text(x, 0.6, text, fontweight="bold")
    for row, (start, end) in enumerate(chunks):
        y = 1.5 + 2.2 * row
        table.advance(start, end)
        axis.text(0, y + 0.5, f"tokens {start} to {end - 1}" if end - start > 1 else f"token {start} (decode)", va="center")
        for i in range((LENGTH + BLOCK) // BLOCK):
            held = i < len(table.blocks)
            gone = held and table.blocks[i] == RECYCLED
            text = "" if not held else "recycled" if gone else f"block {table.blocks[i]}"
            new = held and (i + 1) * BLOCK > start
            cell(axis, (9 + 3.5 * i, y), FREE if not held else BEHIND if gone else SEEN if new else REACHED, text, 3.5)
        for block in range(6):
            used = block in table.blocks
            cell(
                axis,
                (31 + 2 * block, y),
                FREE if not used else SEEN if block in table.blocks[start // BLOCK :] else REACHED,
                str(block),
                2,
            )
    y = 1.7 + 2.2 * len(chunks)
    for x, colour, text in (
        (0, SEEN, "written in this step"),
        (11, REACHED, f"read: inside the window (W = {WINDOW})"),
        (27, BEHIND, "behind it"),
    ):
        cell(axis, (x, y), colour)
        axis.text(x + 1.4, y + 0.5, text, va="center")
    cell(axis, (35, y), FREE)
    axis.text(36.4, y + 0.5, "free", va="center")
    save(figure, "paged_cache.svg")


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        draw_window()
        draw_paged_cache()
