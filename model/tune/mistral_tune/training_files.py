"""Names of what training leaves in the folder of its result, for who does not import torch."""

from __future__ import annotations

HISTORY = "history.json"  # what the Trainer logged, of all steps
