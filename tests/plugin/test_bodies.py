"""What one request may ask: the bounds of every field, before vLLM sees a body. No server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mistral_contract.routes import CHAT, COMPLETIONS
from mistral_node import bodies
from mistral_node.bodies import CHATTED, COMPLETION, Asked, Bounds, Refused, bounds, check

SMALL = Bounds(max_model_len=4096, max_num_seqs=8)
USER = [{"role": "user", "content": "a"}]
LONG = "a" * 200_000
DEEP: Any = 1
for _ in range(100):
    DEEP = {"a": DEEP}


STRICT = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}


def ask(chat: bool = False, **fields: Any) -> Asked:
    data = ({"messages": USER} if chat else {"prompt": "a"}) | fields
    return check((CHAT if chat else COMPLETIONS)[1], json.dumps(data).encode(), SMALL)


def refused(body: bytes | dict[str, Any], chat: bool = False) -> tuple[str, str]:
    """Field and message of a refusal."""
    with pytest.raises(Refused) as found:
        check((CHAT if chat else COMPLETIONS)[1], body if isinstance(body, bytes) else json.dumps(body).encode(), SMALL)
    return found.value.param, found.value.message


def test_every_field_of_the_pinned_vllm_is_judged() -> None:
    """A new vLLM may have new fields: each is bounded, or refused with a reason."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    assert set(CompletionRequest.model_fields) <= set(COMPLETION)
    assert set(ChatCompletionRequest.model_fields) <= set(CHATTED)


def test_what_ordinary_clients_send_is_let_in() -> None:
    openai = {"model": "tiny", "temperature": 0.7, "top_p": 1, "max_tokens": 100, "n": 2, "stream": True, "user": "u", "store": False,
              "stream_options": {"include_usage": True}, "metadata": {"a": "b"}, "service_tier": "auto", "seed": 7, "logit_bias": {"5": -100},
              "stop": ["\n", "###"], "frequency_penalty": 0, "presence_penalty": 0.5, "response_format": {"type": "text"}}  # fmt: skip
    assert ask(**openai) == Asked(2)
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    chat = {"max_completion_tokens": 100, "logprobs": True, "top_logprobs": 5, "tools": [tool], "tool_choice": "auto",
            "parallel_tool_calls": True, "reasoning_effort": None, "audio": None, "prediction": None,
            "chat_template_kwargs": {"thinking": True}}  # fmt: skip
    assert ask(True, **(openai | chat)) == Asked(2)
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [tool]},
    ]
    assert ask(True, messages=parts) == Asked()
    harness = {"prompt": ["a " * 2000] * 4, "logprobs": 1, "echo": True, "max_tokens": 0, "temperature": 0}
    assert ask(**harness) == Asked(4)
    assert ask(prompt=[[1, 2], [3]], n=3) == Asked(6)
    assert ask(prompt=[1, 2, 3]) == Asked()
    assert ask(prompt="\U0001f600é\x00") == Asked()
    assert ask(top_k=-1, min_tokens=1, repetition_penalty=1.1, max_tokens="12", ignore_eos=True) == Asked()


