"""Token ids of texts, as the server makes them of the prompt of a completion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mistral_evaluate.errors import EvaluateError


class Tokens(Protocol):
    """A tokenizer. `prefix` is the token before a text that has no context; None if the model names none."""

    prefix: int | None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of a text; with `special` those that the model wants before it, too (BOS)."""


class HuggingFace:
    """tokenizer.json, for --tokenizer-mode hf."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        before = self.encode("")
        self.prefix = before[0] if before else self._named(folder)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _named(self, folder: Path) -> int | None:
        """Return the first of BOS and EOS that the model names."""
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text("utf-8")) if file.exists() else {}
        for name in ("bos_token", "eos_token"):
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and (found := self._tokenizer.token_to_id(text)) is not None:
                return int(found)
        return None


class Mistral:
    """tekken.json or tokenizer.model.vN, for --tokenizer-mode mistral."""

    def __init__(self, folder: Path) -> None:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.utils import get_one_valid_tokenizer_file

        file = get_one_valid_tokenizer_file([path.name for path in folder.iterdir()])
        self._tokenizer: Any = MistralTokenizer.from_file(folder / file).instruct_tokenizer.tokenizer
        self.prefix: int | None = int(self._tokenizer.bos_id)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of a text."""
        return list(self._tokenizer.encode(text, bos=special, eos=False))


_MODES: Mapping[str, Callable[[Path], Tokens]] = {"hf": HuggingFace, "mistral": Mistral}


def opened(folder: Path, mode: str) -> Tokens:
    """Return the tokenizer of a folder; EvaluateError if it has none that can be read."""
    try:
        return _MODES[mode](folder)
    except Exception as error:  # noqa: BLE001 - the libraries raise Exception itself
        raise EvaluateError(f"{folder} has no tokenizer that can be read ({error}); take a whole copy of the weights") from None
