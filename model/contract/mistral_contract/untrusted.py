"""JSON that others wrote (a hub, a bucket, a wheel, a training tool): read within bounds, or refused in one printable line."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 4 << 20  # of a configuration; who reads something larger says so
MOST_TOKENIZER_BYTES = 128 << 20
MOST_DEPTH = 64
MOST_DIGITS = 40  # tokenizer_config.json has 10**30 for a length without a limit
LONGEST_LINE = 600
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def printable(text: str) -> str:
    """Return a text as one line that a terminal can show.

    >>> printable("a\\x1b[31m\\nb")
    'a [31m b'
    """
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def line(text: str) -> str:
    """Return a text as one line that a terminal can show, cut where it is long."""
    shown = printable(text[: LONGEST_LINE + 1])
    return shown if len(text) <= LONGEST_LINE else f"{shown[: LONGEST_LINE - 3]}..."


class Refusal(ValueError):
    """What is wrong with a file of others, and what to do, in one printable line: names in it are theirs."""

    def __init__(self, message: str) -> None:
        super().__init__(line(message))


class NotRead(Refusal):
    """Why a text is not taken, said after the name of its file: "it ..."."""


def read(data: bytes | str, most_bytes: int = MOST_BYTES, *, judged: bool = False) -> dict[str, Any]:
    """Return the JSON object in `data`; NotRead unless it is one that every reader understands alike.

    Refused are: more than `most_bytes`, text that is not UTF-8, nesting below MOST_DEPTH levels, numbers of more than MOST_DIGITS digits,
    numbers that are not finite, a key that stands twice, half a surrogate pair. `judged`: NaN and Infinity pass, as the caller asks `finite`
    of each number that it uses, and can say which one is none.
    """
    found = read_any(data, most_bytes, judged=judged)
    if not isinstance(found, dict):
        raise NotRead("it is not a JSON object")
    return found


def read_any(data: bytes | str, most_bytes: int = MOST_BYTES, *, judged: bool = False) -> Any:
    """Return the JSON value in `data`, as `read` does."""
    if len(data) > most_bytes:
        raise NotRead(f"it has {len(data)} bytes, and at most {most_bytes} are read")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        found = json.loads(
            text, parse_int=_whole, parse_float=_finite, parse_constant=float if judged else _constant, object_pairs_hook=_unique
        )
        if _too_deep(found):
            raise NotRead(f"it is nested deeper than {MOST_DEPTH} levels")
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except NotRead:
        raise
    except RecursionError:
        raise NotRead(f"it is nested deeper than {MOST_DEPTH} levels") from None
    except UnicodeError as error:
        raise NotRead(f"it is no text in UTF-8 ({error})") from None
    except ValueError as error:
        raise NotRead(f"it is not JSON ({error})") from None
    return found


def read_file(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file; NotRead as `read` says or if it is no plain file, OSError if it cannot be opened."""
    return read(contents(path, most_bytes), most_bytes)


def contents(path: Path, most_bytes: int) -> bytes:
    """Return what is in a plain file; NotRead if it is none (a pipe would never end), or has more than `most_bytes`."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise NotRead("it is no plain file")
        if status.st_size > most_bytes:
            raise NotRead(f"it has {status.st_size} bytes, and at most {most_bytes} are read")
        return file.read(most_bytes + 1)


def finite(value: object) -> bool:
    """Return whether a value is a number that can be compared: no bool, no text, not NaN, not infinite, no more than a float holds.

    >>> finite(-0.5), finite(float("nan")), finite(10**400), finite(True), finite("1")
    (True, False, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise NotRead(f"it has a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if len(digits) > 4 * MOST_DIGITS or not math.isfinite(number := float(digits)):
        raise NotRead(f"it has the number {digits[:MOST_DIGITS]}, which is out of range")
    return number


def _constant(name: str) -> Any:
    raise NotRead(f"it has {name}, which is no number in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotRead(f"it has the key {twice!r} twice")
    return found


def _too_deep(found: Any) -> bool:
    """Return whether lists and objects are nested deeper than MOST_DEPTH, level by level."""
    level = [found] if isinstance(found, list | dict) else []
    for _ in range(MOST_DEPTH):
        items = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in items if isinstance(item, list | dict)]
    return bool(level)
