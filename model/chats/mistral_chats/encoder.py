"""From a chat to the tokens that are trained on: each prompt as the server will see it, and the answer behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

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


class TooLong(Exception):
    """A chat that has more tokens than may be; `length` is that of its longest example that was looked at."""

    def __init__(self, length: int) -> None:
        super().__init__(f"{length} tokens")
        self.length = length


class _Answer(NamedTuple):
    """A learnt answer: all tokens of the chat up to it and behind it, where it starts, and where its end token ends."""

    whole: list[int]
    start: int
    end: int


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

    def examples(self, chat: Chat, file: str = "", max_length: int = 0) -> tuple[Example, ...]:
        """Return the examples of a chat; Malformed if its tokenizer does not take it, TooLong if one has more tokens than `max_length`.

        An answer goes on in the example of the answer before it if its prompt does, token for token, and into one of its own if
        not: mistral_common's v2 and v3 move the system prompt to the last question, v2 leaves out former calls of tools.
        """
        try:
            self.tokenizer.check(chat)
            last = self._answer(chat, chat.learnt[-1])  # the longest as a rule: a chat that is far too long takes no longer
            if 0 < max_length < last.end:
                raise TooLong(last.end)
            found = _joined([*(self._answer(chat, answer) for answer in chat.learnt[:-1]), last])
        except Wrong as wrong:
            raise Malformed([Fault(file or "chat", chat.line, wrong.field, wrong.wrong, wrong.mend)]) from None
        longest = max(len(example.input_ids) for example in found)
        if 0 < max_length < longest:
            raise TooLong(longest)
        return found

    def _answer(self, chat: Chat, answer: int) -> _Answer:
        prompt = self.tokenizer.prompt(chat.messages[:answer], chat.tools)
        whole = self.tokenizer.answered(chat.messages[: answer + 1], chat.tools, prompt)
        end = next((number for number in range(len(prompt), len(whole)) if whole[number] in self.tokenizer.ends), None)
        if whole[: len(prompt)] != prompt or end is None:
            raise NoTokenizer(
                f"the chat template ends no answer with a token that ends generation ({self.by}); mend the template, or eos_token"
            )
        return _Answer(whole, len(prompt), end + 1)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones with their names."""
        return self.tokenizer.text(ids)


def _joined(answers: Sequence[_Answer]) -> tuple[Example, ...]:
    """Return the examples of a chat's answers: one for each run of answers whose prompts go on where the one before ended."""
    found: list[Example] = []
    labels: list[int] = []
    before: _Answer | None = None
    for answer in answers:
        if before and answer.whole[: min(answer.start, len(before.whole))] != before.whole:
            found.append(Example(tuple(before.whole[: before.end]), tuple(labels)))
            labels = []
        labels += [IGNORED] * (answer.start - len(labels)) + answer.whole[answer.start : answer.end]
        before = answer
    return (*found, Example(tuple(before.whole[: before.end]), tuple(labels))) if before else ()


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
