"""Answers that were given, in a file of sealed lines: what is in it is not asked again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_evaluate.errors import EvaluateError


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Journal:
    """The answers of one model: a request has the answer that was given to this identity."""

    def __init__(self, handle: int, identity: Mapping[str, Any]) -> None:
        self._handle, self._identity = handle, _hash(identity)
        self._known: dict[str, Any] = {}
        with os.fdopen(os.dup(handle), "rb") as file:
            whole = True
            for line in file:
                whole = line.endswith(b"\n")
                if (entry := _entry(line)) is not None:
                    self._known[entry[0]] = entry[1]
        if not whole:  # a kill left half a line
            os.write(handle, b"\n")

    def key(self, request: Mapping[str, Any], number: int = 0) -> str:
        """Return what stands for a request to this model; `number` tells sampled answers to the same request apart."""
        return _hash(self._identity, request, number)

    def has(self, key: str) -> bool:
        """Return whether a request was answered."""
        return key in self._known

    def answer(self, key: str) -> Any:
        """Return the answer to a request that has one."""
        return self._known[key]

    def keep(self, key: str, answer: Any) -> None:
        """Write an answer: one write of a whole line, which a kill of this process leaves whole."""
        line = json.dumps({"key": key, "answer": answer, "seal": _hash(key, answer)}) + "\n"
        os.write(self._handle, line.encode())
        self._known[key] = answer


def _entry(line: bytes) -> tuple[str, Any] | None:
    """Return key and answer of a line; None if it is torn or was changed."""
    try:
        found = json.loads(line)
        key, answer = str(found["key"]), found["answer"]
        return (key, answer) if found["seal"] == _hash(key, answer) else None
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def opened(path: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """Open the journal for this process alone; EvaluateError if another one writes it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise EvaluateError("an evaluation of this deployment is at work already; wait for it to end, or stop it") from None
    try:
        yield Journal(handle, identity)
    finally:
        os.close(handle)
