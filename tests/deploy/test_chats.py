"""Files of chats: what is recognised, and the one line for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mistralctl.chats import read_chats
from mistralctl.errors import Exit, UserError


def user(content: object = "Why?", **fields: object) -> dict[str, object]:
    return {"role": "user", "content": content} | fields


def answer(content: object = "Because.", **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": content} | fields


def chat(*messages: object, **fields: object) -> dict[str, object]:
    return {"messages": list(messages) or [user(), answer()]} | fields


SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = chat(user("How?"), answer("Thus."))


def write(folder: Path, *rows: object) -> Path:
    """A file of JSON lines; texts among the rows stand in it as they are."""
    file = folder / "chats.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_chats(file)
    assert caught.value.code is Exit.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(file))


def test_three_formats_are_recognised_and_become_the_same_messages(tmp_path: Path) -> None:
    wanted = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    )
    rows: dict[str, dict[str, Any]] = {
        "OpenAI chat": chat(SYSTEM, user(), answer("So."), id=7),
        "ShareGPT": {
            "conversations": [
                {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."},
            ],
            "id": 7,
        },
        "Alpaca": {"system": "Be brief.", "instruction": "Why?", "input": "", "output": "So.", "id": 7},
    }  # fmt: skip
    for name, row in rows.items():
        found = read_chats(write(tmp_path, row))
        assert (found.format_name, found.ignored) == (name, ("id",))
        assert [(one.line, one.messages, one.learnt) for one in found.rows] == [(1, wanted, (2,))]
