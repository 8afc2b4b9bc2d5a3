"""Durations as people write them: `30m`, `12h`, `2d`, `never`."""

from __future__ import annotations

import re

MINUTES = {"m": 1, "h": 60, "d": 1440}
LONGEST = 365 * 1440
WORDS = {
    "min": "m",
    "mins": "m",
    "minute": "m",
    "minutes": "m",
    "hr": "h",
    "hrs": "h",
    "hour": "h",
    "hours": "h",
    "day": "d",
    "days": "d",
}
NEVER = ("0", "off", "no", "none", "null", "false", "disabled", "infinite", "inf")


def minutes(text: str) -> int | None:
    """Return the minutes of a duration such as `90m`, `12h` or `2d`; None for `never`.

    >>> minutes("2h"), minutes("never")
    (120, None)

    Raises ValueError with what to write instead.
    """
    if text == "never":
        return None
    if text.strip().lower() in NEVER:
        raise ValueError(f"{text!r} is not a duration; write never to switch it off")
    return length(text, "30m, 12h, 2d or never", "1m and 365d, or never")


def length(text: str, examples: str = "30m, 12h or 2d", bounds: str = "1m and 365d") -> int:
    """Return the minutes of a duration that has an end; ValueError with what to write instead, `examples` and `bounds` among it.

    >>> length("2h")
    120
    """
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; {_spelling(text) or f'write for example {examples}'}")
    value = int(match[1]) * MINUTES[match[2]]
    if not 1 <= value <= LONGEST:
        raise ValueError(f"{text!r} is out of range; between {bounds}")
    return value


def text(minutes: int) -> str:
    """A duration as people write it, in the largest unit that it is a whole number of.

    >>> text(720), text(90)
    ('12h', '90m')
    """
    unit, value = next((unit, value) for unit, value in reversed(MINUTES.items()) if minutes % value == 0)
    return f"{minutes // value}{unit}"


def _spelling(text: str) -> str:
    """How to write what was probably meant; empty where nothing is known."""
    word = text.strip().lower()
    if word.isascii() and word.isdigit():
        return f"write {word}m for minutes, {word}h for hours or {word}d for days"
    match = re.fullmatch(r"([0-9]{1,6})[ _-]*([a-z]+)", word)
    if match and (unit := WORDS.get(match[2], match[2])) in MINUTES:
        return f"write {match[1]}{unit}"
    return ""
