"""Every engine answers the same over HTTP: log-probabilities to 5e-5 in float32, greedy answers equal, in the same form, whole and streamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from checkpoints import consolidated, mistral_tokenizer, prompts, write
from mistral_contract.engines import ENGINES, REFERENCE, VLLM
from mistral_contract.routes import SHORT_LIST
from mistral_node import engines
from nodes import Launcher, launched
from vllm_mistral import reference

LIMIT = 5e-5
Measured = Callable[[str, float, float], None]
SLIDING, FULL = "sliding_attention", "full_attention"
# The window is the contract's, too: "" for none.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa 2, window 64": ("64", {"sliding_window": 64}),
    "gqa 4, no window, tied, consolidated": ("", {"num_key_value_heads": 1, "sliding_window": None, "tie_word_embeddings": True}),
    "layers sliding, full, sliding": (
        "80",
        {"sliding_window": 80, "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
}
GREEDY = {"model": "tiny", "temperature": 0, "ignore_eos": True}
BATCH = prompts([8 * 64, 63, 64, 155, 5, 100], vocabulary=32000)
CHAT = {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}


@dataclass(frozen=True)
class Both:
    """The servers of one shape by their engine's name."""

    case: str
    servers: dict[str, Launcher]

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return {name: server.ask(path, body) for name, server in self.servers.items()}


