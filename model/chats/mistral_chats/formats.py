"""The formats of rows: which one a row has, and its messages in the one form that is checked and encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mistral_contract.suggest import suggest

from mistral_chats.faults import Wrong
from mistral_chats.texts import check_text, quoted

Format = Literal["openai", "sharegpt", "alpaca"]
NAMES: Mapping[Format, str] = {"openai": "OpenAI chat", "sharegpt": "ShareGPT", "alpaca": "Alpaca"}
ROLES = ("system", "user", "assistant", "tool")
LONGEST_KEY = 60  # of a key that a fault names
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
_MENDS = {
    "developer": "write system", "function": "write tool, with a tool_call_id", "human": "write user", "gpt": "write assistant",
    "bot": "write assistant", "model": "write assistant", "ai": "write assistant", "chatbot": "write assistant",
}  # fmt: skip
_MESSAGE_KEYS = {
    "role",
    "content",
    "weight",
    "name",
    "tool_calls",
    "tool_call_id",
    "refusal",
    "audio",
    "function_call",
    "annotations",
}
_TURN_KEYS = {"from", "value", "weight"}
_EMPTY_KEYS = ("refusal", "audio", "function_call", "annotations")
# What a row of each format is made of; the other keys of a row are its own business, unless they look misspelt.
_ROW_KEYS: Mapping[Format, tuple[str, ...]] = {
    "openai": ("messages", "tools", "parallel_tool_calls"),
    "sharegpt": ("conversations", "system"),
    "alpaca": ("instruction", "input", "output", "system"),
}
_NOT_READ = {
    "functions": "write `tools`", "history": "write the whole chat as `messages`", "chosen": "only answers are learnt, not preferences",
    "rejected": "only answers are learnt, not preferences", "preferred_output": "only answers are learnt, not preferences",
    "non_preferred_output": "only answers are learnt, not preferences",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One message with the names of its fields in the file. `weight` is 1 if an answer is learnt; other messages have 0."""

    role: str
    content: str | None
    place: str
    role_field: str
    text_field: str
    weight: int = 0
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def role_at(self) -> str:
        """Where its role stands in the row."""
        return self.role_field or self.place

    @property
    def text_at(self) -> str:
        """Where its text stands in the row."""
        return self.text_field or self.place


def recognise(row: Mapping[str, object]) -> Format:
    """Return the format of a row by its keys; Wrong if it has that of none or of two."""
    found: list[Format] = []
    if "messages" in row:
        found.append("openai")
    if "conversations" in row:
        found.append("sharegpt")
    if "instruction" in row or ("output" in row and "input" in row):
        found.append("alpaca")
    if len(found) > 1:
        names = " and ".join(NAMES[each] for each in found)
        raise Wrong("", f"the row has the keys of {names}", "keep those of one format")
    if found:
        return found[0]
    if {"preferred_output", "chosen"} & set(row):
        raise Wrong("", "the row is a preference", "only answers are learnt: write `messages` with the preferred answer")
    keys = ", ".join(sorted(key[:LONGEST_KEY] for key in row)[:8]) or "no keys"
    for key in row:
        if near := suggest(key, ("messages", "conversations", "instruction"), 0.8):
            raise Wrong(key[:LONGEST_KEY], f"{quoted(key)} is unknown", f"did you mean {near!r}?")
    raise Wrong(
        "", f"the row has {keys}, which is no known format",
        "write messages (OpenAI chat), conversations (ShareGPT), or instruction and output (Alpaca)",
    )  # fmt: skip


def ignored(row: Mapping[str, object], form: Format) -> set[str]:
    """Return the keys of a row that are not read; Wrong if one looks like a misspelt one, or means what is not learnt."""
    others = set(row) - set(_ROW_KEYS[form])
    for key in sorted(others):
        if key in _NOT_READ and row[key] not in (None, [], "", {}):
            raise Wrong(key, f"{key!r} is not read", _NOT_READ[key])
        if (near := suggest(key, _ROW_KEYS[form], 0.8)) and near not in row:
            raise Wrong(key[:LONGEST_KEY], f"{quoted(key)} is unknown", f"did you mean {near!r}? Otherwise rename it")
    return others


def messages(row: Mapping[str, object], form: Format) -> tuple[Message, ...]:
    """Return the messages of a row; Wrong if it has not the fields of its format."""
    return _READERS[form](row)


