"""From a chat to the tokens that are trained on: each prompt as the server will see it, and the answer behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mistral_chats.chats import Chat
from mistral_chats.faults import Fault, Malformed, NoTokenizer, Wrong

IGNORED = -100  # what torch's cross entropy leaves out
Mode = Literal["mistral", "hf"]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """A row of training: `labels` repeats the tokens that are learnt, and has IGNORED elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(label != IGNORED for label in self.labels)


class Tokenizer(Protocol):
    """How a server with one --tokenizer-mode makes tokens of a chat.

    `by` says which library counts, with its version; `ends` are the tokens that end an answer.
    """

    by: str
    ends: frozenset[int]

    def prompt(self, messages: Messages, tools: Messages) -> list[int]:
        """Return the tokens of a request, as the server makes them."""

    def answered(self, messages: Messages, tools: Messages, prompt: list[int]) -> list[int]:
        """Return `prompt` with the tokens of the last message, the answer, behind it."""

    def check(self, chat: Chat) -> None:
        """Wrong if a chat holds what this tokenizer does not take as text."""

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones with their names."""


class Encoder:
    """Makes examples of chats with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.by = tokenizer.by

    def examples(self, chat: Chat, file: str = "") -> tuple[Example, ...]:
        """Return the examples of a chat; Malformed if its tokenizer does not take it.

        An answer goes on in the example of the answer before it if its prompt does, token for token, and into one of its own if
        not: mistral_common's v2 and v3 move the system prompt to the last question, v2 leaves out former calls of tools.
        """
        try:
            self.tokenizer.check(chat)
            return self._examples(chat)
        except Wrong as wrong:
            raise Malformed([Fault(file or "chat", chat.line, wrong.field, wrong.wrong, wrong.mend)]) from None

    def _examples(self, chat: Chat) -> tuple[Example, ...]:
        found: list[Example] = []
        ids: list[int] = []
        labels: list[int] = []
        for answer in chat.learnt:
            prompt = self.tokenizer.prompt(chat.messages[:answer], chat.tools)
            whole = self.tokenizer.answered(chat.messages[: answer + 1], chat.tools, prompt)
            end = next((number for number in range(len(prompt), len(whole)) if whole[number] in self.tokenizer.ends), None)
            if whole[: len(prompt)] != prompt or end is None:
                raise NoTokenizer(
                    f"the chat template ends no answer with a token that ends generation ({self.by}); mend the template, or eos_token"
                )
            if ids and prompt[: len(ids)] != ids:
                found.append(_example(ids, labels))
                ids, labels = [], []
            labels += [IGNORED] * (len(prompt) - len(labels)) + whole[len(prompt) : end + 1]
            labels += [IGNORED] * (len(whole) - len(labels))
            ids = whole
        return (*found, _example(ids, labels))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones with their names."""
        return self.tokenizer.text(ids)


def _example(ids: list[int], labels: list[int]) -> Example:
    """Return an example without what follows its last learnt token."""
    last = max(number for number, label in enumerate(labels) if label != IGNORED)
    return Example(tuple(ids[: last + 1]), tuple(labels[: last + 1]))


def _mistral(folder: Path) -> Tokenizer:
    from mistral_chats.mistral import Mistral

    return Mistral(folder)


def _hf(folder: Path) -> Tokenizer:
    from mistral_chats.hf import opened

    return opened(folder)


_MODES: Mapping[Mode, Callable[[Path], Tokenizer]] = {"mistral": _mistral, "hf": _hf}


def encode(tokenizer_folder: str | Path, mode: Mode) -> Encoder:
    """Return the encoder of a folder with a tokenizer, for a server with this --tokenizer-mode.

    NoTokenizer if the folder has none that can be used, or its library is not installed.
    """
    try:
        return Encoder(_MODES[mode](Path(tokenizer_folder)))
    except ModuleNotFoundError as error:
        package = f"mistral-chats[{mode}]"
        raise NoTokenizer(f"counting tokens needs the package {str(error.name).partition('.')[0]}; install {package}") from None
