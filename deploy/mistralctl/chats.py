"""The check of training data on the laptop: the very sources that a node gets, from the folder that travels with this package.

The one module that imports `mistral_chats`; its errors become ours here. Reading a file needs nothing more; counting its tokens needs the
libraries of `mistralctl[finetune]`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mistralctl import package_dir
from mistralctl.errors import Exit, UserError

sys.path.insert(0, str(package_dir("model") / "chats"))

from mistral_chats import Chat, Chats, Dataset, Encoder, Malformed, NoTokenizer, Summary, dataset, encode, read, show
from mistral_chats.show import in_colour

__all__ = [
    "Chat", "Chats", "Dataset", "Encoder", "Summary", "counted", "in_colour", "read_chats", "show",
]  # fmt: skip

INSTALL = "pip install 'mistralctl[finetune]'"


@contextmanager
def explained() -> Iterator[None]:
    """What the tool raises inside, as the one kind of error that a user sees."""
    try:
        yield
    except Malformed as error:
        raise UserError(str(error), Exit.USAGE) from error
    except NoTokenizer as error:
        message = str(error)
        for extra in ("mistral", "hf"):
            message = message.replace(f"install mistral-chats[{extra}]", INSTALL)
        raise UserError(message, Exit.MACHINE if INSTALL in message else Exit.WEIGHTS) from error


def read_chats(path: str | Path) -> Chats:
    """Return the chats of a file, every row checked; UserError with the first fault and the lines of the others."""
    with explained():
        return read(path)


def counted(
    chats: Chats, tokenizer_folder: str | Path, mode: Literal["mistral", "hf"], max_length: int = 0, keep: int | None = None
) -> tuple[Dataset, Encoder]:
    """Return the examples of chats with their Summary, and the encoder that made them; UserError if a row cannot be trained on.

    `max_length`: rows of more tokens are refused, all of them counted; 0 takes any. `keep`: so many examples are kept, to be shown.
    """
    with explained():
        encoder = encode(tokenizer_folder, mode)
        return dataset(chats, encoder, max_length, keep), encoder