HOSTILE: list[tuple[str, Any]] = [
    ("n", 16384), ("n", 7), ("n", 0), ("n", -1), ("n", 1.5), ("n", True), ("n", "9" * 40), ("n", 10**30), ("best_of", 16384),
    ("top_k", 10**30), ("top_k", -2), ("seed", 1 << 63), ("seed", -(1 << 63) - 1), ("temperature", 1e300), ("temperature", -1),
    ("temperature", "nan"), ("temperature", "1e999"), ("temperature", [1]), ("top_p", 2), ("min_p", -1), ("repetition_penalty", 1e-300),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e308), ("frequency_penalty", 1e9), ("length_penalty", 1e300), ("max_tokens", 10**30), ("max_tokens", -1),
    ("min_tokens", 10**6), ("truncate_prompt_tokens", 1 << 40), ("stop", ["a"] * 5), ("stop", "a" * 1001), ("stop", [1]), ("stop", {}),
    ("stop_token_ids", [1] * 129), ("stop_token_ids", [10**30]), ("stop_token_ids", [-1]), ("bad_words", ["a"] * 65), ("bad_words", [LONG]),
    ("bad_words", "a"), ("logit_bias", {str(n): 1 for n in range(301)}), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 1e9}),
    ("logit_bias", {"9" * 400: 1}), ("allowed_token_ids", list(range(1025))), ("logprob_token_ids", list(range(129))),
    ("prompt_logprobs", -1), ("prompt_logprobs", 10**9), ("stream_interval", 0), ("stream_interval", 10**9),
    ("stream_options", {"include_usage": [1]}),
    ("stream_options", [1]), ("echo", "yes please do"), ("stream", []), ("stream", "maybe"), ("stream", 2), ("echo", " true"),
    ("user", LONG), ("request_id", LONG), ("request_id", "a\r\nb"),
    ("model", LONG),
    ("model", 7), ("cache_salt", LONG), ("priority", -5), ("use_beam_search", True), ("kv_transfer_params", {"a": 1}),
    ("ec_transfer_params", {"a": 1}), ("vllm_xargs", {"a": 1}), ("metadata", {"a": {}}), ("metadata", {str(n): "a" for n in range(17)}),
    ("repetition_detection", {"max_pattern_size": 10**6, "min_count": 10**6}), ("repetition_detection", {"x": 1}),
    ("thinking_token_budget", 10**20),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["a" * 20] * 4000}}}),
    ("response_format", {"type": "json_schema", "json_schema": DEEP}), ("response_format", "json"),
    ("response_format", {"type": "structural_tag", "x": LONG}),
    ("structured_outputs", {"regex": "a" * 5000}), ("structured_outputs", {"grammar": LONG}), ("structured_outputs", {"choice": ["a"] * 1001}),
    ("structured_outputs", {"choice": "a"}), ("structured_outputs", {"json": LONG}), ("structured_outputs", {"whitespace_pattern": "(a+)+"}),
    ("structured_outputs", {"structural_tag": LONG}), ("structured_outputs", {"regex": 5}), ("structured_outputs", {"x": 1}),
    ("structured_outputs", []), ("structured_outputs", {"json": "[" * 30_000 + "]" * 30_000}), ("structured_outputs", {"json": "{"}),
    ("structured_outputs", {"json": json.dumps(DEEP)}), ("structured_outputs", {"structural_tag": '{"a":' * 5000 + "1" + "}" * 5000}),
    ("guided_json", {}), ("unheard_of", 1), ("\ud800", 1), ("user", "\ud800"), ("metadata", {"a": 10**400}),
]  # fmt: skip
OF_A_COMPLETION: list[tuple[str, Any]] = [
    ("prompt", ["a"] * 7), ("prompt", [[1]] * 7), ("prompt", [1] * 4097), ("prompt", [[1] * 4097]), ("prompt", [1, "a"]), ("prompt", [1, 10**30]),
    ("prompt", ["a", [1]]), ("prompt", [-1]), ("prompt", [[10**30]]), ("prompt", {"a": 1}), ("prompt", [True]), ("prompt", [[[1]]]),
    ("prompt", DEEP),
    ("suffix", "a"), ("prompt_embeds", "AAAA"), ("logprobs", 5000), ("logprobs", -1), ("messages", USER), ("chat_template", "{{ 1 }}"),
]  # fmt: skip
OF_A_CHAT: list[tuple[str, Any]] = [
    ("messages", [{"content": "a"}]), ("messages", [{"role": 5}]), ("messages", [{"role": "user", "content": "a", "author": {"role": "user"}}]),
    ("messages", [{"role": "user", "content": [{}]}]), ("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    ("messages", USER * 1025), ("messages", "a"), ("messages", [1]), ("messages", [{"role": "user", "content": {"a": 1}}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1025}]), ("messages", [{"role": "user", "content": DEEP}]),
    ("messages", [{"role": "assistant", "tool_calls": [{}] * 129}]), ("messages", [{"role": "user", "content": "a", "x": [1] * 30000}]),
    ("tools", [{}] * 129), ("tools", [{"a": LONG}]), ("tools", [1]), ("tool_choice", {"a": LONG}), ("tool_choice", 5), ("documents", [{}] * 65),
    ("chat_template", "{% for a in range(10**9) %}{% endfor %}"), ("chat_template_kwargs", {"chat_template": "a"}),
    ("chat_template_kwargs", {"tokenize": False}),
    ("chat_template_kwargs", {"a": [1]}), ("mm_processor_kwargs", {"a": 1}), ("media_io_kwargs", {"a": {}}), ("top_logprobs", -5),
    ("functions", [{}]), ("audio", {"voice": "a"}), ("prompt", "a"),
]  # fmt: skip


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_hostile_values_are_refused_by_the_name_of_their_field(chat: bool) -> None:
    for name, value in HOSTILE + (OF_A_CHAT if chat else OF_A_COMPLETION):
        param, message = refused(({"messages": USER} if chat else {"prompt": "a"}) | {name: value}, chat)
        assert param in (name, "") if name in ("user", "\ud800") else param == name, (name, str(value)[:50])
        assert len(message) < 400
        assert message.isprintable()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'"a"', b"null", b"\xff\xfe{}", '{"prompt": "a"}'.encode("utf-16"), b'{"prompt": "\xff"}',
                                  b'{"prompt": NaN}', b'{"temperature": Infinity}', b'{"temperature": 1e400}', b'{"n": ' + b"9" * 5000 + b"}",
                                  b'{"n": 1, "n": 2}', b'{"response_format": {"type": "text", "type": "json_object"}}',
                                  b"[" * 100_000, b'{"a":' * 100_000,
                                  b'{"prompt": "a"} {}',
                                  b"\xef\xbb\xbf{}", b'{"prompt": "\\ud800"}', b'{"messages": "\\udc00\\ud800"}'])  # fmt: skip
