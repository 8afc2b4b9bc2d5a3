"""Durations as people write them: `30m`, `12h`, `2d`, `never`."""

from __future__ import annotations

import re

MINUTES = {"m": 1, "h": 60, "d": 1440}
LONGEST = 365 * 1440


def minutes(text: str) -> int | None:
    """Minutes of a duration such as `90m`, `12h` or `2d`; None for `never`.

    >>> minutes("2h"), minutes("never")
    (120, None)

    Raises ValueError with what to write instead.
    """
    if text == "never":
        return None
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write for example 30m, 12h, 2d or never")
    value = int(match[1]) * MINUTES[match[2]]
    if not 1 <= value <= LONGEST:
        raise ValueError(f"{text!r} is out of range; between 1m and 365d, or never")
    return value
