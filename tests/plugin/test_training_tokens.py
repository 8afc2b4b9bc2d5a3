"""What is trained on is what is served: the prompts of training's examples, and those that the server makes of the same requests.

The families v1 and v3 are compared by test_tokenizers.py, whose servers have them already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from mistral_chats.hf import described
from nodes import launched
from training import FAMILIES, MAKE, ROWS, TOOL_ROWS, compare, has_tools, mode_of
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam

ELSEWHERE = {"mistral v1", "mistral v3"}
VOCABULARY = {"hf, byte pairs": 49152, "hf, sentencepiece": 32000}


def test_each_family_has_its_tokenizer_here() -> None:
    assert set(MAKE) == set(FAMILIES)


@pytest.mark.parametrize(
    "function", [{}, {"description": "Adds.", "strict": True}, {"parameters": {"type": "object"}, "x": 1, "strict": None}]
)
def test_a_chat_template_gets_the_tools_that_the_server_hands_to_it(function: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "add"} | function}
    assert described(tool) == ChatCompletionToolsParam(**tool).model_dump()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - ELSEWHERE))
def test_prompts_of_training_are_those_of_the_server(tmp_path: Path, family: str) -> None:
    shape = {"vocab_size": VOCABULARY.get(family, 131072), "num_hidden_layers": 1, "hidden_size": 32, "sliding_window": 128}
    folder = write(tmp_path / "weights" / "tiny", **shape)
    MAKE[family](folder)
    parser = "mistral" if has_tools(family) else ""
    with launched(tmp_path, MAX_MODEL_LEN="1024", TOKENIZER_MODE=mode_of(family), TOOL_PARSER=parser) as launcher:
        launcher.until("ready")
        compared = compare(launcher, family, folder)
    rows = [*ROWS.values(), *(TOOL_ROWS.values() if has_tools(family) else ())]
    assert compared == sum(
        message["role"] == "assistant" and message.get("weight") != 0 for row in rows for message in row["messages"]
    )
