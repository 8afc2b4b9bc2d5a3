"""The OpenAI API in front of the reference: `python -m mistral_node.reference.server FOLDER` serves what the contract in its environment says.

Completions and chats, whole or streamed, in the form of vLLM's answers. A field that changes an answer and is not known here is refused by name.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from mistral_contract import envs, files, untrusted
from mistral_contract.envs import Serve
from mistral_contract.routes import CHAT, COMPLETIONS, HEALTH, MODELS
from mistral_node import engines
from mistral_node.front import Guard
from mistral_node.guard import error_body
from mistral_node.reference import tokens
from mistral_node.reference.batch import Asked, Batch, Full, Likely, Piece, Wanted
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from vllm_mistral import reference
from vllm_mistral.reference import DTYPES, BadInput, Sampling

GIB = 1 << 30
STEP_BYTES = 3 * GIB  # of a GPU: its context, the scores and the log-probabilities of one step (mistralctl's fit has the same)
LEAST_LOGPROB = -9999.0  # JSON has no infinity
MOST_LOGPROBS = 20
RETRY_SECONDS = 2
# Fields that ask for something only with another value than these; what no server reads is taken with any.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (-1,), "repetition_penalty": (1,), "length_penalty": (1,), "best_of": (1,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "add_generation_prompt": (True,), "parallel_tool_calls": (True,), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},), "truncation_side": ("left", "right"), "thinking_token_budget": (-1,), "mm_payload": ("tensors",),
    "include_reasoning": (True,), "return_mm_kwargs": (True,),
}  # fmt: skip
UNREAD = frozenset(
    "user store metadata service_tier prompt_cache_key prompt_cache_retention safety_identifier verbosity modalities request_id session_id "
    "cache_salt stream_interval".split()
)


class Wrong(Exception):
    """Why a request is not answered: status, a sentence, the field."""

    def __init__(self, status: int, message: str, param: str = "") -> None:
        super().__init__(message)
        self.status, self.param = status, param


class _Gone(Exception):
    """The client left."""


class StreamOptions(BaseModel):
    """What a stream says beside its text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Body(BaseModel):
    """What completions and chats have in common. A field that is null counts as not sent."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    logprob_token_ids: list[int] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False


class Completion(Body):
    """The body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool | None = True


class Chat(Body):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


