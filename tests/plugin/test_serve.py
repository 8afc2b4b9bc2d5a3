"""The launcher with a real vLLM: what it says, what it serves, how it ends."""

from __future__ import annotations

import http.client
import json
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import consolidated, mistral_tokenizer, write
from mistral_contract import files, keys, sets
from mistral_node import serve
from mistral_node.traffic import Traffic
from nodes import KEY, Launcher, known, launched
from test_model import adapter_of
from vllm_mistral import reference

TINY = {"vocab_size": 32000, "hidden_size": 64, "sliding_window": 128, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node with weights, the tokenizer of v0.1, and figures for the canary."""
    node_dir = tmp_path_factory.mktemp("node")
    folder = mistral_tokenizer(write(node_dir / "weights" / "tiny", **TINY), "tokenizer.model.v1")
    assert reference.main([str(folder), "--canary"]) == 0
    return node_dir


@pytest.fixture(scope="module")
def served(weights: Path) -> Iterator[Launcher]:
    with launched(weights) as launcher:
        launcher.until("ready")
        yield launcher


def test_ready_says_what_runs(served: Launcher) -> None:
    status = served.status()
    assert served.phases() == [("engine", "start"), ("engine", "end"), ("check", "start"), ("check", "end"),
                                ("gate", "start"), ("gate", "end"), ("ready", "end")]  # fmt: skip
    assert [phase["phase"] for phase in status["phases"]] == ["engine", "check", "gate"]
    engine = status["engine"]
    assert engine["class"] == "vllm_mistral.model.MistralSWAForCausalLM"
    assert (engine["architecture"], engine["sliding_window"]) == ("MistralSWAForCausalLM", 128)
    assert (engine["kv_cache_spec"], engine["attention_backend"], engine["vllm"]) == ("SlidingWindowSpec", "CPU_ATTN", "0.32.0")
    assert engine["num_blocks"] > 0
    assert engine["block_size"] > 0
    assert engine["max_concurrency"] > 1
    titles = [process.name() for process in psutil.Process(served.process.pid).children(recursive=True)]
    assert any(title.startswith("VLLM::Engine") for title in titles), titles
    assert not [title for title in titles if "Worker" in title]  # the model runs in the engine's process
    assert status["canary"]["state"] == "verified"
    assert status["canary"]["max_difference"] < 1e-4


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_keys_come_and_go_while_it_serves_and_have_limits(served: Launcher) -> None:
    other, file = "mctl-" + "fedcba9876543210" * 3, served.run_dir / "keys" / "keys.json"
    body = {"model": "tiny", "prompt": "a", "max_tokens": 5, "ignore_eos": True}

    def let_in() -> bool:
        return served.ask("/v1/models", key=other)[0] == 200

    def soon(wanted: bool) -> None:
        began = time.monotonic()
        while let_in() is not wanted:
            assert time.monotonic() - began < 60  # a second on a machine that is not busy: test_keys.py
            time.sleep(0.02)

    before, others = served.status()["pid"], keys.make(other, "other", 1.0, tokens_per_minute=20)
    assert not let_in()
    keys.write(file, known().changed([*known().keys, others]))
    soon(True)
    answers = []
    while (found := served.ask("/v1/completions", body, key=other))[0] == 200:
        answers.append(json.loads(found[1])["usage"]["total_tokens"])
    assert found[0] == 429
    assert json.loads(found[1])["error"]["param"] == "tokens_per_minute"
    assert sum(answers[:-1]) < 20 <= sum(answers)
    counted = served.usage()["keys"]
    assert {name: counted[others.id][name] for name in ("requests", "tokens", "refused")} == {
        "requests": len(answers), "tokens": sum(answers), "refused": 1,
    }  # fmt: skip
    keys.write(file, known(serial=1 << 31))
    soon(False)
    assert served.ask("/v1/models")[0] == 200
    assert served.status()["pid"] == before
    assert served.process.poll() is None


def test_tokens_of_a_stream_are_counted_whether_its_client_asks_for_them_or_not(served: Launcher) -> None:
    """And it gets what vLLM says without being asked for them."""

    def counted() -> int:
        found = served.usage()["keys"]
        return int(found.get(known().keys[0].id, {"tokens": 0})["tokens"])

    def events(stream: bytes) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in stream.decode().split("\n\n") if line.startswith("data: {")]

    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Why?"}],
        "max_tokens": 40,
        "ignore_eos": True,
        "stream": True,
    }
    completion = {
        "model": "tiny",
        "prompt": "Once",
        "max_tokens": 40,
        "ignore_eos": True,
        "stream": True,
        "n": 2,
        "stream_interval": 8,
    }
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        before = counted()
        asked = events(served.ask(path, body | {"stream_options": {"include_usage": True}})[1])
        total = asked[-1]["usage"]["total_tokens"]
        assert counted() - before == total
        for unasked in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
            before, answer = counted(), served.ask(path, body | unasked)[1]
            assert counted() - before == total
            assert b"usage" not in answer
            assert answer.endswith(b"data: [DONE]\n\n")
            found = events(answer)
            assert set(asked[0]) - {"usage"} == set(found[0])
            assert all(one["choices"] for one in found)


def routes(launcher: Launcher) -> list[tuple[str, str]]:
    """Every route of the running app with each of its methods, as the app itself lists them in the log."""
    found = re.findall(r"Route: (\S+), Methods: (.+)$", launcher.log.read_text(), re.MULTILINE)
    return [(method.strip(), path) for path, methods in found for method in methods.split(",")]


def test_every_route_of_the_app_is_closed_but_the_short_list(served: Launcher) -> None:
    walked = routes(served)
    assert len({path for _, path in walked}) > 20

    def walk(method: str, path: str) -> tuple[int, ...]:
        body = {} if method == "POST" else None
        return tuple(served.ask(path, body, key=key, method=method)[0] for key in (None, "sk-wrong", KEY))

    answers = {route: walk(*route) for route in walked}
    let_in = {route: codes for route, codes in answers.items() if not set(codes) <= {401, 404}}
    assert let_in == {
        ("GET", "/health"): (200, 200, 200),
        ("GET", "/v1/models"): (401, 401, 200),
        ("POST", "/v1/completions"): (401, 401, 400),  # let in, and refused by vLLM for its empty body
        ("POST", "/v1/chat/completions"): (401, 401, 400),
    }
    assert served.ask("/health", key=None)[1] == b""


def stream(served: Launcher, tokens: int) -> Iterator[str]:
    """The pieces of a streamed completion, as they come."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=300)
    body = {"model": "tiny", "prompt": "Once", "max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200
    for line in response:
        if line.startswith(b"data: "):
            yield line.decode().strip().removeprefix("data: ")


def test_requests_are_counted_and_refusals_are_not(served: Launcher) -> None:
    traffic = Traffic(served.run_dir / "shared")
    until(lambda: not traffic.read().running and served.status()["requests"]["served"] == traffic.read().served)
    before = traffic.read().served
    served.json("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})
    assert served.ask("/v1/completions", {"model": "tiny", "prompt": "a"}, key="sk-wrong")[0] == 401
    assert served.ask("/health", key=None)[0] == 200
    served.json("/v1/models")
    until(lambda: served.status()["requests"]["served"] != before)
    time.sleep(0.7)
    assert served.status()["requests"]["served"] == before + 1


def test_it_serves_on_while_no_file_can_grow(served: Launcher) -> None:
    """As on a full disk: launcher, ward and vLLM can write neither log nor status nor counts."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    running = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
    before = served.status()["requests"]["served"]
    for process in running:
        process.rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        for _ in range(3):
            served.json("/v1/completions", body)
            assert served.ask("/v1/models", key="wrong")[0] == 401
            time.sleep(0.7)
        assert served.status()["requests"]["served"] == before
        assert all(process.is_running() for process in running)
    finally:
        for process in running:
            process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(lambda: served.status()["requests"]["served"] == before + 3)
    until(lambda: json.loads((served.run_dir / "shared" / "usage.json").read_text())["refused"]["401"] >= 3)


def test_a_stream_in_flight_ends_well_and_new_requests_are_refused(served: Launcher) -> None:
    """The last test of this server."""
    pieces: list[str] = []
    begun = threading.Event()

    def read() -> None:
        for piece in stream(served, 900):
            pieces.append(piece)
            if len(pieces) > 3:
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(300)
    served.process.send_signal(signal.SIGTERM)
    served.until_draining()
    refused: Any = served.ask("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})
    assert reader.is_alive(), "the stream was too short for this test"
    assert refused[0] == 503
    assert served.status()["state"] == "draining"
    reader.join(300)
    assert pieces[-1] == "[DONE]"
    assert json.loads(pieces[-2])["choices"][0]["finish_reason"] == "length"
    assert served.wait() == 0
    assert served.status()["state"] == "stopped"
    assert served.status()["requests"]["running"] == 0
    assert not [child for child in served.children if child.is_running() and child.status() != "zombie"]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Weights in Mistral's own format with v0.3's tokenizer, an adapter, bfloat16, no window."""
    node_dir = tmp_path_factory.mktemp("second")
    source = write(node_dir / "source", vocab_size=32768, hidden_size=64, sliding_window=None, max_position_embeddings=4096)
    (node_dir / "weights").mkdir()
    mistral_tokenizer(consolidated(source, node_dir / "weights" / "tiny"), "mistral_instruct_tokenizer_240323.model.v3")
    adapter_of(source, node_dir / "run" / "test" / "lora" / "sql", ["q_proj", "v_proj"])
    weights = node_dir / "weights" / "tiny"
    (weights / files.MANIFEST.name).write_text(json.dumps(sets.describe(weights, files.MANIFEST.name)))
    changed = {"SLIDING_WINDOW": "", "DTYPE": "bfloat16", "LORA": '{"sql": "file:///sql"}', "TOOL_PARSER": "mistral"}
    with launched(node_dir, **changed) as launcher:
        launcher.until("ready")
        yield launcher


def test_consolidated_weights_with_an_adapter(second: Launcher) -> None:
    status = second.status()
    assert (status["engine"]["sliding_window"], status["engine"]["kv_cache_spec"]) == (None, "FullAttentionSpec")
    assert status["engine"]["dtype"] == "bfloat16"
    made = json.loads((second.run_dir.parents[1] / "canaries" / f"{status['canary']['weights']}.json").read_text())
    assert status["canary"] == {
        "state": "made here", "max_difference": None, "tolerance": None, "against": made["source"], "weights": made["weights"],
    }  # fmt: skip
    assert (len(made["prompt_token_ids"]), made["dtype"], made["model"]) == (320, "bfloat16", "tiny")
    assert (status["engine"]["device"], status["engine"]["vocabulary"]) == ("a CPU", 32768)
    assert status["adapters"]["sql"]["state"] == "answers"
    assert status["adapters"]["sql"]["max_difference"] > 0.001
    assert [model["id"] for model in second.json("/v1/models")["data"]] == ["tiny", "sql"]
    body = {"prompt": [1, 5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    texts = [second.json("/v1/completions", body | {"model": name})["choices"][0] for name in ("tiny", "sql")]
    assert texts[0]["logprobs"]["token_logprobs"] != texts[1]["logprobs"]["token_logprobs"]


def test_a_second_signal_ends_it_at_once_and_leaves_nothing(second: Launcher) -> None:
    """The last test of this server."""
    pieces: list[str] = []

    def read() -> None:
        with suppress(OSError, http.client.HTTPException):
            for piece in stream(second, 2900):
                pieces.append(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    until(lambda: pieces)
    second.process.send_signal(signal.SIGTERM)
    second.until_draining()
    time.sleep(2 * serve.SAME_SECONDS)
    assert second.status()["state"] == "draining"
    second.process.send_signal(signal.SIGTERM)
    assert second.wait(300) == 0
    reader.join(300)
    assert pieces[-1:] != ["[DONE]"]
    assert not psutil.wait_procs(second.children, timeout=300)[1]
