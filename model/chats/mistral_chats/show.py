"""Examples to look at: what is learnt in colour, or marked where there is none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import groupby

from mistral_chats.dataset import Dataset
from mistral_chats.encoder import IGNORED, Encoder, Example

LEARNT, REST, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
MARKS = ("{+", "+}")  # as wdiff marks what was added


def in_colour(terminal: bool, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether to use colour: on a terminal, unless NO_COLOR is set and not empty (no-color.org)."""
    return terminal and not environ.get("NO_COLOR")


def show(dataset: Dataset, encoder: Encoder, n: int, *, colour: bool) -> str:
    """Return the first `n` examples as text: learnt tokens in colour, or between {+ and +}.

    Characters that a terminal would obey are shown escaped.
    """
    found = []
    for number, example in enumerate(dataset.examples[:n]):
        title = (
            f"{dataset.summary.file}:{dataset.lines[number]}: example {number + 1} of {dataset.summary.examples}, "
            f"{len(example.input_ids)} tokens, {example.learnt} learnt"
        )
        found.append(f"{title}\n{_shown(example, encoder, colour)}\n")
    return "\n".join(found)


def _shown(example: Example, encoder: Encoder, colour: bool) -> str:
    text = ""
    spans = groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    for learnt, span in spans:
        piece = _escaped(encoder.text([token for token, _ in span]))
        if colour:
            text += f"{LEARNT if learnt else REST}{piece}{PLAIN}"
        else:
            text += f"{MARKS[0]}{piece}{MARKS[1]}" if learnt else piece
    return text


def _escaped(text: str) -> str:
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)