@dataclass
class Delta:
    """What one piece adds to an answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[Likely, ...]] = field(default_factory=list)
    finish: str | None = None
    stop: int | str | None = None


class Answer:
    """One sequence of a request, while its pieces come. A text that may be the beginning of a stop is kept back until that is known."""

    def __init__(self, asked: Asked, body: Body, text: tokens.Text) -> None:
        self.asked, self.body, self._text = asked, body, text
        self.prompt = list(asked.request.token_ids)
        self.prompt_logprobs: list[tuple[Likely, ...] | None] = [None]
        self.count = 0
        self._all, self._sent, self.finish = "", 0, ""
        self._stops = [one for one in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if one]

    def take(self, piece: Piece) -> Delta:
        """Return what a piece adds."""
        self.prompt_logprobs += piece.prompt
        found = Delta(finish=piece.finish)
        if piece.token_id is not None:
            self.count += 1
            found.token_ids, found.logprobs = [piece.token_id], [piece.logprobs] if piece.logprobs else []
            ended = piece.finish == "stop"
            if ended and piece.token_id in (self.body.stop_token_ids or ()):
                found.stop = piece.token_id
            before = len(self._all)
            self._all += "" if ended else self._text.add(piece.token_id)
            self._stop(found, before)
        held = 0 if found.finish else max((len(stop) - 1 for stop in self._stops), default=0)
        end = max(self._sent, len(self._all) - held)
        found.text, self._sent = self._all[self._sent : end], end
        self.finish = found.finish or ""
        self.asked.gone = bool(found.finish)
        return found

    def _stop(self, found: Delta, before: int) -> None:
        """End the answer at the first stop that its newest text completes."""
        places = [(self._all.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stops]
        at, stop = min(((at, stop) for at, stop in places if at >= 0), default=(-1, ""))
        if at >= 0:
            self._all = self._all[: at + (len(stop) if self.body.include_stop_str_in_output else 0)]
            found.finish, found.stop = "stop", stop


Queue = asyncio.Queue[tuple[Answer, Piece] | None]  # None: the client left
Pieces = AsyncIterator[tuple[Answer, Delta]]


@dataclass(frozen=True)
class Served:
    """The model as this process serves it: `ends` are the tokens that end an answer, `defaults` the sampling of generation_config.json."""

    contract: Serve
    batch: Batch
    tokens: tokens.Tokens
    ends: tuple[int, ...]
    defaults: dict[str, float]

    # --- from a body to sequences

    def check(self, body: Body) -> None:
        """Wrong if the body names another model, or asks for what is not had here."""
        if body.model not in (None, "", self.contract.served_name):
            raise Wrong(404, f"The model `{body.model}` does not exist.", "model")
        for name, value in (body.model_extra or {}).items():
            if name not in UNREAD and value not in (None, False, 0, "", [], {}) and value not in NEUTRAL.get(name, ()):
                raise Wrong(400, f"{name} is not served by the engine reference; leave it out, or serve with --engine vllm", name)

    def sampling(self, body: Body, each: int, most: int) -> Sampling:
        """Return how one of several answers to a prompt is drawn, of at most so many tokens."""
        temperature = self.defaults.get("temperature", 1.0) if body.temperature is None else body.temperature
        if each and not temperature:
            raise Wrong(400, f"n must be 1 when using greedy sampling, got {body.n}", "n")
        top_p = self.defaults.get("top_p", 1.0) if body.top_p is None else body.top_p
        seed = secrets.randbits(62) if body.seed is None else body.seed + each
        stops = (*(() if body.ignore_eos else self.ends), *(body.stop_token_ids or ()))
        return Sampling(most, temperature, top_p, seed, stops)

    def prompts(self, body: Body) -> list[list[int]]:
        """Return the tokens of each prompt of a body."""
        if isinstance(body, Chat):
            return [self.tokens.chat([_plain(message) for message in body.messages])]
        assert isinstance(body, Completion)  # noqa: S101
        given: Any = body.prompt
        if given == []:
            raise BadInput("must be one or more token ids")
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        special = body.add_special_tokens is not False
        return [self.tokens.encode(one, special) if isinstance(one, str) else list(one) for one in given]

    def answers(self, body: Body, tell: Queue) -> list[Answer]:
        """Return an answer to come for each sequence that a body asks for, whose pieces go to `tell`."""
        loop, found = asyncio.get_running_loop(), list[Answer]()
        vocabulary = self.batch.engine.model.config.vocab_size
        chat, count = isinstance(body, Chat), body.n or 1
        if isinstance(body, Chat):
            most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
            answer = (body.top_logprobs or 0) if body.logprobs else None
        else:
            assert isinstance(body, Completion)  # noqa: S101
            most, answer = 16 if body.max_tokens is None else body.max_tokens, body.logprobs
        echoed = answer if not chat and isinstance(body, Completion) and body.echo else None
        ids = tuple(dict.fromkeys(body.logprob_token_ids or ()))
        if not all(0 <= one < vocabulary for one in (*ids, *(body.stop_token_ids or ()))):
            raise Wrong(400, f"token ids should be below {vocabulary}", "logprob_token_ids" if ids else "stop_token_ids")
        wanted = Wanted(answer, body.prompt_logprobs if echoed is None else max(echoed, body.prompt_logprobs or 0), ids)
        for prompt in self.prompts(body):
            room = self.contract.max_model_len - len(prompt)
            if room < (0 if most == 0 else 1):
                longest = f"this model's context is {self.contract.max_model_len} tokens"
                raise Wrong(400, f"{longest}, and the prompt has {len(prompt)} beside its answer; make it shorter", "prompt")
            for each in range(count):
                sampling = self.sampling(body, each, room if most is None else min(room, most))
                first = 0 if wanted.prompt is not None else max(0, len(prompt) - 1)
                rows = wanted.prompt is not None or wanted.answer is not None
                asked = Asked(self.batch.engine.request(prompt, sampling, first, rows), wanted, lambda piece: None)
                made = Answer(asked, body, tokens.Text(self.tokens.decode, prompt))

                def told(piece: Piece, made: Answer = made) -> None:
                    try:
                        loop.call_soon_threadsafe(tell.put_nowait, (made, piece))
                    except RuntimeError:  # the loop has ended, as at the end of the server, and nobody waits any more
                        made.asked.gone = True

                asked.tell = told
                found.append(made)
        self.batch.ask([one.asked for one in found])
        return found

    # --- from pieces to what is sent

    def token(self, body: Body, token_id: int) -> str:
        """Return a token as log-probabilities name it."""
        return f"token_id:{token_id}" if body.return_tokens_as_token_ids else self.tokens.name(token_id)

    def likely(self, entry: Sequence[Likely] | None) -> dict[str, Any] | None:
        """Return an entry of `prompt_logprobs`."""
        if entry is None:
            return None
        return {
            str(one.token_id): {"logprob": _finite(one), "rank": one.rank, "decoded_token": self.tokens.name(one.token_id)}
            for one in entry
        }

    def completion_logprobs(
        self, body: Completion, entries: Sequence[Any], ids: Sequence[int], offset: int = 0
    ) -> dict[str, Any]:
        """Return `logprobs` of a completion: of each token, and of the likeliest ones that stand there, its own first."""
        names = [self.token(body, token_id) for token_id in ids]
        offsets = [offset + sum(map(len, names[:each])) for each in range(len(names))]
        most = None if body.logprob_token_ids else (body.logprobs or 0) + 1
        return {
            "text_offset": offsets,
            "token_logprobs": [entry and _finite(entry[0]) for entry in entries],
            "tokens": names,
            "top_logprobs": [
                entry and {self.token(body, one.token_id): _finite(one) for one in entry[:most]} for entry in entries
            ],
        }

    def chat_logprobs(self, body: Chat, entries: Sequence[tuple[Likely, ...]]) -> dict[str, Any]:
        """Return `logprobs` of a chat."""

        def named(one: Likely) -> dict[str, Any]:
            name = self.token(body, one.token_id)
            return {"token": name, "logprob": _finite(one), "bytes": list(name.encode("utf-8", "replace"))}

        def top(entry: tuple[Likely, ...]) -> list[Likely]:
            likeliest = [one for one in entry if one.rank <= (body.top_logprobs or 0)]
            return (
                list(entry) if body.logprob_token_ids else sorted(likeliest, key=lambda one: one.rank)[: body.top_logprobs or 0]
            )

        return {"content": [named(entry[0]) | {"top_logprobs": [named(one) for one in top(entry)]} for entry in entries]}

    def choice(self, body: Body, answer: Answer, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the one choice of an answer that came as these."""
        text, ids = "".join(one.text for one in deltas), [one for delta in deltas for one in delta.token_ids]
        entries: list[Any] = [entry for delta in deltas for entry in delta.logprobs]
        found: dict[str, Any] = {"finish_reason": deltas[-1].finish, "stop_reason": deltas[-1].stop}
        if body.return_token_ids:
            found["token_ids"] = ids
        if isinstance(body, Chat):
            message = {"role": "assistant", "content": text}
            return found | {"message": message, "logprobs": self.chat_logprobs(body, entries) if body.logprobs else None}
        assert isinstance(body, Completion)  # noqa: S101
        if body.echo:
            text, ids = self.echoed(body, answer) + text, answer.prompt + ids
            entries = [*answer.prompt_logprobs, *entries]
        if body.return_token_ids:
            found["prompt_token_ids"] = answer.prompt
        logprobs = None if body.logprobs is None else self.completion_logprobs(body, entries, ids[: len(entries)])
        of_prompt = None if answer.asked.wanted.prompt is None else [self.likely(one) for one in answer.prompt_logprobs]
        return found | {"text": text, "logprobs": logprobs, "prompt_logprobs": of_prompt}

    def echoed(self, body: Completion, answer: Answer) -> str:
        """Return the text of a prompt: as it came, or of its tokens."""
        if body.return_token_ids:
            return ""
        return body.prompt if isinstance(body.prompt, str) else self.tokens.decode(answer.prompt)

    # --- the two ways of an answer

    async def pieces(self, answers: list[Answer], queue: Queue, gone: asyncio.Future[Any]) -> AsyncIterator[tuple[Answer, Delta]]:
        """Each piece of each answer as it comes; _Gone when the client left, after which nothing more is computed for it."""
        gone.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while not all(answer.finish for answer in answers):
                if (told := await queue.get()) is None:
                    raise _Gone
                answer, piece = told
                if not answer.finish:
                    yield answer, answer.take(piece)
        finally:
            gone.cancel()
            for answer in answers:
                answer.asked.gone = True

    async def whole(self, body: Body, answers: list[Answer], pieces: Pieces) -> dict[str, Any]:
        """Return an answer when it is there."""
        deltas: dict[Answer, list[Delta]] = {answer: [] for answer in answers}
        async for answer, delta in pieces:
            deltas[answer].append(delta)
        choices = [{"index": each} | self.choice(body, one, deltas[one]) for each, one in enumerate(answers)]
        said: dict[str, Any] = {"choices": choices, "usage": usage(answers, body.n or 1)}
        if isinstance(body, Chat):
            if body.return_token_ids:
                said["prompt_token_ids"] = answers[0].prompt
            if answers[0].asked.wanted.prompt is not None:
                said["prompt_logprobs"] = [self.likely(one) for one in answers[0].prompt_logprobs]
        return said

    async def streamed(self, body: Body, answers: list[Answer], pieces: Pieces, head: dict[str, Any]) -> AsyncIterator[bytes]:
        """Return the events of a stream."""
        options, offsets, begun = body.stream_options or StreamOptions(), dict[Answer, int](), set[Answer]()
        async for answer, delta in pieces:
            if not delta.token_ids and not delta.finish:
                continue  # a part of a prompt
            if isinstance(body, Chat):
                if answer not in begun:
                    delta_message: dict[str, Any] = {"role": "assistant", "content": ""}
                    yield event(
                        head | {"choices": [{"index": answers.index(answer), "delta": delta_message, "finish_reason": None}]}
                    )
                choice: dict[str, Any] = {"delta": {"content": delta.text}}
                choice["logprobs"] = self.chat_logprobs(body, delta.logprobs) if body.logprobs else None
            else:
                assert isinstance(body, Completion)  # noqa: S101
                text, ids, entries = delta.text, delta.token_ids, list[Any](delta.logprobs)
                choice = {}
                if answer not in begun:
                    if body.return_token_ids:
                        choice["prompt_token_ids"] = answer.prompt
                    if body.echo:
                        text, ids = self.echoed(body, answer) + text, answer.prompt + ids
                        entries = [*answer.prompt_logprobs, *entries]
                choice |= {"text": text, "logprobs": None}
                if body.logprobs is not None:
                    offset = offsets.get(answer, 0)
                    choice["logprobs"] = made = self.completion_logprobs(body, entries, ids[: len(entries)], offset)
                    offsets[answer] = offset + sum(map(len, made["tokens"]))
            begun.add(answer)
            choice |= {"index": answers.index(answer), "finish_reason": delta.finish, "stop_reason": delta.stop}
            if body.return_token_ids:
                choice["token_ids"] = delta.token_ids
            said: dict[str, Any] = {"choices": [choice]}
            if options.continuous_usage_stats and options.include_usage:
                said["usage"] = usage([answer], 1)
            yield event(head | said)
        if options.include_usage:
            yield event(head | {"choices": [], "usage": usage(answers, body.n or 1)})
        yield b"data: [DONE]\n\n"


