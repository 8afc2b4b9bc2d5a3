"""Files of chats: what is recognised, and the one line for each thing that is wrong."""

from __future__ import annotations

import json
import os
import random
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


def test_what_is_learnt_and_what_a_client_sends_for_it(tmp_path: Path) -> None:
    row = chat(
        SYSTEM,
        user(),
        answer("No.", weight=0),
        user("Sure?"),
        answer("Yes.", weight=1),
        user([{"type": "text", "text": "So?"}]),
        answer(),
    )
    [found] = read_chats(write(tmp_path, row)).rows
    assert found.learnt == (4, 6)
    sent = [SYSTEM, user(), answer("No."), user("Sure?")]
    assert found.request(4) == {"messages": sent}
    assert found.messages[5] == user("So?")
    assert (found.field(2), found.field(2, "tool_calls")) == ("messages[2].content", "messages[2].tool_calls")


def test_calls_of_tools_are_kept_as_the_api_has_them(tmp_path: Path) -> None:
    tool = {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        user(),
        answer(None, tool_calls=[call]),
        {"role": "tool", "content": "2", "tool_call_id": "a1b2c3d4e"},
        answer("It is 2."),
    ]
    [found] = read_chats(write(tmp_path, chat(*messages, tools=[tool]))).rows
    assert (found.messages, found.tools, found.learnt) == (tuple(messages), (tool,), (1, 3))
    assert found.request(1) == {"messages": messages[:1], "tools": [tool]}


def test_the_input_of_alpaca_stands_behind_its_instruction(tmp_path: Path) -> None:
    [found] = read_chats(write(tmp_path, {"instruction": "Add.", "input": "1 and 2", "output": "3"})).rows
    assert found.messages == (user("Add.\n\n1 and 2"), answer("3"))
    assert found.fields == ("instruction", "output")


def call(**changed: Any) -> dict[str, object]:
    function = {"name": "add", "arguments": "{}"} | changed.pop("function", {})
    return {"id": "a1b2c3d4e", "type": "function", "function": function} | changed


def result(content: object = "3", **fields: object) -> dict[str, object]:
    return {"role": "tool", "content": content, "tool_call_id": "a1b2c3d4e"} | fields


def calls(*behind: object, tools: object = None, **changed: Any) -> dict[str, object]:
    """A chat whose first answer calls a tool."""
    return chat(user(), answer(None, tool_calls=[call(**changed)]), *(behind or (result(), answer())), tools=tools)


def turns(*messages: tuple[str, object]) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": text} for role, text in messages]}


