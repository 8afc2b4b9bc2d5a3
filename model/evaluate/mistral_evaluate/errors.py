"""What ends an evaluation."""

from __future__ import annotations


class EvaluateError(Exception):
    """What is wrong and what to do, in one line."""