class Events(Response):
    """A stream of events, each sent by itself; it ends without an end when the client left."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(media_type="text/event-stream")
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        try:
            async for one in self.events:
                await send({"type": "http.response.body", "body": one, "more_body": True})
        except _Gone:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _finite(one: Likely) -> float:
    return max(one.logprob, LEAST_LOGPROB)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts of text are one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [part if isinstance(part, str) else str(part.get("text", "")) for part in content]
    return message | {"content": "\n".join(parts)}


def event(said: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def usage(answers: Sequence[Answer], n: int) -> dict[str, int]:
    """The tokens of a request; `n` answers share a prompt."""
    prompt, answered = sum(len(one.prompt) for one in answers[::n]), sum(one.count for one in answers)
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


async def ask(served: Served, kind: type[Completion] | type[Chat], request: Request) -> Response:
    """Answer a request, or say why not."""
    try:
        try:
            body = kind.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            name = ".".join(str(part) for part in first["loc"][:1])
            raise Wrong(400, f"{name or 'the body'}: {first['msg']}", name) from None
        served.check(body)
        prefix, form = ("chatcmpl", "chat.completion") if kind is Chat else ("cmpl", "text_completion")
        form += ".chunk" if kind is Chat and body.stream else ""
        name = f"{prefix}-{request.headers.get('x-request-id') or secrets.token_hex(16)}"
        head = {"id": name, "object": form, "created": int(time.time()), "model": served.contract.served_name}
        queue: Queue = asyncio.Queue()
        answers = served.answers(body, queue)  # in the batch's queue, or refused
        pieces = served.pieces(answers, queue, asyncio.ensure_future(request.receive()))
        if body.stream:
            return Events(served.streamed(body, answers, pieces, head))
        return _json(head | await served.whole(body, answers, pieces))
    except Wrong as error:
        return _refused(error.status, str(error), error.param)
    except BadInput as error:
        return _refused(400, str(error), "prompt")
    except Full:
        return _refused(429, "too many requests wait already; try again later", "queue")
    except _Gone:
        return Response(status_code=499)


def _json(said: dict[str, Any]) -> Response:
    """An answer, with what is no number where the engine computed that: the launcher's check judges it."""
    return Response(json.dumps(said, ensure_ascii=False), media_type="application/json")


