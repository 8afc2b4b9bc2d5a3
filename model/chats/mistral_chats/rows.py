"""The rows of a file: JSON objects, one a line, or in one JSON array; each with its line and within bounds."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mistral_contract import untrusted

from mistral_chats.faults import Faults, Wrong

MOST_FILE_BYTES = 1 << 30
MOST_ARRAY_BYTES = 256 << 20  # of a JSON array, which is read at once
MOST_ROW_BYTES = 4 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
# How other kinds of files begin.
_SIGNATURES = (
    (b"\x1f\x8b", "gzip", "unpack it (gunzip)"),
    (b"PK\x03\x04", "a zip archive", "unpack it (unzip)"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it (unzstd)"),
    (b"BZh", "bzip2", "unpack it (bunzip2)"),
    (b"\xfd7zXZ\x00", "xz", "unpack it (unxz)"),
    (b"PAR1", "a Parquet file", "write it as JSON lines"),
    (b"ARROW1", "an Arrow file", "write it as JSON lines"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)


class Row(NamedTuple):
    """A row as it was read: its line in the file, its place in an array (empty for JSON lines), its object."""

    line: int
    place: str
    found: dict[str, object]


def read(path: Path, faults: Faults) -> Iterator[Row]:
    """Yield the rows of a file; what is wrong with one goes to `faults`, and the next follows."""
    with faults.of_line(0), _opened(path) as file:
        head = file.read(1 << 16)
        _known(head)
        body = head.removeprefix(b"\xef\xbb\xbf")
        file.seek(len(head) - len(body))
        if body.lstrip()[:1] == b"[":
            yield from _array(file, faults)
        else:
            yield from _lines(file, faults)


def _opened(path: Path) -> BinaryIO:
    """Open a plain file of bounded size; Wrong if it is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Wrong("", "there is no such file", "check the path") from None
    except OSError as error:
        raise Wrong("", f"it cannot be read ({error.strerror})", "check its permissions") from None
    status = os.fstat(handle)
    wrong = None
    if stat.S_ISDIR(status.st_mode):
        wrong = Wrong("", "it is a folder", "name one file of chats")
    elif not stat.S_ISREG(status.st_mode):
        wrong = Wrong("", "it is no plain file", "write the chats to a file first")
    elif status.st_size > MOST_FILE_BYTES:
        wrong = Wrong("", f"it has {status.st_size} bytes, and at most {MOST_FILE_BYTES} are read", "train on a part of it")
    elif not status.st_size:
        wrong = Wrong("", "it is empty", "write one chat a line")
    if wrong:
        os.close(handle)
        raise wrong
    return os.fdopen(handle, "rb")


def _known(head: bytes) -> None:
    """Wrong if a file begins like one of another kind, or like text in another encoding."""
    for signature, kind, mend in _SIGNATURES:
        if head.startswith(signature):
            raise Wrong("", f"it is {kind}, not JSON lines in UTF-8", mend)
    if b"\x00" in head[:64]:
        raise Wrong("", "it has zero bytes: UTF-16 text, or no text at all", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")


def _lines(file: BinaryIO, faults: Faults) -> Iterator[Row]:
    line = 0
    while data := file.readline(MOST_ROW_BYTES + 2):
        line += 1
        size, last = len(data), data[-1:]
        while last != b"\n" and (rest := file.readline(1 << 20)):
            size, last = size + len(rest), rest[-1:]
        with faults.of_line(line):
            if size > MOST_ROW_BYTES + 1:
                raise Wrong("", f"the row has {size} bytes, and at most {MOST_ROW_BYTES} are read", "split the chat")
            if text := _text(data).rstrip():
                yield Row(line, "", _object(text))


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{data[error.start]:02x} at position {error.start + 1} is not UTF-8"
        raise Wrong("", wrong, "save the file as UTF-8 (iconv -f ENCODING -t UTF-8)") from None


# What is said of a text that is not taken, and what to do about it.
_MENDS = (
    ("is not JSON", "write each row as one JSON object in one line, or all of them in one JSON array"),
    ("twice", "take one of them out"),
    ("nested", "write chats as lists of messages"),
    ("number", "write a number that JSON has, or a text"),
    ("", "write the whole character"),  # half a surrogate pair
)


def _object(text: str, place: str = "") -> dict[str, object]:
    """Return the JSON object in a text; Wrong unless every reader understands it alike."""
    try:
        found = untrusted.read_any(text, MOST_ROW_BYTES)
    except untrusted.NotRead as error:
        wrong = re.sub(r": line \d+ column (\d+) \(char \d+\)", r" at column \1", str(error))
        if half := re.search(r"'(\\ud[0-9a-f]{3})'.*surrogates", wrong):
            wrong = f"it has half of a surrogate pair ({half[1]})"
        raise Wrong(place, wrong, next(mend for said, mend in _MENDS if said in wrong)) from None
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(found), "a number or a bool")
        raise Wrong(place, f"the row is {kind}, not a JSON object", 'write {"messages": [...]}')
    return found


def _array(file: BinaryIO, faults: Faults) -> Iterator[Row]:
    """Yield the objects of one JSON array, each with the line where it begins."""
    data = file.read(MOST_ARRAY_BYTES + 1)
    if len(data) > MOST_ARRAY_BYTES:
        raise Wrong("", f"a JSON array of more than {MOST_ARRAY_BYTES} bytes", "write it as JSON lines: one row a line")
    text = _text(data)
    decoder = json.JSONDecoder()
    at = _skipped(text, text.index("[") + 1)
    line, counted, number = 1, 0, 0
    if text.startswith("]", at):
        raise Wrong("", "the array has no rows", "write one chat at least")
    while True:
        line += text.count("\n", counted, at)
        counted = at
        place = f"[{number}]"
        try:
            _, end = decoder.raw_decode(text, at)
        except (JSONDecodeError, RecursionError) as error:
            with faults.of_line(line):
                where = f" ({error.msg}, line {error.lineno} column {error.colno})" if isinstance(error, JSONDecodeError) else ""
                deep = "" if where else f"it is nested deeper than {untrusted.MOST_DEPTH} levels"
                raise Wrong(place, deep or f"it is not JSON{where}", "mend the array, or write one row a line") from None
            return
        with faults.of_line(line):
            if end - at > MOST_ROW_BYTES:
                raise Wrong(place, f"the row has {end - at} bytes, and at most {MOST_ROW_BYTES} are read", "split the chat")
            yield Row(line, place, _object(text[at:end], place))
        at = _skipped(text, end)
        if text.startswith("]", at):
            rest = _skipped(text, at + 1)
            if rest < len(text):
                line += text.count("\n", counted, rest)
                with faults.of_line(line):
                    raise Wrong("", "text follows the array", "write one array, or one row a line")
            return
        if not text.startswith(",", at):
            with faults.of_line(line + text.count("\n", counted, at)):
                wrong = "the file ends within its array" if at >= len(text) else f"a comma is missing behind row {place}"
                raise Wrong("", wrong, "mend the array, or write one row a line")
            return
        at = _skipped(text, at + 1)
        number += 1


def _skipped(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at
