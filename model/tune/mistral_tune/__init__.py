"""Fine-tuning on chats, in three steps: `train`, `prove` (with vLLM), `publish`. The libraries do the work."""

from __future__ import annotations

__version__ = "0.1.0"