def _refused(status: int, message: str, param: str = "") -> Response:
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 429 else {}
    return Response(error_body(status, message, param), status, headers, "application/json")


def application(served: Served) -> Starlette:
    """The ASGI application, with the guard outermost."""
    created, contract = int(time.time()), served.contract

    async def health(request: Request) -> Response:
        return Response(status_code=200 if served.batch.is_alive() else 503)

    async def models(request: Request) -> Response:
        model = {
            "id": contract.served_name, "object": "model", "created": created, "owned_by": "mistralctl", "root": contract.served_name,
            "parent": None, "max_model_len": contract.max_model_len,
        }  # fmt: skip
        return _json({"object": "list", "data": [model]})

    async def completions(request: Request) -> Response:
        return await ask(served, Completion, request)

    async def chats(request: Request) -> Response:
        return await ask(served, Chat, request)

    routes = ((HEALTH, health), (MODELS, models), (COMPLETIONS, completions), (CHAT, chats))
    return Starlette(
        routes=[Route(path, endpoint, methods=[method]) for (method, path), endpoint in routes], middleware=[Middleware(Guard)]
    )


def blocks(engine: reference.Engine, contract: Serve, budget: float) -> list[int]:
    """Return the blocks of each cache: as many requests of full length as the bytes hold, and no more than may run; BadInput if not one."""
    config, held = engine.model.config, engine.blocks_held(contract.max_model_len)
    token = 2 * config.num_key_value_heads * config.head_dim * torch.empty((), dtype=engine.model.dtype).element_size()
    layers = [config.windows.count(window) for window in engine.model.cache_windows]
    whole = sum(each * count for each, count in zip(held, layers, strict=True)) * engine.block_size * token
    share = min(contract.max_num_seqs, budget / whole)
    if share < 1:
        raise BadInput(
            f"{budget / GIB:.2f} GiB of cache hold no request of {contract.max_model_len} tokens, which needs {whole / GIB:.2f}; "
            "make --max-model-len smaller"
        )
    return [int(share * each) for each in held]


