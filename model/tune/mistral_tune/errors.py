"""What is wrong with a run of training, and what to do, in one line."""

from __future__ import annotations


class TuneError(Exception):
    """Ends a step with its message as the last line of standard error."""


class Interrupted(TuneError):
    """The step was asked to end; the same command goes on from the last checkpoint."""
