"""A file of chats: its format recognised, every row checked before anything is rented or trained."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_contract import untrusted

from mistral_chats import formats, rows
from mistral_chats.faults import Faults, Wrong
from mistral_chats.formats import Format, Message
from mistral_chats.texts import check_text, quoted

MOST_IGNORED = 50  # keys that are named
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class Chat:
    """One row: its messages and tools as the OpenAI API takes them, and which messages are learnt.

    `learnt` has the index of each answer that is; `fields` says where each message's text stands in the file.
    """

    line: int
    messages: tuple[Mapping[str, Any], ...]
    learnt: tuple[int, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    fields: tuple[str, ...] = ()

    def field(self, message: int, part: str = "") -> str:
        """Return where the text of a message stands in the file, or a `part` of a message of the OpenAI API."""
        return self.fields[message].removesuffix(".content") + f".{part}" if part else self.fields[message]

    def request(self, answer: int) -> dict[str, Any]:
        """Return what a client sends to get the answer with an index: the messages before it, and the tools."""
        found: dict[str, Any] = {"messages": [dict(message) for message in self.messages[:answer]]}
        return found | ({"tools": [dict(tool) for tool in self.tools]} if self.tools else {})


@dataclass(frozen=True)
class Chats:
    """The chats of a file. `ignored` are keys of rows that are not read, such as an id."""

    file: str
    format: Format
    rows: tuple[Chat, ...]
    ignored: tuple[str, ...] = ()

    @property
    def format_name(self) -> str:
        """The format as people call it."""
        return formats.NAMES[self.format]

    def shared(self, other: Chats) -> tuple[tuple[int, int], ...]:
        """Return (line here, line there) of each chat that the other file has too: what is learnt cannot measure what was learnt."""
        lines = {_digest(chat): chat.line for chat in other.rows}
        return tuple((chat.line, lines[digest]) for chat in self.rows if (digest := _digest(chat)) in lines)


def read(path: str | Path, *, name: str = "") -> Chats:
    """Return the chats of a file of JSON lines or one JSON array; Malformed if any row cannot be trained on.

    Every row is looked at, so that all faults are known at once. `name` is what the file is called in them.
    """
    faults = Faults(name or str(path))
    chats: list[Chat] = []
    form: Format | None = None
    first = 0
    ignored: set[str] = set()
    seen: dict[bytes, str] = {}
    for row in rows.read(Path(path), faults):
        with faults.of_line(row.line):
            try:
                found = formats.recognise(row.found)
                form, first = (form, first) if form else (found, row.line)
                if found != form:
                    wrong = f"the row is {formats.NAMES[found]}, and line {first} is {formats.NAMES[form]}"
                    raise Wrong("", wrong, "keep one format in a file")
                ignored |= formats.ignored(row.found, form)
                chat = _chat(row, form)
                if (digest := _digest(chat)) in seen:
                    raise Wrong("", f"the row repeats {seen[digest]}", "take one of them out")
                seen[digest] = f"{row.place} in line {row.line}" if row.place else f"line {row.line}"
                chats.append(chat)
            except Wrong as wrong:
                wrong.field = ".".join(part for part in (row.place, wrong.field) if part)
                raise
    with faults.of_line(0):
        if not chats and not faults.count:
            raise Wrong("", "it has no rows", "write one chat a line")
    faults.judge()
    return Chats(
        faults.file, form or "openai", tuple(chats), tuple(sorted({untrusted.line(key) for key in ignored})[:MOST_IGNORED])
    )


def _digest(chat: Chat) -> bytes:
    """Return the same for two chats that differ only in blanks around their texts and in what is learnt."""
    messages = [
        {key: value.strip() if isinstance(value, str) else value for key, value in message.items()} for message in chat.messages
    ]
    return hashlib.sha256(json.dumps([messages, chat.tools], sort_keys=True).encode()).digest()


def _chat(row: rows.Row, form: Format) -> Chat:
    messages = formats.messages(row.found, form)
    tools = _tools(row.found.get("tools")) if form == "openai" else ()
    _order(messages)
    _calls(messages, tools)
    for message in messages:
        _texts(message)
    learnt = tuple(number for number, message in enumerate(messages) if message.weight)
    if not learnt:
        raise Wrong(
            messages[-1].place, "the row has no answer to learn", "give one of its answers the weight 1, or take the row out"
        )
    fields = tuple(".".join(part for part in (row.place, message.text_at) if part) for message in messages)
    return Chat(row.line, tuple(map(_as_sent, messages)), learnt, tools, fields)


def _as_sent(message: Message) -> dict[str, Any]:
    """Return a message as the OpenAI API takes it."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.name:
        found["name"] = message.name
    return found


def _order(messages: Sequence[Message]) -> None:
    """Wrong unless an optional system prompt is followed by questions and answers in turn, an answer last."""
    before: Message | None = None
    for message in messages:
        wanted = _FOLLOWS[before.role if before else ""]
        if before and before.role == "assistant":
            wanted = ("tool",) if before.tool_calls else ("user",)
        if message.role not in wanted:
            raise Wrong(message.role_at, *_misplaced(before, message))
        before = message
    if before is None or before.role != "assistant":
        role = before.role if before else "none"
        place = before.role_at if before else "messages"
        raise Wrong(
            place, f"the chat ends with a message of role {role}", "end it with an answer (assistant), or take that message out"
        )


