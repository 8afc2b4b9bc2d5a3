"""Secrets that the laptop sent: a JSON file of mode 0600, never part of a task or a command line."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from mistral_contract import untrusted

from .errors import Kind, WeightsError


@dataclass(frozen=True)
class Secrets:
    """Where the secrets lie, and how many seconds to wait for the file to appear."""

    path: Path | None = None
    wait: float = 0.0

    def get(self, name: str) -> str:
        """The secret `name`; empty when there is none."""
        if self.path is None:
            return ""
        end = time.monotonic() + self.wait
        while not self.path.exists():
            if time.monotonic() >= end:
                return ""
            time.sleep(0.2)
        try:
            value = untrusted.read_file(self.path).get(name) or ""
        except (OSError, ValueError):
            raise WeightsError(Kind.USAGE, f"{self.path} is not a readable JSON object; write the secrets again") from None
        return str(value)
