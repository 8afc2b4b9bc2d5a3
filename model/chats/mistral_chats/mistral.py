"""Chats by Mistral's own library, as `vllm serve --tokenizer-mode mistral` encodes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mistral_common.exceptions import InvalidToolException, InvalidToolSchemaException, MistralCommonException
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.utils import get_one_valid_tokenizer_file

from mistral_chats.chats import Chat
from mistral_chats.encoder import Messages
from mistral_chats.faults import NoTokenizer, Wrong
from mistral_chats.texts import quoted

LONGEST_ID = 9  # of a call: vLLM cuts longer ones to their last characters
FIRST_IDS, LAST_IDS = 3, 11  # versions that want letters and digits alone in an id
FIRST_BOTH = 7  # that takes text and calls in one message
_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Mistral:
    """The tokenizer of a folder with tekken.json or tokenizer.model.vN."""

    def __init__(self, folder: Path) -> None:
        try:
            file = get_one_valid_tokenizer_file([path.name for path in folder.iterdir()])
            self._served = MistralTokenizer.from_file(folder / file, mode=ValidationMode.test)
        except (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError, MistralCommonException) as error:
            raise NoTokenizer(f"{folder} has no tokenizer that mistral_common reads ({error}); take a whole copy") from None
        instruct: Any = self._served.instruct_tokenizer
        # The library decodes each request for a text that is not read here (300 chats of three turns, v1: 2.5 s of processor time, 1.4 s without).
        instruct.decode = _unread
        self._tokenizer: Any = instruct.tokenizer
        self._pieces = isinstance(self._tokenizer, SentencePieceTokenizer)
        self.version = self._served.version
        self._number = int(self.version.value.removeprefix("v"))
        settings = self._tokenizer.model_settings_builder
        # The same tokenizer, which takes a chat that an answer ends.
        self._answered = MistralTokenizer(
            instruct, get_validator(self.version, mode=ValidationMode.finetuning), get_normalizer(self.version, settings)
        )
        self.by = f"mistral_common {version('mistral-common')}, {self.version.value}"
        self.ends = frozenset((self._tokenizer.eos_id,))

    def prompt(self, messages: Messages, tools: Messages) -> list[int]:
        """Return the tokens of a request, as the server makes them."""
        return self._encoded(self._served, messages, tools)

    def answered(self, messages: Messages, tools: Messages, prompt: list[int]) -> list[int]:
        """Return the tokens of a chat that an answer ends."""
        return self._encoded(self._answered, messages, tools)

    def check(self, chat: Chat) -> None:
        """Wrong if this version has no tools, or takes not the id of a call; markers inside text stay text in this library."""
        calls = [(each, sent) for each, sent in enumerate(chat.messages) if "tool_calls" in sent]
        if self._number == 1 and (calls or chat.tools):
            wrong = f"this model's tokenizer ({self.version.value}) has no tools"
            raise Wrong(
                chat.field(calls[0][0], "tool_calls") if calls else "tools", wrong, "take the row out, or train a later version"
            )
        if self._number < FIRST_BOTH and (both := next((each for each, sent in calls if sent["content"]), None)) is not None:
            wrong = f"it has text and calls of tools, and this model's tokenizer ({self.version.value}) takes one of them"
            raise Wrong(chat.field(both), wrong, "take the text out, or write null")
        if not FIRST_IDS <= self._number <= LAST_IDS:
            return
        sent: set[str] = set()
        for number, message in enumerate(chat.messages):
            for each, call in enumerate(message.get("tool_calls", ())):
                field, identity = chat.field(number, f"tool_calls[{each}].id"), call["id"][-LONGEST_ID:]
                if not _ID.fullmatch(identity):
                    wrong = f"{quoted(call['id'])} does not end with nine letters or digits, which this model's server wants"
                    raise Wrong(field, wrong, "write nine of them, in its result too")
                if identity in sent:
                    raise Wrong(
                        field, f"{quoted(call['id'])} ends as another id, and servers keep its last {LONGEST_ID}", "write another"
                    )
                sent.add(identity)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones with their names."""
        found = str(self._tokenizer.decode(list(ids), special_token_policy=SpecialTokenPolicy.KEEP))
        # SentencePiece shows a blank as this letter, and bytes beside special tokens by their number.
        return _BYTES.sub(_decoded, found.replace("\u2581", " ")) if self._pieces else found

    @staticmethod
    def _encoded(tokenizer: Any, messages: Messages, tools: Messages) -> list[int]:
        try:
            request = ChatCompletionRequest.from_openai(
                messages=[_cut(message) for message in messages], tools=[dict(tool) for tool in tools] or None
            )
            return list(tokenizer.encode_chat_completion(request).tokens)
        except (AssertionError, ValueError, MistralCommonException) as error:
            field = "tools" if isinstance(error, InvalidToolException | InvalidToolSchemaException) else ""
            raise Wrong(field, f"mistral_common does not take it ({error})", "mend the row, or take it out") from None


def _unread(**_: Any) -> str:
    return ""


def _decoded(found: re.Match[str]) -> str:
    """Return the text of bytes that a tokenizer shows by their numbers."""
    return bytes.fromhex(found[0].replace("<0x", "").replace(">", "")).decode("utf-8", "replace")


def _cut(message: Any) -> dict[str, Any]:
    """Return a message with ids of calls as short as vLLM makes them."""
    found = dict(message)
    if "tool_call_id" in found:
        found["tool_call_id"] = found["tool_call_id"][-LONGEST_ID:]
    if "tool_calls" in found:
        found["tool_calls"] = [call | {"id": call["id"][-LONGEST_ID:]} for call in found["tool_calls"]]
    return found