@pytest.fixture(scope="module", params=SHAPES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    window, shape = SHAPES[request.param]
    root = tmp_path_factory.mktemp("engines")
    folder = write(root / "plain", vocab_size=32000, **shape)
    if "consolidated" in request.param:
        folder = consolidated(folder, root / "consolidated")
    mistral_tokenizer(folder, "tokenizer.model.v1")
    assert reference.main([str(folder), "--canary", "--canary-tokens", "200"]) == 0
    with ExitStack() as stack:
        servers = {}
        for name in ENGINES:
            shutil.copytree(folder, root / name / "weights" / "tiny")
            options = {"ENGINE": name, "SLIDING_WINDOW": window, "MAX_MODEL_LEN": "1024"}
            servers[name] = stack.enter_context(launched(root / name, **options))
        for server in servers.values():
            server.until("ready")
        yield Both(request.param, servers)


def events(answer: tuple[int, bytes]) -> list[dict[str, Any]]:
    assert answer[0] == 200, answer
    assert answer[1].endswith(b"data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in answer[1].decode().split("\n\n") if line.startswith("data: {")]


def test_each_stands_behind_guard_gate_and_canary(both: Both) -> None:
    for name, server in both.servers.items():
        status = server.status()
        assert status["canary"]["state"] == "verified", name
        assert status["canary"]["max_difference"] < 1e-4
        assert status["engine"]["architecture"] == engines.of(name).REPORTED
        gate = json.loads((server.run_dir / "gate.json").read_text())
        let_in = {(row["method"], row["path"]) for row in gate["rows"] if tuple(row["answers"])[2] not in (404, 403)}
        assert let_in == set(SHORT_LIST), name
        assert server.ask("/v1/models", key="wrong")[0] == 401
        assert server.ask("/tokenize", {"model": "tiny", "prompt": "a"})[0] == 404
        assert server.json("/v1/models")["data"][0]["id"] == "tiny"


def test_log_probabilities_and_greedy_tokens_of_a_batch(both: Both, measured: Measured) -> None:
    """Six prompts of one request, of eight windows down to five tokens, each with 24 tokens of its answer."""
    body = GREEDY | {"prompt": BATCH, "max_tokens": 24, "logprobs": 0, "prompt_logprobs": 0, "return_token_ids": True}
    found = {name: json.loads(answer[1])["choices"] for name, answer in both.ask("/v1/completions", body).items()}
    worst = 0.0
    for ours, theirs, ids in zip(found[REFERENCE], found[VLLM], BATCH, strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        assert ours["text"] == theirs["text"]
        for place, token in enumerate(ids[1:], 1):
            a, b = (one["prompt_logprobs"][place][str(token)]["logprob"] for one in (ours, theirs))
            worst = max(worst, abs(a - b))
        pairs = zip(ours["logprobs"]["token_logprobs"], theirs["logprobs"]["token_logprobs"], strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    measured(f"{both.case}: {sum(map(len, BATCH))} places of prompts and 144 generated tokens, over HTTP", worst, LIMIT)
    # One after another, and streamed, they are the same as all at once.
    for name, server in both.servers.items():
        for ids, together in zip(BATCH[2:5], found[name][2:5], strict=True):
            pieces = events(server.ask("/v1/completions", body | {"prompt": ids, "stream": True, "prompt_logprobs": None}))
            assert "".join(one["choices"][0]["text"] for one in pieces) == together["text"]
            assert [token for one in pieces for token in one["choices"][0]["token_ids"]] == together["token_ids"]
            streamed = [value for one in pieces for value in one["choices"][0]["logprobs"]["token_logprobs"]]
            assert streamed == pytest.approx(together["logprobs"]["token_logprobs"], abs=LIMIT)
            assert pieces[-1]["choices"][0]["finish_reason"] == "length"


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/v1/completions", GREEDY | {"prompt": "Once upon a time", "max_tokens": 12, "logprobs": 3}),
    "echo": ("/v1/completions", GREEDY | {"prompt": "Once upon a time", "max_tokens": 4, "logprobs": 2, "echo": True}),
    "ids of tokens": (
        "/v1/completions",
        GREEDY | {"prompt": [1, 5, 6], "max_tokens": 3, "logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True},
    ),
    "these tokens": ("/v1/completions", GREEDY | {"prompt": [1, 5, 6], "max_tokens": 1, "logprobs": 0, "logprob_token_ids": [7, 9, 400]}),
    "prompt": ("/v1/completions", GREEDY | {"prompt": "A short one", "max_tokens": 2, "prompt_logprobs": 2}),
    "two prompts": ("/v1/completions", GREEDY | {"prompt": ["One", "Two and"], "max_tokens": 5}),
    "chat": ("/v1/chat/completions", CHAT | {"max_tokens": 9, "logprobs": True, "top_logprobs": 2}),
    "chat with a system and parts": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
                "max_completion_tokens": 5},
    ),
}  # fmt: skip
UNLIKE = {"id", "created", "system_fingerprint", "root", "service_tier"}


def lean(value: Any) -> Any:
    """Without names that differ from server to server, and without what is empty."""
    if isinstance(value, dict):
        kept = {name: lean(one) for name, one in value.items() if name not in UNLIKE}
        return {name: one for name, one in kept.items() if one not in (None, [], {})}
    return [lean(one) for one in value] if isinstance(value, list) else value


def same(a: Any, b: Any, at: str = "") -> float:
    """The largest difference of two numbers; fails where anything else differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), at
        return max((same(a[name], b[name], f"{at}.{name}") for name in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b), at
        return max((same(*pair, f"{at}[{each}]") for each, pair in enumerate(zip(a, b, strict=True))), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b)
    assert a == b, at
    return 0.0


@pytest.mark.parametrize("form", FORMS)
def test_answers_have_one_form(both: Both, form: str, measured: Measured) -> None:
    path, body = FORMS[form]
    whole = {name: lean(json.loads(answer[1])) for name, answer in both.ask(path, body).items()}
    assert set(whole[VLLM]) >= {"choices", "usage", "model", "object"}, whole[VLLM]
    measured(f"{both.case}: {form}", same(whole[REFERENCE], whole[VLLM]), LIMIT)
    if "prompt_logprobs" in body:
        return
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    streams = {name: events(answer) for name, answer in both.ask(path, asked).items()}
    for found in streams.values():
        assert found[-1]["usage"] == whole[VLLM]["usage"]
    texts = [
        ["".join((one.get("delta") or one).get("text" if "prompt" in body else "content") or "" for event in found
                 for one in event["choices"] if one["index"] == each) for each in range(4)]
        for found in streams.values()
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_an_answer_ends_at_a_stop_and_says_at_which(both: Both) -> None:
    body = GREEDY | {"prompt": "Once upon a time", "max_tokens": 12, "return_token_ids": True}
    [choice] = both.servers[VLLM].json("/v1/completions", body)["choices"]
    text, ids = choice["text"], choice["token_ids"]
    third = next(token for each, token in enumerate(ids) if each > 2 and token not in ids[:each])
    middle = len(text) // 2
    for stop in ({"stop": [text[middle : middle + 3]]}, {"stop": text[middle : middle + 3], "include_stop_str_in_output": True},
                 {"stop_token_ids": [third]}):  # fmt: skip
        found = [json.loads(answer[1])["choices"][0] for answer in both.ask("/v1/completions", body | stop).values()]
        for one in found:
            assert one["finish_reason"] == "stop", stop
        assert [one["text"] for one in found] == [found[0]["text"]] * 2, stop
        assert found[0]["stop_reason"] == found[1]["stop_reason"], stop
        for name, server in both.servers.items():
            pieces = events(server.ask("/v1/completions", body | stop | {"stream": True}))
            assert "".join(one["choices"][0]["text"] for one in pieces) == found[0]["text"], (name, stop)


def test_a_seed_gives_the_same_answer_again(both: Both) -> None:
    body = GREEDY | {"prompt": "Once", "max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    for server in both.servers.values():
        texts = [server.json("/v1/completions", body | changed)["choices"][0]["text"] for changed in ({}, {}, {"seed": 8})]
        assert texts[0] == texts[1] != texts[2]
        several = server.json("/v1/completions", body | {"n": 3})["choices"]
        assert len({one["text"] for one in several}) == 3
        assert [one["index"] for one in several] == [0, 1, 2]
        assert server.ask("/v1/completions", body | {"n": 2, "temperature": 0})[0] == 400
