"""The nearest of some words to one that was misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word that was probably meant, whatever its case; None if none is near (`cutoff`: 0 takes any, 1 only the same).

    >>> suggest("GPC", ["aws", "gcp"]), suggest("x", ["aws", "gcp"])
    ('gcp', None)
    """
    spelt = {one.lower(): one for one in words}
    near = difflib.get_close_matches(word.lower(), spelt, 1, cutoff)
    return spelt[near[0]] if near else None
