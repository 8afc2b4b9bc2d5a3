"""The one kind of error that a user sees: a line that says what is wrong and what to do, and an exit code of its kind."""

from __future__ import annotations

from enum import IntEnum

from mistral_contract.untrusted import printable


class Exit(IntEnum):
    """Exit codes of the command line, as the README lists them."""

    OK = 0
    BUG = 1
    USAGE = 2
    NO_FIT = 3
    NOT_FOUND = 4
    CONFLICT = 5
    MACHINE = 6
    NETWORK = 7
    CLOUD = 8
    SERVER = 9
    WEIGHTS = 10
    INTERRUPTED = 130


def figure(value: float) -> str:
    """A number as people write it, without an exponent and without a zero that says nothing.

    >>> figure(0.00001), figure(1000000), figure(3.0)
    ('0.00001', '1000000', '3')
    """
    text = repr(value)
    if "e" in text:
        from decimal import Decimal

        text = f"{Decimal(text):f}"
    return text.removesuffix(".0")


class UserError(Exception):
    """What is wrong and what to do, in one line; `code` is the exit code that goes with it, `details` a table below it."""

    def __init__(self, message: str, code: Exit = Exit.USAGE, details: str = "") -> None:
        super().__init__(printable(message))
        self.code = code
        self.details = details