def test_what_is_no_json_object_of_utf_8_is_refused(body: bytes) -> None:
    assert refused(body)[0] in ("", "temperature")


def test_a_body_may_be_as_large_as_the_longest_prompt_needs() -> None:
    assert Bounds(32768, 64).body == 32 * 32768 + (256 << 10)
    assert Bounds(1 << 24, 64).body == bodies.LARGEST
    assert bounds({}).body == bodies.LARGEST
    assert bounds({"MISTRALCTL_MAX_MODEL_LEN": "256", "MISTRALCTL_MAX_NUM_SEQS": "8"}) == Bounds(256, 8)
    with pytest.raises(ValueError, match="MISTRALCTL_MAX_MODEL_LEN"):
        bounds({"MISTRALCTL_MAX_MODEL_LEN": "many"})


def test_bytes_of_a_token_are_those_of_the_longest_ones() -> None:
    from pathlib import Path

    import mistral_common
    import sentencepiece

    for name in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"):
        found = sentencepiece.SentencePieceProcessor(model_file=str(Path(mistral_common.__file__).parent / "data" / name))
        pieces = [found.id_to_piece(number).replace("▁", " ") for number in range(found.vocab_size())]
        assert max(len(json.dumps(piece, ensure_ascii=False)) - 2 for piece in pieces) <= bodies.TOKEN_BYTES


def test_one_request_leaves_places_to_others() -> None:
    assert [Bounds(1, most).sequences for most in (1, 2, 4, 8, 64)] == [1, 1, 3, 6, 48]
    assert refused({"prompt": ["a", "b"], "n": 4}) == (
        "n", "n times the prompts is 8; at most 6 are taken at once, send them in several requests",
    )  # fmt: skip


