"""Ctrl-C, SIGTERM and SIGHUP: the first ends a command in order and says what goes on without it, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from mistralctl.errors import Exit

SAME_SECONDS = 0.3  # a signal to the whole group of processes, which a program between passes on, is one
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
# What goes on when a command is interrupted that does not say so itself; NAME is its argument.
GOES_ON = {
    "chat": "NAME serves on; an answer that had begun is not finished",
    "logs": "NAME goes on",
    "status": "nothing was changed",
    "plan": "nothing was changed",
    "doctor": "nothing was changed",
    "env": "nothing was changed",
    "receipt": "nothing was changed",
    "extend": "its end may be put off already: mistralctl status NAME says until when NAME lives",
    "connect": "the tunnel may be open already: mistralctl status NAME says so, mistralctl connect NAME opens it again",
    "keys": "the change may be in force already: mistralctl keys NAME list shows who may ask",
    "reap": "what was being deleted may still go; run mistralctl reap again to see what is left",
    "eval": "the answers so far are kept; the same command asks only the rest",
    "weights": "run the same command again: it continues where it was",
}


def said(arguments: Sequence[str]) -> str:
    """What is left to know after a command was interrupted."""
    command, name = ([word for word in [*arguments, "", ""] if word != "--debug"])[:2]
    name = name if name and not name.startswith("-") else "it"  # it may be left out
    text = GOES_ON.get(command, "nothing was left half-done")
    return f"interrupted; {text.replace('NAME', name)}"


def listen() -> None:
    """From now on the first signal is a KeyboardInterrupt; a later one ends this process there and then."""
    began: list[float] = []

    def heard(number: int, frame: FrameType | None) -> None:
        if not began:
            began.append(time.monotonic())
            raise KeyboardInterrupt
        if time.monotonic() - began[0] > SAME_SECONDS:
            at_once("mistralctl: interrupted again and ended at once; mistralctl status says what runs\n")

    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, heard)


def at_once(text: str) -> NoReturn:
    """End this process now, whatever its threads wait for."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, text.encode())
    os._exit(Exit.INTERRUPTED)
