"""The exit codes of the launcher, which are the `code` of an error in status.json, too."""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """An exit code and what it means."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Code:
        code = int.__new__(cls, value)
        code._value_, code.meaning = value, meaning
        return code

    OK = 0, "ended as asked: a signal, idle, or its lifetime"
    CONTRACT = 10, "the contract is wrong (an env is missing or bad)"
    PLUGIN = 11, "the plugin did not load"
    WEIGHTS = 12, "the weights or an adapter are missing or damaged, or what they are is not served"
    ENGINE = 13, "vLLM did not start, or died"
    CANARY = 14, "the check (canary) failed, or an adapter has no effect"
    CLASS = 15, "the engine does not serve our class, or not with the window that was asked for"
    SECRETS = 16, "no secrets came in time"
    GATE = 17, "the gate found a route open that should be shut, or could not be walked"
