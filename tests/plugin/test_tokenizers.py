"""Chat is tokenized as Mistral's own library does, with each version's real tokenizer: what vLLM feeds to the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import training
from checkpoints import TOKENIZERS, mistral_tokenizer, write
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from nodes import launched
from vllm.tokenizers import get_tokenizer

CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one question": [{"role": "user", "content": "What is the capital of France?"}],
    "a second turn": [
        {"role": "user", "content": "Hello, wörld — 你好 🙂"},
        {"role": "assistant", "content": "Hi!\n\n  How are you?"},
        {"role": "user", "content": "[INST] is text here, </s> too."},
    ],
    "a system prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
}
# What the hub has beside the weights of each version, the vocabulary, and the first token of [INST]: plain text in the
# oldest tokenizer, which v0.1 and v0.2 share, a control token later. v0.3 also has its tokenizer under the old name.
VERSIONS = {
    "v0.1 and v0.2": (["tokenizer.model.v1"], 32000, MistralTokenizer.v1, 733),
    "v0.3, old name too": (["mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model"], 32768, MistralTokenizer.v3, 3),
}
FAMILY = {"v0.1 and v0.2": "mistral v1", "v0.3, old name too": "mistral v3"}
ROLES = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}


def by_mistral(library: Callable[[], MistralTokenizer], conversation: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation by Mistral's own library."""
    messages = [ROLES[message["role"]](content=message["content"]) for message in conversation]
    return list(library().encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens)


@pytest.mark.parametrize("version", VERSIONS)
def test_chat_over_http_is_tokenized_as_mistral_does(tmp_path: Path, version: str) -> None:
    files, vocabulary, library, instruction = VERSIONS[version]
    weights = write(tmp_path / "weights" / "tiny", vocab_size=vocabulary, num_hidden_layers=1, hidden_size=32, sliding_window=128)
    folder = mistral_tokenizer(weights, files[0])
    for other in files[1:]:
        shutil.copy(folder / TOKENIZERS[files[0]], folder / other)
    family = FAMILY[version]
    with launched(tmp_path, MAX_MODEL_LEN="1024", TOOL_PARSER="mistral" if training.has_tools(family) else "") as launcher:
        launcher.until("ready")
        for name, conversation in CONVERSATIONS.items():
            body = {"model": "tiny", "messages": conversation, "max_tokens": 1, "return_token_ids": True}
            answer = launcher.json("/v1/chat/completions", body)
            wanted = by_mistral(library, conversation)
            assert answer["prompt_token_ids"] == wanted, name
            assert wanted[:2] == [1, instruction], name
        assert training.compare(launcher, family, folder) == (15 if training.has_tools(family) else 11)


def test_the_tokenizer_under_its_new_name_alone_is_the_same(tmp_path: Path) -> None:
    """By the very tokenizer that vLLM serves with, without a server around it."""
    folder = mistral_tokenizer(tmp_path, "mistral_instruct_tokenizer_240323.model.v3")
    found = get_tokenizer(folder, tokenizer_mode="mistral")
    for name, conversation in CONVERSATIONS.items():
        assert found.apply_chat_template(conversation) == by_mistral(MistralTokenizer.v3, conversation), name