def _listed(row: Mapping[str, object], key: str) -> list[object]:
    found = row[key]
    if not isinstance(found, list):
        raise Wrong(key, f"it is {_kind(found)}, not a list", "write a list of messages")
    if not found:
        raise Wrong(key, "it has no messages", "take the row out, or write a question and its answer")
    return found


def _kind(value: object) -> str:
    names = {
        str: "a text",
        list: "a list",
        dict: "an object",
        bool: "a bool",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "something else")


def _openai(row: Mapping[str, object]) -> tuple[Message, ...]:
    return tuple(_message(item, f"messages[{number}]") for number, item in enumerate(_listed(row, "messages")))


def _message(item: object, place: str) -> Message:
    if not isinstance(item, dict):
        raise Wrong(place, f"it is {_kind(item)}, not an object", 'write {"role": ..., "content": ...}')
    if "role" not in item:
        given = "from" if "from" in item else next((key for key in item if suggest(key, ("role",), 0.7)), "")
        raise Wrong(f"{place}.role", f"it is missing{f' (there is {quoted(given)})' if given else ''}", "write role and content")
    role = item["role"]
    if role not in ROLES:
        said = f"{quoted(role)} is no role" if isinstance(role, str) else f"it is {_kind(role)}, not a role"
        mend = _MENDS.get(role.lower(), "use system, user, assistant or tool") if isinstance(role, str) else "write a text"
        near = suggest(role, ROLES, 0.7) if isinstance(role, str) and role.lower() not in _MENDS else None
        raise Wrong(f"{place}.role", said, f"did you mean {near!r}?" if near else mend)
    for key in sorted(set(item) - _MESSAGE_KEYS):
        near = suggest(key, _MESSAGE_KEYS, 0.6)
        raise Wrong(
            f"{place}.{key[:LONGEST_KEY]}", "it is not a field of a message", f"did you mean {near!r}?" if near else "take it out"
        )
    for key in _EMPTY_KEYS:
        if item.get(key) not in (None, "", [], {}):
            mend = "write tool_calls" if key == "function_call" else "take it out: only text and calls of tools are learnt"
            raise Wrong(f"{place}.{key}", f"{key} is not read", mend)
    calls = _tool_calls(item, role, place)
    content = _content(item.get("content"), f"{place}.content") if item.get("content") is not None else None
    return Message(
        role, content, place, f"{place}.role", f"{place}.content", _weight(item, role, place), calls,
        _tool_call_id(item, role, place), _name(item, place),
    )  # fmt: skip


def _content(found: object, place: str) -> str:
    """Return a text, or that of a list with one part of it."""
    if isinstance(found, str):
        return found
    if not isinstance(found, list):
        raise Wrong(place, f"it is {_kind(found)}, not a text", "write a text")
    for number, part in enumerate(found):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            wrong = f"it is {quoted(kind)}, not a text" if isinstance(kind, str) and kind != "text" else "it is no part of a text"
            mend = 'these models learn from text alone: write {"type": "text", "text": ...}, or take it out'
            raise Wrong(f"{place}[{number}]", wrong, mend)
    if not found:
        return ""
    if len(found) != 1:
        raise Wrong(place, f"it has {len(found)} parts, which servers join in different ways", "join them into one text")
    text: str = found[0]["text"]
    return text


