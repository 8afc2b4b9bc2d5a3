"""The lines that a run of training writes."""

from __future__ import annotations

import json
import sys
from typing import Any

PROGRESS = "mistralctl-progress "


def line(text: str) -> None:
    """Write one line for eyes."""
    sys.stdout.write(f"mistral_tune: {text}\n")
    sys.stdout.flush()


def progress(**values: Any) -> None:
    """Write how far the training is: a line of JSON behind `mistralctl-progress`."""
    sys.stdout.write(PROGRESS + json.dumps(values) + "\n")
    sys.stdout.flush()