def budget(contract: Serve) -> float:
    """The bytes that the cache may take: on a GPU what the weights have left of its share."""
    if contract.device == "cpu":
        return (contract.kv_cache_gib or 1) * GIB
    total = torch.cuda.get_device_properties(0).total_memory * (contract.memory_utilization or 0.9)
    return float(total - torch.cuda.memory_allocated() - STEP_BYTES)


def load(contract: Serve, folder: Path) -> Served:
    """Read weights and tokenizer, make the cache and start the batch; BadInput with what is wrong."""
    config = reference.read_config(folder)
    dtype = DTYPES["bfloat16" if contract.dtype == "auto" else contract.dtype]
    known = tokens.opened(folder, contract.tokenizer_mode)
    model = reference.Mistral.load(folder, contract.device, dtype)
    engine = reference.Engine(model, max_num_batched_tokens=contract.max_batched_tokens)
    engine.make_caches(blocks(engine, contract, budget(contract)))
    try:
        generation = untrusted.read_file(folder / "generation_config.json")
    except FileNotFoundError:
        generation = {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / 'generation_config.json'}: cannot be read ({error})") from error
    also = generation.get("eos_token_id")
    ends = tuple(dict.fromkeys([*known.ends, *(also if isinstance(also, list) else [] if also is None else [also])]))
    defaults = {name: float(generation[name]) for name in ("temperature", "top_p") if untrusted.finite(generation.get(name))}
    batch = Batch(engine, contract.max_num_seqs, 2 * contract.max_num_seqs + 8)
    batch.start()
    return Served(contract, batch, known, ends or config.eos_token_ids, defaults)


