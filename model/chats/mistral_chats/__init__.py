"""Chats for fine-tuning: recognised, checked line by line, and encoded to the tokens that the server will see."""

from __future__ import annotations

from mistral_chats.chats import Chat, Chats, read
from mistral_chats.dataset import Dataset, Summary, dataset
from mistral_chats.encoder import Encoder, Example, encode
from mistral_chats.faults import Fault, Malformed, NoTokenizer
from mistral_chats.show import show

__all__ = [
    "Chat", "Chats", "Dataset", "Encoder", "Example", "Fault", "Malformed", "NoTokenizer", "Summary", "dataset", "encode", "read", "show",
]  # fmt: skip
__version__ = "0.1.0"