@pytest.mark.parametrize(("fields", "chat", "param"), [
    ({"logprobs": 20, "max_tokens": 4096, "n": 2}, False, "logprobs"),
    ({"prompt": "a" * 60_000, "prompt_logprobs": 50}, False, "prompt_logprobs"),
    ({"prompt": ["a" * 20_000] * 6, "echo": True, "logprobs": 5, "max_tokens": 0}, False, "prompt_logprobs"),
    ({"logprobs": True, "top_logprobs": 20, "n": 2}, True, "top_logprobs"),
    ({"logprobs": True, "logprob_token_ids": list(range(128))}, True, "top_logprobs"),
    ({"logprobs": "yes", "top_logprobs": 20, "n": 2}, True, "top_logprobs"),
    *(({"logprobs": True, "top_logprobs": 20, "n": 2, "stream": off}, True, "top_logprobs") for off in ("false", "OFF", "n", "0", 0, False, 0.0)),
])  # fmt: skip
def test_log_probabilities_of_one_answer_are_bounded(fields: dict[str, Any], chat: bool, param: str) -> None:
    assert refused(({"messages": USER} if chat else {"prompt": "a"}) | fields, chat)[0] == param


def test_a_stream_writes_log_probabilities_piece_by_piece() -> None:
    assert ask(True, logprobs=True, top_logprobs=20, n=2, stream=True) == Asked(2, uncounted=True)


@pytest.mark.parametrize("on", [True, 1, 1.0, "true", "True", "ON", "y", "1"])
def test_a_flag_is_what_vllm_takes_it_for(on: Any) -> None:
    """Of each spelling: a stream is counted, and who asks for its tokens counts them himself."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    assert CompletionRequest(prompt="a", stream=on).stream is True
    assert ask(stream=on).uncounted
    assert ask(stream=on, stream_options={"include_usage": "off"}).uncounted
    assert not ask(stream=on, stream_options={"include_usage": on}).uncounted


@pytest.mark.parametrize(("fields", "chat", "kind"), [
    ({"structured_outputs": {"regex": "a+"}}, False, "regex"),
    ({"structured_outputs": {"json": {"type": "string"}}}, False, "json"),
    ({"structured_outputs": {"json": '{"type": "string"}'}}, False, "json"),
    ({"structured_outputs": {"choice": ["a", "b"]}}, False, "choice"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string"}}}}, True, "json"),
    ({"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}, True, "structural_tag"),
    ({"tools": [{"type": "function"}], "tool_choice": "required"}, True, "tools"),
    ({"tools": [{"type": "function"}, STRICT], "tool_choice": "auto"}, True, "strict tools"),
    ({"tools": [STRICT]}, True, "strict tools"),
    ({"tools": [STRICT], "tool_choice": "required"}, True, "tools"),
])  # fmt: skip
def test_the_grammar_that_a_request_needs_is_named(fields: dict[str, Any], chat: bool, kind: str) -> None:
    assert [kind for kind, _ in ask(chat, **fields).grammars] == [kind]


def test_no_grammar_is_needed_for_text_or_any_object_or_tools_that_may_be_used() -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}},
        {"tools": [{}], "tool_choice": "auto"},
        {"tools": [STRICT | {"function": {"name": "f", "strict": False}}], "tool_choice": "auto"},
        {"tools": [STRICT], "tool_choice": "none"},
        {"tools": [{}]},
    ):
        assert ask(True, **fields).grammars == ()


def test_of_several_constraints_each_is_named() -> None:
    """vLLM lets response_format win over structured_outputs, and tools that are required over both."""
    tools = {"tools": [{"type": "function"}], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["b"]}}}
    found = ask(True, structured_outputs={"json": {"enum": ["a"]}}, response_format=form, **tools).grammars
    assert found == (("json", '{"enum": ["a"]}'), ("json", '{"enum": ["b"]}'), ("tools", '[{"type": "function"}]'))