ORDER = "write questions (user) and answers (assistant) in turn"
TEMPLATE = "take it out: the chat is put into the model's own template, and text must not end a turn"
ONE_OBJECT = "write each row as one JSON object in one line, or all of them in one JSON array"
# What stands in the second line of a file, and what is said behind the file's name.
MALFORMED: dict[str, tuple[object, str]] = {
    "no JSON": ("{'messages': []}", f":2: it is not JSON (Expecting property name enclosed in double quotes at column 2); {ONE_OBJECT}"),
    "cut off": ('{"messages": [{"role": "user"', f":2: it is not JSON (Expecting ',' delimiter at column 30); {ONE_OBJECT}"),
    "two in a line": (f"{json.dumps(GOOD)} {json.dumps(GOOD)}", f":2: it is not JSON (Extra data at column 96); {ONE_OBJECT}"),
    "a list": ("[]", ':2: the row is a list, not a JSON object; write {"messages": [...]}'),
    "a number": ("3", ':2: the row is a number or a bool, not a JSON object; write {"messages": [...]}'),
    "null": ("null", ':2: the row is null, not a JSON object; write {"messages": [...]}'),
    "NaN": ('{"messages": NaN}', ":2: it has NaN, which is no number in JSON; write a number that JSON has, or a text"),
    "a key twice": ('{"messages": [], "messages": []}', ":2: it has the key 'messages' twice; take one of them out"),
    "half a character": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        ":2: it has half of a surrogate pair (\\ud83d); write the whole character",
    ),
    "nested deeply": ('{"messages":' + "[" * 100 + "]" * 100 + "}", ":2: it is nested deeper than 64 levels; write chats as lists of messages"),
    "nested beyond the parser": (
        '{"messages":' + "[" * 99999 + "]" * 99999 + "}", ":2: it is nested deeper than 64 levels; write chats as lists of messages",
    ),
    "a huge number": ('{"messages": 1' + "0" * 50 + "}", ":2: it has a number of 51 digits; write a number that JSON has, or a text"),
    "a huge row": (
        json.dumps(chat(user("a" * (5 << 20)), answer())), ":2: the row has 5242974 bytes, and at most 4194304 are read; split the chat",
    ),
    "no format": (
        {"prompt": "Why?", "completion": "So."},
        ":2: the row has completion, prompt, which is no known format; write messages (OpenAI chat), conversations (ShareGPT), or instruction"
        " and output (Alpaca)",
    ),
    "no keys": (
        {}, ":2: the row has no keys, which is no known format; write messages (OpenAI chat), conversations (ShareGPT), or instruction"
        " and output (Alpaca)",
    ),
    "a misspelt key": ({"mesages": []}, ":2: mesages: 'mesages' is unknown; did you mean 'messages'?"),
    "a misspelt second key": (chat(tool=[]), ":2: tool: 'tool' is unknown; did you mean 'tools'? Otherwise rename it"),
    "preferences": (
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        ":2: the row is a preference; only answers are learnt: write `messages` with the preferred answer",
    ),
    "a preference beside messages": (chat(chosen=[answer()]), ":2: chosen: 'chosen' is not read; only answers are learnt, not preferences"),
    "functions": (chat(functions=[{}]), ":2: functions: 'functions' is not read; write `tools`"),
    "another format": (
        turns(("human", "Why?"), ("gpt", "So.")), ":2: the row is ShareGPT, and line 1 is OpenAI chat; keep one format in a file",
    ),
    "two formats in a row": (
        chat() | turns(("human", "Why?")), ":2: the row has the keys of OpenAI chat and ShareGPT; keep those of one format",
    ),
    "messages are no list": ({"messages": "Why?"}, ":2: messages: it is a text, not a list; write a list of messages"),
    "no messages": ({"messages": []}, ":2: messages: it has no messages; take the row out, or write a question and its answer"),
    "messages are null": ({"messages": None}, ":2: messages: it is null, not a list; write a list of messages"),
    "a message is a text": (chat("Why?", answer()), ':2: messages[0]: it is a text, not an object; write {"role": ..., "content": ...}'),
    "no role": (chat({"content": "Why?"}, answer()), ":2: messages[0].role: it is missing; write role and content"),
    "the role has another name": (
        chat({"from": "user", "content": "Why?"}, answer()), ":2: messages[0].role: it is missing (there is 'from'); write role and content",
    ),
    "an unknown role": (chat(user(), answer(role="moderator")), ":2: messages[1].role: 'moderator' is no role; use system, user, assistant or tool"),
    "a misspelt role": (chat(user(), answer(role="asistant")), ":2: messages[1].role: 'asistant' is no role; did you mean 'assistant'?"),
    "a long role": (
        chat(user(), answer(role="x" * 999)),
        f":2: messages[1].role: '{'x' * 56}... is no role; use system, user, assistant or tool",
    ),
    "a role in capitals": (chat(user(role="User"), answer()), ":2: messages[0].role: 'User' is no role; did you mean 'user'?"),
    "another's role": (chat(user(), answer(role="bot")), ":2: messages[1].role: 'bot' is no role; write assistant"),
    "a newer role": (chat(user(role="developer"), user(), answer()), ":2: messages[0].role: 'developer' is no role; write system"),
    "a role that is a number": (chat(user(role=1), answer()), ":2: messages[0].role: it is a number, not a role; write a text"),
    "a misspelt field": (chat(user(), answer(weigth=0)), ":2: messages[1].weigth: it is not a field of a message; did you mean 'weight'?"),
    "an unknown field": (chat(user(), answer(mood=1)), ":2: messages[1].mood: it is not a field of a message; take it out"),
    "a call as once": (
        chat(user(), answer(function_call={"name": "add"})), ":2: messages[1].function_call: function_call is not read; write tool_calls",
    ),
    "a text that is a number": (chat(user(3), answer()), ":2: messages[0].content: it is a number, not a text; write a text"),
    "a picture": (
        chat(user([{"type": "image_url", "image_url": {"url": "x"}}]), answer()),
        ":2: messages[0].content[0]: it is 'image_url', not a text; these models learn from text alone: write "
        '{"type": "text", "text": ...}, or take it out',
    ),
    "a part that is none": (
        chat(user(["Why?"]), answer()),
        ":2: messages[0].content[0]: it is no part of a text; these models learn from text alone: write "
        '{"type": "text", "text": ...}, or take it out',
    ),
    "no parts": (chat(user([]), answer()), ":2: messages[0].content: the question is empty; write what is asked, or take the row out"),
    "two parts": (
        chat(user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), answer()),
        ":2: messages[0].content: it has 2 parts, which servers join in different ways; join them into one text",
    ),
    "an empty answer": (chat(user(), answer("")), ":2: messages[1].content: the answer is empty; write the answer, or take the row out"),
    "a blank answer": (chat(user(), answer(" \n")), ":2: messages[1].content: the answer is empty; write the answer, or take the row out"),
    "no answer": (chat(user(), answer(None)), ":2: messages[1].content: the answer is empty; write the answer, or take the row out"),
    "an answer without content": (
        chat(user(), {"role": "assistant"}), ":2: messages[1].content: the answer is empty; write the answer, or take the row out",
    ),
    "an empty question": (chat(user(""), answer()), ":2: messages[0].content: the question is empty; write what is asked, or take the row out"),
    "an empty system prompt": (
        chat({"role": "system", "content": " "}, user(), answer()), ":2: messages[0].content: the system prompt is empty; take the message out",
    ),
    "ends with a question": (
        chat(user(), answer(), user()), ":2: messages[2].role: the chat ends with a message of role user; end it with an answer (assistant), or take"
        " that message out",
    ),
    "a question alone": (
        chat(user()), ":2: messages[0].role: the chat ends with a message of role user; end it with an answer (assistant), or take that message out",
    ),
    "begins with an answer": (
        chat(answer()), ":2: messages[0].role: the chat begins with role assistant; begin it with user, or with one system message",
    ),
    "an answer to a system prompt": (chat(SYSTEM, answer()), f":2: messages[1].role: role assistant follows system; {ORDER}"),
    "two questions": (chat(user(), user(), answer()), ":2: messages[1].role: two messages of role user follow each other; join them into one"),
    "two answers": (
        chat(user(), answer(), answer()), ":2: messages[2].role: two messages of role assistant follow each other; join them into one",
    ),
    "a late system prompt": (
        chat(user(), answer(), SYSTEM, user(), answer()),
        ":2: messages[2].role: a system message stands behind another message; write one system message, as the first",
    ),
    "two system prompts": (
        chat(SYSTEM, SYSTEM, user(), answer()),
        ":2: messages[1].role: a system message stands behind another message; write one system message, as the first",
    ),
    "nothing to learn": (
        chat(user(), answer(weight=0)),
        ":2: messages[1]: the row has no answer to learn; give one of its answers the weight 1, or take the row out",
    ),
    "a weight between": (
        chat(user(), answer(weight=0.5)), ":2: messages[1].weight: it is 0.5, not 0 or 1; write 1 if the answer is learnt, 0 if not",
    ),
    "a weight that is a bool": (
        chat(user(), answer(weight=True)), ":2: messages[1].weight: it is True, not 0 or 1; write 1 if the answer is learnt, 0 if not",
    ),
    "a weight that is a text": (
        chat(user(), answer(weight="1")), ":2: messages[1].weight: it is '1', not 0 or 1; write 1 if the answer is learnt, 0 if not",
    ),
    "the weight of a question": (
        chat(user(weight=1), answer()), ":2: messages[0].weight: a message of role user is not learnt; take the weight out: it is for answers",
    ),
    "the end of a turn in a question": (
        chat(user("Why?</s>"), answer()), f":2: messages[0].content: '</s>' is a special token inside text; {TEMPLATE}",
    ),
    "a template that was applied": (
        chat(user("[INST] Why? [/INST]"), answer()), f":2: messages[0].content: '[INST]' is a special token inside text; {TEMPLATE}",
    ),
    "another's template": (
        chat(user(), answer("So.<|im_end|>")), f":2: messages[1].content: '<|im_end|>' is a special token inside text; {TEMPLATE}",
    ),
    "a zero character": (chat(user("a\x00b"), answer()), ":2: messages[0].content: it has a zero character (\\u0000); take it out"),
    "text that was decoded wrongly": (
        chat(user("caf\ufffd"), answer()),
        ":2: messages[0].content: it has U+FFFD, which stands where text was decoded wrongly; write the text anew from its source",
    ),
    "a row again": (GOOD, ":2: the row repeats line 1; take one of them out"),
    "a row again, with blanks": (chat(user("How? "), answer("Thus.\n")), ":2: the row repeats line 1; take one of them out"),
    "calls that are no list": (
        chat(user(), answer(None, tool_calls="add")), ":2: messages[1].tool_calls: it is a text, not a list; write a list of calls",
    ),
    "a question that calls": (
        chat(user(tool_calls=[call()]), answer()),
        ":2: messages[0].tool_calls: a message of role user calls no tools; take them out, or write the role assistant",
    ),
    "a call without an id": (
        calls(id=""), ":2: messages[1].tool_calls[0].id: it is missing; write an id, which the result repeats as tool_call_id",
    ),
    "a call without a name": (
        calls(function={"name": ""}), ":2: messages[1].tool_calls[0].function.name: it is missing; write the name of the function",
    ),
    "a name with blanks": (
        calls(function={"name": "add up"}),
        ":2: messages[1].tool_calls[0].function.name: 'add up' is no name; use letters, digits, _ and -, at most 64",
    ),
    "arguments as an object": (
        calls(function={"arguments": {}}),
        ":2: messages[1].tool_calls[0].function.arguments: it is an object, not a text; write the arguments as JSON in a text",
    ),
    "arguments that are no JSON": (
        calls(function={"arguments": "{a: 1}"}),
        ":2: messages[1].tool_calls[0].function.arguments: it is not JSON (Expecting property name enclosed in double quotes: line 1 column 2"
        " (char 1)); write a JSON object in the text",
    ),
    "a call of something else": (
        calls(type="custom"), ":2: messages[1].tool_calls[0].type: it is 'custom'; write function: these models call nothing else",
    ),
    "a call without a result": (
        calls(user(), answer()), ":2: messages[2].role: role user follows a call of a tool; write the result (tool) of each call behind it",
    ),
    "a result of another call": (
        calls(result(tool_call_id="x"), answer()),
        ":2: messages[2].tool_call_id: 'x': no call before it has this id; repeat the id of an open call",
    ),
    "two results of a call": (
        calls(result(), result(), answer()),
        ":2: messages[3].tool_call_id: 'a1b2c3d4e': it has a result already; repeat the id of an open call",
    ),
    "one result of two calls": (
        chat(user(), answer(None, tool_calls=[call(), call(id="f6g7h8i9j")]), result(), answer()),
        ":2: messages[3]: the call 'f6g7h8i9j' has no result; write a tool message for each call",
    ),
    "an id twice": (
        chat(user(), answer(None, tool_calls=[call(), call()]), result(), answer()),
        ":2: messages[1].tool_calls[1].id: 'a1b2c3d4e' stands twice; give each call an id of its own",
    ),
    "a result without an id": (
        calls({"role": "tool", "content": "3"}, answer()),
        ":2: messages[2].tool_call_id: it is missing; write the id of the call that this is the result of",
    ),
    "a result of no call": (
        chat(user(), result(), answer()),
        ":2: messages[1].role: a result of a tool follows role user; write the call (assistant with tool_calls) before it",
    ),
    "a question behind a result": (
        calls(result(), user(), answer()),
        ":2: messages[3].role: role user follows the result of a tool; write the answer (assistant) to the result before it",
    ),
    "a call of an unknown tool": (
        calls(tools=[{"type": "function", "function": {"name": "subtract"}}]),
        ":2: messages[1].tool_calls[0].function.name: 'add' is none of the row's tools; add it to tools, or mend the name",
    ),
    "tools that are no list": (chat(tools="add"), ":2: tools: it is not a list; write a list of functions, as the OpenAI API has them"),
    "a tool that is no function": (
        chat(tools=[{"name": "add"}]), ':2: tools[0]: it is no function; write {"type": "function", "function": {...}}',
    ),
    "a tool without a name": (
        chat(tools=[{"type": "function", "function": {}}]),
        ":2: tools[0].function.name: None is no name; use letters, digits, _ and -, at most 64",
    ),
    "a description that is none": (
        chat(tools=[{"type": "function", "function": {"name": "add", "description": 3}}]),
        ":2: tools[0].function.description: it is no text; write a text, or take it out",
    ),
    "strict is no bool": (
        chat(tools=[{"type": "function", "function": {"name": "add", "strict": "no"}}]),
        ":2: tools[0].function.strict: it is no bool; write a bool, or take it out",
    ),
    "a special token in a description": (
        chat(tools=[{"type": "function", "function": {"name": "add", "description": "</s>"}}]),
        f":2: tools[0].function.description: '</s>' is a special token inside text; {TEMPLATE}",
    ),
    "a tool twice": (
        chat(tools=[{"type": "function", "function": {"name": "add"}}] * 2),
        ":2: tools[1].function.name: 'add' stands twice; take one of them out",
    ),
    "a schema that is none": (
        chat(tools=[{"type": "function", "function": {"name": "add", "parameters": 1}}]),
        ":2: tools[0].function.parameters: it is no JSON schema; write an object",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_each_malformed_row_is_named_with_its_field_and_what_to_do(tmp_path: Path, kind: str) -> None:
    row, said = MALFORMED[kind]
    assert refusal(write(tmp_path, GOOD, row)) == said


TEXTS = "write from (system, human or gpt) and value, both texts"
SHAREGPT: dict[str, tuple[object, str]] = {
    "a list that is none": ({"conversations": {}}, ":2: conversations: it is an object, not a list; write a list of messages"),
    "no turns": ({"conversations": []}, ":2: conversations: it has no messages; take the row out, or write a question and its answer"),
    "an unknown role": (
        turns(("human", "Why?"), ("moderator", "So.")),
        ":2: conversations[1].from: 'moderator' is no role; use system, human or gpt; for calls of tools write OpenAI chat (messages)",
    ),
    "no value": ({"conversations": [{"from": "human"}]}, f":2: conversations[0].value: it is missing; {TEXTS}"),
    "a value that is none": (turns(("human", 3)), f":2: conversations[0].value: it is a number, not a text; {TEXTS}"),
    "the roles of messages": (
        {"conversations": [user(), answer()]},
        ":2: conversations[0].from: it is missing (there is 'role'); rename conversations to messages, or role to from",
    ),
    "begins with an answer": (
        turns(("gpt", "Hello."), ("human", "Why?"), ("gpt", "So.")),
        ":2: conversations[0].from: the chat begins with role assistant; begin it with user, or with one system message",
    ),
    "a misspelt weight": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So.", "weigth": 0, "lang": "en"}]},
        ":2: conversations[1].weigth: it is not a field of a turn; did you mean 'weight'? Otherwise rename it",
    ),
    "an empty answer": (
        turns(("human", "Why?"), ("gpt", "")), ":2: conversations[1].value: the answer is empty; write the answer, or take the row out",
    ),
    "two questions": (
        turns(("human", "Why?"), ("human", "Why?"), ("gpt", "So.")),
        ":2: conversations[1].from: two messages of role user follow each other; join them into one",
    ),
    "a special token": (
        turns(("human", "Why?"), ("gpt", "So.</s>")), f":2: conversations[1].value: '</s>' is a special token inside text; {TEMPLATE}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAREGPT)
def test_each_malformed_row_of_sharegpt(tmp_path: Path, kind: str) -> None:
    row, said = SHAREGPT[kind]
    assert refusal(write(tmp_path, turns(("human", "How?"), ("gpt", "Thus.")), row)) == said


ALPACA: dict[str, tuple[object, str]] = {
    "no output": ({"instruction": "Why?"}, ":2: output: it is missing; write instruction and output, both texts"),
    "no instruction": ({"input": "Why?", "output": "So."}, ":2: instruction: it is missing; write instruction and output, both texts"),
    "an empty instruction": (
        {"instruction": "", "input": "Why?", "output": "So."}, ":2: instruction: it is empty; write what is asked, or take the row out",
    ),
    "an empty output": ({"instruction": "Why?", "output": ""}, ":2: output: the answer is empty; write the answer, or take the row out"),
    "an output that is a list": (
        {"instruction": "Why?", "output": ["So."]}, ":2: output: it is a list, not a text; write instruction and output, both texts",
    ),
    "an input that is a list": (
        {"instruction": "Why?", "input": [], "output": "So."}, ":2: input: it is a list, not a text; write a text, or take it out",
    ),
    "former turns": (
        {"instruction": "Why?", "output": "So.", "history": [["a", "b"]]},
        ":2: history: 'history' is not read; write the whole chat as `messages`",
    ),
    "a misspelt key": (
        {"instruction": "Why?", "outputs": "So."}, ":2: outputs: 'outputs' is unknown; did you mean 'output'? Otherwise rename it",
    ),
    "a special token in the input": (
        {"instruction": "Why?", "input": "</s>", "output": "So."}, f":2: input: '</s>' is a special token inside text; {TEMPLATE}",
    ),
    "a special token": (
        {"instruction": "[INST] Why?", "output": "So."}, f":2: instruction: '[INST]' is a special token inside text; {TEMPLATE}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALPACA)
def test_each_malformed_row_of_alpaca(tmp_path: Path, kind: str) -> None:
    row, said = ALPACA[kind]
    assert refusal(write(tmp_path, {"instruction": "How?", "output": "Thus."}, row)) == said


TEXT = json.dumps(chat(user("Où ?"), answer()), ensure_ascii=False)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ": it is empty; write one chat a line"),
    "blank": (b"\n \n", ": it has no rows; write one chat a line"),
    "Latin-1": (TEXT.encode("latin-1"), ":1: byte 0xf9 at position 45 is not UTF-8; save the file as UTF-8 (iconv -f ENCODING -t UTF-8)"),
    "UTF-16": (TEXT.encode("utf-16"), ": it is UTF-16 text, not JSON lines in UTF-8; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    "UTF-16 without a mark": (
        TEXT.encode("utf-16-le"), ": it has zero bytes: UTF-16 text, or no text at all; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    ),
    "UTF-32": (TEXT.encode("utf-32"), ": it is UTF-32 text, not JSON lines in UTF-8; save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    "gzip": (b"\x1f\x8b\x08\x00", ": it is gzip, not JSON lines in UTF-8; unpack it (gunzip)"),
    "Parquet": (b"PAR1\x15\x04", ": it is a Parquet file, not JSON lines in UTF-8; write it as JSON lines"),
    "no rows in an array": (b"[\n]", ": the array has no rows; write one chat at least"),
    "an array that is cut off": (
        f"[\n{TEXT},\n".encode(), ":3: [1]: it is not JSON (Expecting value, line 3 column 1); mend the array, or write one row a line",
    ),
    "an array that is not closed": (f"[\n{TEXT}\n".encode(), ":3: the file ends within its array; mend the array, or write one row a line"),
    "a comma is missing": (
        f"[{TEXT}\n{TEXT}]".encode(), ":2: a comma is missing behind row [0]; mend the array, or write one row a line",
    ),
    "text behind an array": (f"[{TEXT}]\n{TEXT}".encode(), ":2: text follows the array; write one array, or one row a line"),
    "a row of an array": (
        f'[{TEXT},\n{{"messages": []}}]'.encode(),
        ":2: [1].messages: it has no messages; take the row out, or write a question and its answer",
    ),
    "a text of an array": (
        f'[{TEXT},\n {{"messages": [{{"role": "user", "content": ""}}, {{"role": "assistant", "content": "a"}}]}}]'.encode(),
        ":2: [1].messages[0].content: the question is empty; write what is asked, or take the row out",
    ),
    "a row again in one line": (f"[{TEXT}, {TEXT}]".encode(), ":1: [1]: the row repeats [0] in line 1; take one of them out"),
    "an array nested deeply": (b"[" * 99999, ":1: [0]: it is nested deeper than 64 levels; mend the array, or write one row a line"),
    "one row in several lines": (
        json.dumps(GOOD, indent=1).encode(),
        f":1: it is not JSON (Expecting property name enclosed in double quotes at column 2); {ONE_OBJECT}"
        " (and 11 more faults in lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_each_malformed_file(tmp_path: Path, kind: str) -> None:
    data, said = FILES[kind]
    file = tmp_path / "chats.jsonl"
    file.write_bytes(data)
    assert refusal(file) == said


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    with file.open("wb") as handle:
        handle.truncate((1 << 30) + 1)
    assert refusal(file) == ": it has 1073741825 bytes, and at most 1073741824 are read; train on a part of it"


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere.jsonl") == ": there is no such file; check the path"
    assert refusal(tmp_path) == ": it is a folder; name one file of chats"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == ": it is no plain file; write the chats to a file first"


def test_all_faults_are_counted_and_their_lines_named(tmp_path: Path) -> None:
    bad = chat(user(), answer(""))
    file = write(tmp_path, GOOD, bad, "", "{", chat(user(), answer("So.")), chat(user("")))
    first = ":2: messages[1].content: the answer is empty; write the answer, or take the row out"
    assert refusal(file) == f"{first} (and 2 more faults in lines 4, 6)"
    assert refusal(write(tmp_path, *[bad] * 1500)).endswith("(and 1499 more faults in lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...)")


def test_an_array_and_lines_with_a_mark_and_without_a_last_newline_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "chats.json"
    forms = (
        "\n".join((json.dumps(GOOD), "", TEXT)), f"\ufeff{json.dumps(GOOD)}\r\n\r\n{TEXT}\r\n", f" [{json.dumps(GOOD)}\n\n,{TEXT}]\n",
    )  # fmt: skip
    for form in forms:
        file.write_bytes(form.encode())
        found = read_chats(file)
        assert [one.line for one in found.rows] == [1, 3]
        assert [one.messages[0]["content"] for one in found.rows] == ["How?", "Où ?"]


def test_chats_that_two_files_share_are_found(tmp_path: Path) -> None:
    learnt = read_chats(write(tmp_path, GOOD, chat()))
    (tmp_path / "other").mkdir()
    held_out = read_chats(write(tmp_path / "other", chat(user("Who?"), answer()), chat(user(" How?"), answer("Thus.", weight=1))))
    assert held_out.shared(learnt) == ((2, 1),)


JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 2.5, "", " ", "x", [], {}, [[]], [None], {"a": 1}, "user", "assistant", "tool", "\x00", "\ud83d", 10**50, "</s>", [1, 2],
    ["text"], [{"type": "text", "text": "x"}], [{"type": 3}], {"name": None}, {"function": None}, float("nan"), "a" * 300, "\u2028", [{}],
)  # fmt: skip
KEYS = ("role", "content", "weight", "name", "tool_calls", "tool_call_id", "from", "value", "messages", "input", "tools", "x")


def damaged(found: Any, at: random.Random) -> Any:
    """What was read, with one of its values replaced, added or taken away somewhere."""
    if not isinstance(found, dict | list) or not found or at.random() < 0.2:
        return at.choice(JUNK)
    keys = list(found) if isinstance(found, dict) else list(range(len(found)))
    key = at.choice(keys)
    changed: Any = dict(found) if isinstance(found, dict) else list(found)
    match at.randrange(8):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, dict):
            changed[at.choice(KEYS)] = at.choice(JUNK)
        case 2 if isinstance(changed, list):
            changed.insert(at.randrange(len(changed) + 1), at.choice(changed))
        case _:
            changed[key] = damaged(found[key], at)
    return changed


def test_whatever_stands_in_a_row_it_is_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    at = random.Random(1)  # noqa: S311
    whole = (
        chat(SYSTEM, user(), answer("So.", weight=1), tools=[{"type": "function", "function": {"name": "add", "parameters": {}}}]),
        calls(), turns(("human", "Why?"), ("gpt", "So.")), {"instruction": "Why?", "input": "Now.", "output": "So."},
    )  # fmt: skip
    file = tmp_path / "chats.jsonl"
    taken = 0
    for _ in range(1000):
        text = json.dumps(damaged(at.choice(whole), at))
        file.write_text(f"[{text}]" if at.random() < 0.2 else text)
        try:
            [found] = read_chats(file).rows
        except UserError:
            said = refusal(file)
            assert (said[0], "; " in said) == (":", True), text
            continue
        taken += 1
        assert found.learnt, text
        for message in found.messages:
            assert message["content"] is None or isinstance(message["content"], str), text
    assert 50 < taken < 500
