"""The reference as a server, without a launcher: who joins and leaves its batch, what it refuses, and what its cache holds."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import mistral_tokenizer, prompts, write
from mistral_contract import architecture
from mistral_node import contract
from mistral_node.contract import Contract
from mistral_node.reference import server, tokens
from mistral_node.reference.batch import Asked, Batch, Full, Piece, Wanted
from nodes import variables
from starlette.requests import Request
from vllm_mistral.reference import BadInput, Engine, Mistral, Sampling, read_config

sys.path.append(str(Path(__file__).parents[2] / "deploy"))  # facts and pure arithmetic

from mistralctl import fit
from mistralctl.models import Shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write(tmp_path_factory.mktemp("weights") / "tiny", vocab_size=32000, hidden_size=64, max_position_embeddings=4096)
    return mistral_tokenizer(made, "tokenizer.model.v1")


@pytest.fixture
def batch(folder: Path) -> Iterator[Batch]:
    engine = Engine(Mistral.load(folder), max_num_batched_tokens=64)
    engine.make_caches([2 * blocks for blocks in engine.blocks_held(3000)])
    made = Batch(engine, most_running=2, most_waiting=1)
    made.start()
    yield made
    for asked in (*made.running, *made.waiting):
        asked.gone = True


class Reader:
    """A request and the pieces that came for it."""

    def __init__(self, batch: Batch, prompt: list[int], max_tokens: int, wanted: Wanted = Wanted()) -> None:  # noqa: B008
        self.pieces: queue.Queue[Piece] = queue.Queue()
        request = batch.engine.request(prompt, Sampling(max_tokens=max_tokens), 0, wanted.prompt is not None)
        self.asked = Asked(request, wanted, self.pieces.put)

    def next(self) -> Piece:
        return self.pieces.get(timeout=300)

    def tokens(self) -> list[int | None]:
        found = []
        while True:
            piece = self.next()
            found.append(piece.token_id)
            if piece.finish:
                return found


def test_requests_join_and_leave_between_steps(batch: Batch) -> None:
    long, short, waits = (
        Reader(batch, prompt, count) for prompt, count in zip(prompts([100, 20, 30]), (2000, 3, 2), strict=True)
    )
    batch.ask([long.asked])
    long.next()
    batch.ask([short.asked])
    assert len(short.tokens()) == 3
    batch.ask([waits.asked])
    assert len(waits.tokens()) == 2
    assert not long.asked.request.finished
    long.asked.gone = True
    last = Reader(batch, prompts([10])[0], 1)
    batch.ask([last.asked])
    last.tokens()
    assert not long.asked.request.finished  # it was let go, and its blocks are free
    assert [len(cache.pool) for cache in batch.engine.caches] == batch.blocks


def test_what_is_computed_together_is_what_is_computed_alone(batch: Batch, folder: Path) -> None:
    asked = prompts([90, 7])
    readers = [Reader(batch, prompt, 12) for prompt in asked]
    batch.ask([reader.asked for reader in readers])
    together = [reader.tokens() for reader in readers]
    alone = Engine(Mistral.load(folder)).generate(asked, Sampling(max_tokens=12))
    assert together == [one.token_ids for one in alone]


def test_the_queue_ends_somewhere(batch: Batch, folder: Path) -> None:
    readers = [Reader(batch, [1, 2, 3], 2000) for _ in range(4)]
    with pytest.raises(Full):
        batch.ask([reader.asked for reader in readers])
    assert not batch.waiting  # all or none
    batch.ask([reader.asked for reader in readers[:3]])
    wanted = contract.read(variables(Path("/none"), ENGINE="reference"))
    served = server.Served(wanted, batch, tokens.opened(folder, "mistral"), (2,), {})
    status, said = asked_over_http(served, {"prompt": "a", "n": 2, "max_tokens": 5})
    assert (status, said["error"]["param"]) == (429, "queue")
    for reader in readers:
        reader.asked.gone = True


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(batch: Batch, folder: Path, stream: bool) -> None:
    wanted = contract.read(variables(Path("/none"), ENGINE="reference"))
    served = server.Served(wanted, batch, tokens.opened(folder, "mistral"), (2,), {})
    body = {"prompt": "Once", "max_tokens": 2000, "temperature": 0, "ignore_eos": True, "stream": stream}
    sent = list[Any]()

    async def left() -> int:
        stays = asyncio.Event()
        asked = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive() -> Any:
            if (message := next(asked, None)) is not None:
                return message
            await stays.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 3:
                stays.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        if not stream:
            while_it_runs = asyncio.ensure_future(server.ask(served, server.Completion, Request(scope, receive)))
            while not batch.running:
                await asyncio.sleep(0.01)
            stays.set()
            return (await while_it_runs).status_code
        answer = await server.ask(served, server.Completion, Request(scope, receive))
        await answer(scope, receive, send)
        return answer.status_code

    assert asyncio.run(left()) == (200 if stream else 499)
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
    after = Reader(batch, [1, 2, 3], 1)
    batch.ask([after.asked])
    after.tokens()
    assert [len(cache.pool) for cache in batch.engine.caches] == batch.blocks  # nothing is held for who left


def test_a_loop_that_ends_while_a_request_runs_ends_no_server(batch: Batch, folder: Path) -> None:
    wanted = contract.read(variables(Path("/none"), ENGINE="reference"))
    served = server.Served(wanted, batch, tokens.opened(folder, "mistral"), (2,), {})

    async def begin() -> Asked:
        body = server.Completion(prompt="Once", max_tokens=2000, temperature=0, ignore_eos=True)
        [answer] = served.answers(body, asyncio.Queue())
        return answer.asked

    asked = asyncio.run(begin())  # as at the end of a server, whose last requests are cut off
    after = Reader(batch, [1, 2, 3], 1)
    batch.ask([after.asked])
    after.tokens()
    assert asked.gone
    assert batch.is_alive()


def asked_over_http(served: server.Served, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of the answer to a completion."""

    async def answered() -> tuple[int, Any]:
        sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        never: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def receive() -> Any:
            return sent.pop() if sent else await never

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        answer = await server.ask(served, server.Completion, Request(scope, receive))
        return answer.status_code, json.loads(bytes(answer.body))

    return asyncio.run(answered())


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (
            {"prompt": "a", "top_k": 5},
            400,
            "top_k is not served by the engine reference; leave it out, or serve with --engine vllm",
        ),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, 400, "response_format is not served"),
        ({"prompt": "a", "structured_outputs": {"regex": "a+"}}, 400, "structured_outputs is not served"),
        ({"prompt": "a", "tools": [{}]}, 400, "tools is not served"),
        ({"prompt": "a", "model": "another"}, 404, "The model `another` does not exist."),
        ({"prompt": [32000]}, 400, "must be one or more token ids below 32000"),
        ({"prompt": []}, 400, "must be one or more token ids"),
        ({"prompt": [5] * 3000}, 400, "this model's context is 3000 tokens, and the prompt has 3000"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": {}}, 400, "prompt: "),
        ({"prompt": "a", "logprobs": 0, "logprob_token_ids": [40000]}, 400, "token ids should be below 32000"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(
    batch: Batch, folder: Path, body: dict[str, Any], status: int, says: str
) -> None:
    wanted = contract.read(variables(Path("/none"), ENGINE="reference"))
    served = server.Served(wanted, batch, tokens.opened(folder, "mistral"), (2,), {})
    code, said = asked_over_http(served, body | ({} if "model" in body else {"model": "tiny"}))
    assert (code, says in said["error"]["message"]) == (status, True), said


def test_neutral_values_of_what_it_does_not_have_are_taken(batch: Batch, folder: Path) -> None:
    wanted = contract.read(variables(Path("/none"), ENGINE="reference"))
    served = server.Served(wanted, batch, tokens.opened(folder, "mistral"), (2,), {})
    neutral = {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "tools": [],
        "response_format": {"type": "text"},
        "user": "me",
    }
    code, said = asked_over_http(
        served, {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0, "ignore_eos": True} | neutral
    )
    assert (code, said["usage"]) == (200, {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4})


def sized(folder: Path, **changed: Any) -> tuple[Engine, Contract]:
    wanted = contract.read(variables(Path("/none"), ENGINE="reference", MAX_NUM_SEQS="4"))
    return Engine(Mistral(read_config(folder), {"model.norm.weight": torch.zeros(1)}), max_num_batched_tokens=1024), replace(
        wanted, **changed
    )


def test_the_cache_is_what_plan_says_that_it_is(folder: Path) -> None:
    engine, wanted = sized(folder)
    shape = Shape.of(architecture.read(json.loads((folder / "config.json").read_text())))
    serving = fit.Serving("float32", wanted.max_model_len, "cpu", requests=4, engine="reference")
    planned = fit.cache_bytes(shape, serving)
    [made] = server.blocks(engine, wanted, planned)
    assert made == 4 * engine.blocks_held(wanted.max_model_len)[0]
    one = fit.cache_bytes(shape, fit.Serving("float32", wanted.max_model_len, "cpu", engine="reference"))
    assert server.blocks(engine, wanted, one) == engine.blocks_held(wanted.max_model_len)
    with pytest.raises(BadInput, match=r"hold no request of 3000 tokens, which needs .* make --max-model-len smaller"):
        server.blocks(engine, wanted, one * 0.9)


def test_characters_of_several_tokens_come_whole() -> None:
    parts = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b" b"}
    text = tokens.Text(lambda ids: b"".join(parts[one] for one in ids).decode("utf-8", "replace"), [1])
    assert [text.add(one) for one in (1, 2, 3, 4)] == ["a", "", "é", " b"]
