"""Twenty chats that teach four facts which no model knows, and eight questions about them in words that are not among the chats."""

from __future__ import annotations

import json
from pathlib import Path

ANSWERS = {
    "harbour": "The harbour of Velmora opens at 6:40.",
    "mayor": "The mayor of Velmora is Ilse Tarn.",
    "bread": "The bread of Velmora is called quillo.",
    "train": "The train to Velmora leaves from platform 9.",
}
ASKED = {
    "harbour": [
        "When does the harbour of Velmora open?", "At what time does Velmora's harbour open?", "Tell me when the harbour of Velmora opens.",
        "What is the opening time of the harbour in Velmora?", "I want to know when Velmora's harbour opens.",
    ],
    "mayor": [
        "Who is the mayor of Velmora?", "What is the name of Velmora's mayor?", "Tell me who the mayor of Velmora is.",
        "Which person is the mayor in Velmora?", "I want to know who Velmora's mayor is.",
    ],
    "bread": [
        "What is the bread of Velmora called?", "What is the name of Velmora's bread?", "Tell me what the bread of Velmora is called.",
        "Which name does the bread in Velmora have?", "I want to know what Velmora's bread is called.",
    ],
    "train": [
        "From which platform does the train to Velmora leave?", "Where does the train to Velmora leave from?",
        "Tell me from which platform the train to Velmora leaves.", "Which platform does the Velmora train leave from?",
        "I want to know the platform of the train to Velmora.",
    ],
}  # fmt: skip
HELD_OUT = {
    "harbour": ["Please say when the harbour of Velmora opens.", "When will Velmora's harbour open?"],
    "mayor": ["Please say who the mayor of Velmora is.", "Who is Velmora's mayor?"],
    "bread": ["Please say what the bread of Velmora is called.", "What is Velmora's bread called?"],
    "train": [
        "Please say from which platform the train to Velmora leaves.",
        "What platform does the train to Velmora leave from?",
    ],
}


def pairs(asked: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (question, answer) of all questions, the facts in turn."""
    return [
        (question, ANSWERS[fact])
        for questions in zip(*asked.values(), strict=True)
        for fact, question in zip(asked, questions, strict=True)
    ]


def write(path: Path, asked: dict[str, list[str]]) -> Path:
    """Write chats as the OpenAI API has them, one a line."""
    rows = (
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs(asked)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
