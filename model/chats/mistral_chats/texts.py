"""What may stand in a text of a chat, and how a value of a file is quoted."""

from __future__ import annotations

import re

from mistral_chats.faults import Wrong

LONGEST_QUOTED = 60
# Tokens that end a turn or begin one, of these models and of others: in a text they come from a template that was applied before.
MARKERS = re.compile(
    r"</?s>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|<</?SYS>>|<\|[a-zA-Z0-9_]{1,40}\|>|</?(?:start|end)_of_turn>|<unk>|<pad>"
)


def check_text(place: str, text: str) -> None:
    """Wrong if a text holds a special token, or a character that no text has."""
    if found := MARKERS.search(text):
        mend = "take it out: the chat is put into the model's own template, and text must not end a turn"
        raise Wrong(place, f"{found[0]!r} is a special token inside text", mend)
    if "\x00" in text:
        raise Wrong(place, "it has a zero character (\\u0000)", "take it out")
    if "\ufffd" in text:
        raise Wrong(place, "it has U+FFFD, which stands where text was decoded wrongly", "write the text anew from its source")


def quoted(value: object) -> str:
    """Return a value as Python writes it, cut where it is long.

    >>> quoted("bot"), quoted(3)
    ("'bot'", '3')
    """
    found = repr(value)
    return found if len(found) <= LONGEST_QUOTED else f"{found[: LONGEST_QUOTED - 3]}..."
