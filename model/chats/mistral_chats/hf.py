"""Chats by a folder's tokenizer.json and its chat template, as `vllm serve --tokenizer-mode hf` encodes them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mistral_contract import untrusted

from mistral_chats.chats import Chat
from mistral_chats.encoder import Messages, Tokenizer
from mistral_chats.faults import NoTokenizer, Wrong


class Templated(ABC):
    """A chat template with the tokenizer that encodes what it renders."""

    def __init__(self, folder: Path) -> None:
        if (folder / "tekken.json").exists() and (folder / "tokenizer.json").exists():
            raise NoTokenizer(
                f"{folder} has tekken.json beside tokenizer.json, and libraries choose differently; take one of them out"
            )
        self.config = _json(folder / "tokenizer_config.json")
        self.template = _template(folder, self.config)
        self.by = ""
        self.ends: frozenset[int] = frozenset()
        self.special: tuple[str, ...] = ()

    @abstractmethod
    def rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        """Return the text of a chat; with `prompt` what begins an answer stands at its end."""

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""

    @abstractmethod
    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones with their names."""

    def prompt(self, messages: Messages, tools: Messages) -> list[int]:
        """Return the tokens of a request, as the server makes them."""
        return self.ids(self._text(messages, tools, True))

    def answered(self, messages: Messages, tools: Messages, prompt: list[int]) -> list[int]:
        """Return `prompt` with the tokens of the answer behind it.

        Where the answer's first characters would join the prompt's last token, they are encoded on their own, as the server
        generates them: its prompt ends before.
        """
        before, whole = self._text(messages[:-1], tools, True), self._text(messages, tools, False)
        if not whole.startswith(before):
            raise NoTokenizer(
                "the chat template writes an answer otherwise than behind its own prompt for it; use another template"
            )
        found = self.ids(whole)
        return found if found[: len(prompt)] == prompt else prompt + self.ids(whole[len(before) :])

    def check(self, chat: Chat) -> None:
        """Wrong if a text holds a special token, which this tokenizer would take as one, or the template has no tools."""
        if "tool" not in self.template and chat.tools:
            raise Wrong("tools", "this model's chat template has no tools", "take the row out")
        for number, message in enumerate(chat.messages):
            if "tool" not in self.template and "tool_calls" in message:
                raise Wrong(chat.field(number, "tool_calls"), "this model's chat template has no tools", "take the row out")
            self._marked(chat.field(number), message.get("content") or "")
            self._marked(chat.field(number, "tool_calls"), json.dumps(message.get("tool_calls", ()), ensure_ascii=False))
        self._marked("tools", json.dumps(chat.tools, ensure_ascii=False))

    def _marked(self, field: str, text: str) -> None:
        for token in self.special:
            if token in text:
                mend = "take it out: the tokenizer would take it as one, and text must not end a turn"
                raise Wrong(field, f"{token!r} is a special token inside text", mend)

    def _text(self, messages: Messages, tools: Messages, prompt: bool) -> str:
        try:
            return self.rendered([_parsed(message) for message in messages], [described(tool) for tool in tools] or None, prompt)
        except Wrong:
            raise
        except Exception as error:  # noqa: BLE001 a template raises whatever it likes
            raise Wrong("", f"the chat template does not take it ({error})", "mend the row, or take it out") from None


def _parsed(message: Any) -> dict[str, Any]:
    """Return a message as vLLM hands it to a template: arguments of calls as objects, no content as an empty text."""
    found = dict(message) | {"content": message.get("content") or ""}
    if "tool_calls" in found:
        found["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
            for call in found["tool_calls"]
        ]
    return found


def described(tool: Any) -> dict[str, Any]:
    """Return a tool as vLLM hands it to a template: no fields but these, and those of them that it always has."""
    function = tool["function"]
    found = {"name": function["name"], "description": function.get("description"), "parameters": function.get("parameters")}
    return {
        "type": "function",
        "function": found | ({"strict": function["strict"]} if function.get("strict") is not None else {}),
    }


class Loaded(Templated):
    """The tokenizer as transformers loads it, and vLLM with it: what training uses."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NoTokenizer(f"{folder} has no tokenizer that transformers reads ({error}); take a whole copy") from None
        self.by = f"transformers {version('transformers')}"
        self.special = tuple(self._tokenizer.all_special_tokens)
        self.special += tuple(
            token.content
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special and token.content not in self.special
        )
        self.ends = _ends(folder, self._tokenizer.eos_token_id)

    def rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        """Return the text of a chat; with `prompt` what begins an answer stands at its end."""
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False))

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones with their names."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class Counted(Templated):
    """The tokenizer by the `tokenizers` library alone: what a laptop without transformers counts with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import jinja2.ext
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer as Fast

        try:
            self._tokenizer: Any = Fast.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 the library raises Exception itself
            raise NoTokenizer(f"{folder}/tokenizer.json cannot be read ({error}); take a whole copy") from None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raised
        environment.globals["strftime_now"] = _now
        try:
            self._render = environment.from_string(self.template).render
        except TemplateSyntaxError as error:
            raise NoTokenizer(
                f"the chat template of {folder} is wrong in line {error.lineno} ({error.message}); mend it"
            ) from None
        self._names = {key: found for key in self.config if key.endswith("_token") and (found := _token(self.config[key]))}
        self.by = f"tokenizers {version('tokenizers')}"
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = tuple(token.content for token in added.values() if token.special)
        self.ends = _ends(folder, self._tokenizer.token_to_id(self._names.get("eos_token", "")))

    def rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        """Return the text of a chat; with `prompt` what begins an answer stands at its end."""
        return self._render(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._names)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones with their names."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def opened(folder: Path) -> Tokenizer:
    """Return a folder's tokenizer as the server loads it, where transformers is installed; else by `tokenizers` alone."""
    return Loaded(folder) if find_spec("transformers") else Counted(folder)


def _json(path: Path) -> dict[str, Any]:
    """Return a small JSON file, {} if there is none."""
    try:
        return untrusted.read_file(path)
    except FileNotFoundError:
        return {}
    except (OSError, untrusted.NotRead) as error:
        raise NoTokenizer(f"{path} cannot be read ({error}); take a whole copy") from None


def _template(folder: Path, config: dict[str, Any]) -> str:
    """Return the chat template of a folder, the default one of several."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return untrusted.contents(file, untrusted.MOST_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise NoTokenizer(f"{file} cannot be read ({error}); take a whole copy") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise NoTokenizer(f"{folder} has no chat template; train an instruct model, or add chat_template.jinja")
    return found


def _ends(folder: Path, eos: int | None) -> frozenset[int]:
    """Return the tokens that end a generation: the tokenizer's, and those of generation_config.json."""
    found = _json(folder / "generation_config.json").get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return frozenset(each for each in (*listed, eos) if isinstance(each, int))


def _token(found: Any) -> str:
    """Return the text of a token of tokenizer_config.json."""
    content = found.get("content") if isinstance(found, dict) else found
    return content if isinstance(content, str) else ""


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raised(message: str) -> None:
    raise ValueError(message)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().astimezone().strftime(form)
