"""Continuous batching: one thread that steps the reference's engine, and the requests that join and leave it between two steps."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from vllm_mistral.reference import Engine, Request

Finish = Literal["stop", "length"]


class Full(Exception):
    """So many requests wait that no more are taken."""


@dataclass(frozen=True)
class Wanted:
    """Which log-probabilities a request asks for: of how many of the likeliest tokens beside the one that stands there (None: of none at all), in
    the answer and in the prompt. `token_ids`: of these tokens, and not of the likeliest of the answer."""

    answer: int | None = None
    prompt: int | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Likely:
    """A token's log-probability at one place, and its rank among all tokens there, from 1."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class Piece:
    """What one step gave one request. An entry of log-probabilities has the token that stands there first."""

    prompt: tuple[tuple[Likely, ...], ...] = ()
    token_id: int | None = None
    logprobs: tuple[Likely, ...] = ()
    finish: Finish | None = None


@dataclass(eq=False)
class Asked:
    """A request on its way: `tell` is called by the batch's thread with each piece; whoever wants no more sets `gone`."""

    request: Request
    wanted: Wanted
    tell: Callable[[Piece], None]
    gone: bool = False
    rows: int = 0


def likely(rows: Tensor, tokens: Sequence[int], count: int, others: Sequence[int] = ()) -> list[tuple[Likely, ...]]:
    """For each row of log-probabilities [V]: those of its token, then of the `count` likeliest ones and of `others`, each once.

    >>> [[own, first]] = likely(torch.tensor([[-3.0, -0.1, -2.0]]), [2], 1)
    >>> (own.token_id, own.rank, first.token_id, first.rank)
    (2, 2, 1, 1)
    """
    own = torch.tensor(tokens, device=rows.device)[:, None]
    wanted = torch.tensor([list(others)] * len(rows), dtype=torch.long, device=rows.device)
    ids = torch.cat((own, rows.topk(count).indices, wanted), dim=1)
    values = rows.gather(1, ids)
    ranks = torch.stack([(rows >= column[:, None]).sum(1) for column in values.T], dim=1)
    return [
        tuple(
            {one[0]: Likely(*one) for one in reversed(list(zip(*entry, strict=True)))}[token] for token in dict.fromkeys(entry[0])
        )
        for entry in zip(ids.tolist(), values.tolist(), ranks.tolist(), strict=True)
    ]


class Batch(threading.Thread):
    """Runs until its process ends. A request waits until the most blocks that it may come to hold are free: one that runs always gets its next
    block, and is never put back. If a step fails the process ends, with the reason as its last words."""

    def __init__(self, engine: Engine, most_running: int, most_waiting: int) -> None:
        super().__init__(daemon=True, name="batch")
        self.engine, self.most_running, self.most_waiting = engine, most_running, most_waiting
        self.blocks = [cache.key.shape[1] for cache in engine.caches]
        self.running = list[Asked]()
        self.waiting = deque[Asked]()
        self.changed = threading.Condition()

    def ask(self, asked: Sequence[Asked]) -> None:
        """Take requests, all or none; Full, or BadInput for one that never fits."""
        with self.changed:
            if len(self.waiting) + len(asked) > self.most_waiting + max(0, self.most_running - len(self.running)):
                raise Full
            self.waiting.extend(asked)
            self.changed.notify()

    def run(self) -> None:
        try:
            while True:
                self.let_in()
                self.engine.step([asked.request for asked in self.running])
                with torch.inference_mode():
                    for asked in self.running:
                        tell(asked)
                self.running = [asked for asked in self.running if not asked.request.finished]
        except Exception:  # noqa: BLE001 whatever it is, nothing is served without this thread
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def let_in(self) -> None:
        """Between two steps: let go who wants no more, and let in who waits, in order; wait while there is nobody."""
        for asked in self.running:
            if asked.gone:
                self.engine.release(asked.request)
        self.running = [asked for asked in self.running if not asked.gone]
        with self.changed:
            while True:
                while self.waiting and (self.waiting[0].gone or self._fits(self.waiting[0])):
                    asked = self.waiting.popleft()
                    if not asked.gone:
                        self.engine.admit(asked.request)
                        self.running.append(asked)
                if self.running:
                    return
                self.changed.wait()

    def _fits(self, asked: Asked) -> bool:
        lengths = [one.request.max_length for one in (*self.running, asked)]
        held = [sum(blocks) for blocks in zip(*map(self.engine.blocks_held, lengths), strict=True)]
        return len(lengths) <= self.most_running and all(most <= blocks for most, blocks in zip(held, self.blocks, strict=True))


def tell(asked: Asked) -> None:
    """Tell a request what the last step gave it, unless that is nothing yet."""
    request, wanted = asked.request, asked.wanted
    prompt, answer = tuple[tuple[Likely, ...], ...](), tuple[Likely, ...]()
    generated = len(request.token_ids) == request.num_computed + 1
    if request.rows:
        rows, first = torch.cat(request.rows), request.first_row + asked.rows
        request.rows.clear()
        asked.rows += len(rows)
        ends = len(request.token_ids) - len(request.generated)
        inside = max(0, min(first + len(rows) + 1, ends) - first - 1)  # rows about tokens of the prompt
        if wanted.prompt is not None and inside:
            prompt = tuple(likely(rows[:inside], request.token_ids[first + 1 : first + 1 + inside], wanted.prompt))
        if wanted.answer is not None and generated:
            count = 0 if wanted.token_ids else wanted.answer
            [answer] = likely(rows[-1:], request.token_ids[-1:], count, wanted.token_ids)
    token = request.token_ids[-1] if generated and request.generated else None
    finish: Finish | None = None
    if request.finished:
        finish = "stop" if token is not None and token in request.sampling.stop_token_ids else "length"
    if prompt or token is not None or finish:
        asked.tell(Piece(prompt, token, answer, finish))
