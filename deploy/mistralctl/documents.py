"""Results, errors and notes as the documents of `-o json` and `-o yaml`; docs/json.md describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Any

VERSION = 1


def plain(result: Any) -> Any:
    """A result as plain data: dataclasses as mappings, pydantic models as theirs, tuples as lists."""
    if isinstance(result, list | tuple):
        return [plain(item) for item in result]
    if hasattr(result, "model_dump"):
        return result.model_dump(mode="json")
    if is_dataclass(result) and not isinstance(result, type):
        return {key: plain(getattr(result, key)) for key in result.__dataclass_fields__}
    if isinstance(result, dict):
        return {str(key): plain(value) for key, value in result.items()}
    return result


def document(result: Any) -> dict[str, Any]:
    """A result as a document: its version, then the fields of the result in their order, or `items` of a list."""
    found = plain(result)
    return {"version": VERSION, **({"items": found} if isinstance(found, list) else found)}


def as_json(result: Any) -> str:
    """The document in JSON."""
    return json.dumps(document(result), indent=1, ensure_ascii=False)


def as_yaml(result: Any) -> str:
    """The document in YAML."""
    import yaml

    return yaml.safe_dump(document(result), sort_keys=False, allow_unicode=True, width=120).rstrip("\n")


def line(result: Any) -> str:
    """The document in one line of JSON."""
    return json.dumps(document(result), ensure_ascii=False)


def error(message: str, code: int, details: str = "") -> str:
    """An error as a line of JSON."""
    return line({"error": {"code": int(code), "message": message, "details": details or None}})


def note(message: str) -> str:
    """What a person would read as `note: ...`, as a line of JSON."""
    return line({"note": {"message": message}})


def asked_for(words: Sequence[str]) -> bool:
    """Whether JSON is asked for on a command line, also on one that cannot be read.

    >>> asked_for(["up", "--nmae", "x", "-o", "json"]), asked_for(["logs", "json"])
    (True, False)
    """
    own = words[: words.index("--")] if "--" in words else words
    whole = any(word in ("-ojson", "--output=json") for word in own)
    return whole or any(option in ("-o", "--output") and form == "json" for option, form in pairwise(own))