def _weight(item: Mapping[str, object], role: str, place: str) -> int:
    if "weight" not in item or item["weight"] is None:
        return int(role == "assistant")
    weight = item["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Wrong(f"{place}.weight", f"it is {quoted(weight)}, not 0 or 1", "write 1 if the answer is learnt, 0 if not")
    if role != "assistant" and weight:
        raise Wrong(f"{place}.weight", f"a message of role {role} is not learnt", "take the weight out: it is for answers")
    return int(weight == 1)


def _name(item: Mapping[str, object], place: str) -> str:
    name = item.get("name")
    if name is not None and not isinstance(name, str):
        raise Wrong(f"{place}.name", f"it is {_kind(name)}, not a text", "write a text, or take it out")
    return name or ""


def _tool_call_id(item: Mapping[str, object], role: str, place: str) -> str:
    found = item.get("tool_call_id")
    if role != "tool":
        if found is not None:
            raise Wrong(f"{place}.tool_call_id", f"a message of role {role} has none", "take it out, or write the role tool")
        return ""
    if not isinstance(found, str) or not found:
        raise Wrong(f"{place}.tool_call_id", "it is missing", "write the id of the call that this is the result of")
    return found


def _tool_calls(item: Mapping[str, object], role: str, place: str) -> tuple[Mapping[str, Any], ...]:
    found = item.get("tool_calls")
    if found is None or found == []:
        return ()
    if role != "assistant":
        raise Wrong(
            f"{place}.tool_calls", f"a message of role {role} calls no tools", "take them out, or write the role assistant"
        )
    if not isinstance(found, list):
        raise Wrong(f"{place}.tool_calls", f"it is {_kind(found)}, not a list", "write a list of calls")
    return tuple(_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(found))


def _call(call: object, place: str) -> Mapping[str, Any]:
    """Return a call of a function as the OpenAI API has it, its arguments JSON in a text."""
    from mistral_contract import untrusted

    if not isinstance(call, dict):
        raise Wrong(place, f"it is {_kind(call)}, not an object", 'write {"id", "type": "function", "function": {...}}')
    if call.get("type", "function") != "function":
        raise Wrong(f"{place}.type", f"it is {quoted(call['type'])}", "write function: these models call nothing else")
    if not isinstance(call.get("id"), str) or not call["id"]:
        raise Wrong(f"{place}.id", "it is missing", "write an id, which the result repeats as tool_call_id")
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Wrong(f"{place}.function.name", "it is missing", "write the name of the function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise Wrong(
            f"{place}.function.arguments", f"it is {_kind(arguments)}, not a text", "write the arguments as JSON in a text"
        )
    try:
        untrusted.read(arguments)
    except untrusted.NotRead as error:
        raise Wrong(f"{place}.function.arguments", str(error), "write a JSON object in the text") from None
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _system(row: Mapping[str, object]) -> tuple[Message, ...]:
    """Return the system prompt that stands beside the turns of a row, if it has one."""
    found = row.get("system")
    if found is None or found == "":
        return ()
    if not isinstance(found, str):
        raise Wrong("system", f"it is {_kind(found)}, not a text", "write a text, or take it out")
    return (Message("system", found, "system", "", ""),)


def _sharegpt(row: Mapping[str, object]) -> tuple[Message, ...]:
    found = list(_system(row))
    for number, item in enumerate(_listed(row, "conversations")):
        place = f"conversations[{number}]"
        if not isinstance(item, dict):
            raise Wrong(place, f"it is {_kind(item)}, not an object", 'write {"from": ..., "value": ...}')
        if "role" in item and "from" not in item:
            raise Wrong(f"{place}.from", "it is missing (there is 'role')", "rename conversations to messages, or role to from")
        for key in ("from", "value"):
            if not isinstance(item.get(key), str):
                wrong = f"it is {_kind(item[key])}, not a text" if key in item else "it is missing"
                raise Wrong(f"{place}.{key}", wrong, "write from (system, human or gpt) and value, both texts")
        if item["from"] not in _SHAREGPT:
            raise Wrong(
                f"{place}.from", f"{quoted(item['from'])} is no role",
                "use system, human or gpt; for calls of tools write OpenAI chat (messages)",
            )  # fmt: skip
        for key in sorted(set(item) - _TURN_KEYS):  # turns have keys of their own, such as a language
            if (near := suggest(key, _TURN_KEYS, 0.8)) and near not in item:
                raise Wrong(
                    f"{place}.{key[:LONGEST_KEY]}", "it is not a field of a turn", f"did you mean {near!r}? Otherwise rename it"
                )
        role = _SHAREGPT[item["from"]]
        found.append(Message(role, item["value"], place, f"{place}.from", f"{place}.value", _weight(item, role, place)))
    return tuple(found)


def _alpaca(row: Mapping[str, object]) -> tuple[Message, ...]:
    """Return the two messages of a row: its instruction, with its input behind an empty line, and its output."""
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            wrong = f"it is {_kind(row[key])}, not a text" if key in row else "it is missing"
            raise Wrong(key, wrong, "write instruction and output, both texts")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise Wrong("input", f"it is {_kind(extra)}, not a text", "write a text, or take it out")
    instruction, output = str(row["instruction"]), str(row["output"])
    if not instruction.strip():
        raise Wrong("instruction", "it is empty", "write what is asked, or take the row out")
    check_text("input", extra or "")
    question = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return (
        *_system(row),
        Message("user", question, "instruction", "", ""),
        Message("assistant", output, "output", "", "", 1),
    )


_READERS: Mapping[Format, Callable[[Mapping[str, object]], tuple[Message, ...]]] = {
    "openai": _openai, "sharegpt": _sharegpt, "alpaca": _alpaca,
}  # fmt: skip
