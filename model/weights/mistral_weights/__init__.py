"""The weights of a language model: pulled in parallel, resumed, mirrored, every byte checked."""

from __future__ import annotations

__version__ = "0.1.0"
