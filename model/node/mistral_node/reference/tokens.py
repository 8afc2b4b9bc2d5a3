"""The tokenizer of a folder as the server needs it: prompts and chats to tokens, and an answer to text while its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vllm_mistral.reference import BadInput

CONTEXT = 5  # tokens of a prompt in whose company an answer's first ones are read
UNFINISHED = "\ufffd"  # a character of which a token has only the first bytes


class Tokens(Protocol):
    """A tokenizer."""

    ends: tuple[int, ...]

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text; with `special` those that a prompt begins with."""

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a chat up to where its answer begins; BadInput if it cannot be written in this model's form."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, without special ones."""

    def name(self, token_id: int) -> str:
        """Return one token as log-probabilities name it: as its library does, with the blank that it begins with."""


class HuggingFace:
    """tokenizer.json and its chat template, by transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        end = self._tokenizer.eos_token_id
        self.ends: tuple[int, ...] = () if end is None else (int(end),)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises
            raise BadInput(str(error)) from error
        return list(self._tokenizer.encode(str(text), add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def name(self, token_id: int) -> str:
        text, piece = str(self._tokenizer.decode([token_id])), str(self._tokenizer.convert_ids_to_tokens(token_id))
        return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


class Mistral:
    """tekken.json or tokenizer.model.vN, by mistral_common."""

    def __init__(self, folder: Path) -> None:
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.utils import get_one_valid_tokenizer_file

        file = get_one_valid_tokenizer_file([path.name for path in folder.iterdir()])
        self._chats: Any = MistralTokenizer.from_file(str(folder / file), mode=ValidationMode.test)
        self._tokenizer: Any = self._chats.instruct_tokenizer.tokenizer
        self._ignore, self._keep = SpecialTokenPolicy.IGNORE, SpecialTokenPolicy.KEEP
        self.ends: tuple[int, ...] = (int(self._tokenizer.eos_id),)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, bos=special, eos=False))

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            return list(self._chats.encode_chat_completion(ChatCompletionRequest.from_openai(messages=messages)).tokens)
        except Exception as error:  # the library's own kinds, pydantic's, and assertions
            raise BadInput(str(error)) from error

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), special_token_policy=self._ignore))

    def name(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_piece(token_id))


def opened(folder: Path, mode: str) -> Tokens:
    """Return the tokenizer of a folder, by mistral_common with the mode `mistral`; BadInput if there is none that can be read."""
    try:
        return Mistral(folder) if mode == "mistral" else HuggingFace(folder)
    except Exception as error:  # of any library that reads the file
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{folder}: no usable tokenizer ({said})") from error


class Text:
    """An answer's text, token by token: what each adds behind the ones before. A character comes when its last byte has come."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode, self._ids = decode, list(prompt[-CONTEXT:])
        self._before, self._read = 0, len(self._ids)

    def add(self, token_id: int) -> str:
        """Return the text that this token adds."""
        self._ids.append(token_id)
        old, new = self._decode(self._ids[self._before : self._read]), self._decode(self._ids[self._before :])
        if new.endswith(UNFINISHED) or len(new) <= len(old):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return new[len(old) :]