def _misplaced(before: Message | None, message: Message) -> tuple[str, str]:
    """Return what is wrong with a role that stands behind another one, and what to do."""
    if before is None:
        return f"the chat begins with role {message.role}", "begin it with user, or with one system message"
    if message.role == "system":
        return "a system message stands behind another message", "write one system message, as the first"
    if message.role == before.role:
        return f"two messages of role {message.role} follow each other", "join them into one"
    if message.role == "tool":
        return f"a result of a tool follows role {before.role}", "write the call (assistant with tool_calls) before it"
    if before.role == "tool":
        return f"role {message.role} follows the result of a tool", "write the answer (assistant) to the result before it"
    if before.role == "assistant":
        return f"role {message.role} follows a call of a tool", "write the result (tool) of each call behind it"
    return f"role {message.role} follows {before.role}", "write questions (user) and answers (assistant) in turn"


def _calls(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Wrong unless each call has an id of its own, a tool of the row, and one result before the next answer."""
    names = {tool["function"]["name"] for tool in tools}
    open_calls: dict[str, str] = {}
    known: set[str] = set()
    for message in messages:
        if message.role == "tool":
            if message.tool_call_id not in open_calls:
                wrong = "it has a result already" if message.tool_call_id in known else "no call before it has this id"
                raise Wrong(
                    f"{message.place}.tool_call_id", f"{quoted(message.tool_call_id)}: {wrong}", "repeat the id of an open call"
                )
            del open_calls[message.tool_call_id]
            continue
        if open_calls:
            raise Wrong(
                message.place, f"the call {quoted(next(iter(open_calls)))} has no result", "write a tool message for each call"
            )
        for number, call in enumerate(message.tool_calls):
            place = f"{message.place}.tool_calls[{number}]"
            name = call["function"]["name"]
            if not _FUNCTION_NAME.fullmatch(name):
                raise Wrong(f"{place}.function.name", f"{quoted(name)} is no name", "use letters, digits, _ and -, at most 64")
            if names and name not in names:
                raise Wrong(
                    f"{place}.function.name", f"{quoted(name)} is none of the row's tools", "add it to tools, or mend the name"
                )
            if call["id"] in known:
                raise Wrong(f"{place}.id", f"{quoted(call['id'])} stands twice", "give each call an id of its own")
            known.add(call["id"])
            open_calls[call["id"]] = place


def _tools(found: object) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a row; Wrong unless each is a function with a name and a schema."""
    if found is None or found == []:
        return ()
    if not isinstance(found, list):
        raise Wrong("tools", "it is not a list", "write a list of functions, as the OpenAI API has them")
    names: set[str] = set()
    for number, tool in enumerate(found):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
        if not isinstance(function, dict):
            raise Wrong(f"tools[{number}]", "it is no function", 'write {"type": "function", "function": {...}}')
        name = function.get("name")
        if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
            raise Wrong(
                f"tools[{number}].function.name", f"{quoted(name)} is no name", "use letters, digits, _ and -, at most 64"
            )
        if name in names:
            raise Wrong(f"tools[{number}].function.name", f"{quoted(name)} stands twice", "take one of them out")
        if not isinstance(function.get("parameters", {}), dict):
            raise Wrong(f"tools[{number}].function.parameters", "it is no JSON schema", "write an object")
        for key, kind, called in (("description", str, "text"), ("strict", bool, "bool")):
            if not isinstance(function.get(key), kind | None):
                raise Wrong(f"tools[{number}].function.{key}", f"it is no {called}", f"write a {called}, or take it out")
        names.add(name)
    for place, text in _strings(found, "tools"):
        check_text(place, text)
    return tuple(found)


def _texts(message: Message) -> None:
    """Wrong if a text is empty where one is needed, or holds what is no text of a message."""
    if message.role == "tool":
        if message.content is None:
            raise Wrong(message.text_at, "it is missing", "write the result, if need be an empty text")
    elif not (message.content or "").strip():
        if message.role != "assistant":
            mend = "take the message out" if message.role == "system" else "write what is asked, or take the row out"
            raise Wrong(message.text_at, f"the {'system prompt' if message.role == 'system' else 'question'} is empty", mend)
        if not message.tool_calls:
            raise Wrong(message.text_at, "the answer is empty", "write the answer, or take the row out")
    check_text(message.text_at, message.content or "")
    for number, call in enumerate(message.tool_calls):
        check_text(f"{message.place}.tool_calls[{number}].function.arguments", call["function"]["arguments"])


def _strings(found: object, place: str) -> Iterable[tuple[str, str]]:
    """Yield each text in lists and objects, keys too, with its place."""
    if isinstance(found, str):
        yield place, found
    elif isinstance(found, dict):
        for key, value in found.items():
            yield place, key
            yield from _strings(value, f"{place}.{key}")
    elif isinstance(found, list):
        for number, value in enumerate(found):
            yield from _strings(value, f"{place}[{number}]")
