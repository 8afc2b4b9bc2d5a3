"""Trying again, with backoff and a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .errors import WeightsError
from .events import Report, Retrying
from .patience import Patience

T = TypeVar("T")


def tried(what: str, patience: Patience, report: Report, call: Callable[[], T]) -> T:
    """What `call` gives, tried again as often as its errors are worth it."""
    failures = 0
    while True:
        try:
            return call()
        except WeightsError as error:
            failures += 1
            seconds = patience.wait(error, failures)
            if seconds is None:
                raise
            report(Retrying(what, str(error), seconds))
            time.sleep(seconds)