def report(served: Served, run_dir: Path) -> None:
    """Write what the engine is where the launcher reads it."""
    engine, contract = served.batch.engine, served.contract
    config, model = engine.model.config, engine.model
    held = engine.blocks_held(contract.max_model_len)
    facts = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}", "architecture": engines.of("reference").REPORTED,
        "sliding_window": config.sliding_window, "windows": sorted(set(config.windows), key=lambda window: window or 0),
        "kv_cache_spec": "paged, rolling" if config.sliding_window else "paged", "block_size": engine.block_size,
        "attention_backend": "reference", "num_blocks": sum(served.batch.blocks), "blocks_per_request": sum(held),
        "max_concurrency": round(min(have / need for have, need in zip(served.batch.blocks, held, strict=True)), 2),
        "max_model_len": contract.max_model_len, "dtype": str(model.dtype).removeprefix("torch."), "vocabulary": config.vocab_size,
        "device": torch.cuda.get_device_name() if contract.device == "cuda" else "a CPU", "program": "vllm_mistral.reference",
        "torch": torch.__version__,
    }  # fmt: skip
    file = run_dir / files.ENGINE.name
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(facts), "utf-8")
    temporary.replace(file)


def main(folder: str) -> int:
    """Serve until a signal."""
    contract = envs.read(Serve, os.environ)
    try:
        served = load(contract, Path(folder))
    except BadInput as error:
        sys.stderr.write(f"BadInput: {error}\n")
        return 2
    report(served, Path(os.environ[envs.RUN_DIR]))
    uvicorn.run(
        application(served), host=contract.host, port=contract.port, log_level="warning", timeout_keep_alive=5,
        timeout_graceful_shutdown=engines.DRAIN_SECONDS,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
