"""Who gets how many tokens of a step: no long prompt keeps a short one waiting.

vLLM gives a step's tokens to the requests that run already, in their order, each up to `--long-prefill-token-threshold`, and the rest to those that
wait. So a few long prompts take every step whole, and what comes then waits until one of them has been read. Here every prompt that is being read
or waits for a place has an equal share of the step; what a short one leaves over goes to the others. A prompt that is alone has it all, as before.

On a CPU a step of 2,048 tokens takes a second, which a request that arrives in it waits. Steps are smaller there, and smaller still for a while
after requests ran beside each other, which costs throughput (docs/attacks.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

CPU_STEP, CPU_SHARED_STEP = 256, 64  # tokens of prompts; the second while requests run beside each other
SHARED_SECONDS = 5.0  # after the last time that they did


def share(tokens: int, needs: Iterable[int]) -> int:
    """The most that each may have of a step's `tokens`, so that together they take no more: at least 1.

    >>> share(100, [500]), share(100, [500, 500]), share(100, [10, 500, 500]), share(100, [10, 20])
    (100, 50, 45, 100)
    """
    ordered, free = sorted(needs), tokens
    for index, need in enumerate(ordered):
        left = len(ordered) - index
        if need * left > free:
            return max(1, free // left)
        free -= need
    return max(1, tokens)


class _Fair:
    """What both of vLLM's schedulers get."""

    max_num_scheduled_tokens: int

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._step: int = self.max_num_scheduled_tokens
        self._shared_until = 0.0

    def schedule(self: Any, *arguments: Any, **named: Any) -> Any:
        """One step, after the shares are set."""
        places = max(0, self.max_num_running_reqs - len(self.running))
        requests = [*self.running, *islice(self.waiting, places)]
        needs = [request.num_tokens - request.num_computed_tokens for request in requests]
        reading = [need for need in needs if need > 1]
        answering = len(needs) - len(reading)
        if current_platform.is_cpu():
            self.max_num_scheduled_tokens = self._tokens(len(requests), answering)
        if reading:
            self.scheduler_config.long_prefill_token_threshold = share(self.max_num_scheduled_tokens - answering, reading)
        return super().schedule(*arguments, **named)  # type: ignore[misc]

    def _tokens(self, requests: int, answering: int) -> int:
        """Of this step on a CPU."""
        now = time.monotonic()
        if requests > 1:
            self._shared_until = now + SHARED_SECONDS
        step = CPU_SHARED_STEP if now < self._shared_until else CPU_STEP
        return min(self._step, step + answering)


class FairScheduler(_Fair, Scheduler):  # type: ignore[misc]
    """vLLM's, with shares."""


class FairAsyncScheduler(_Fair, AsyncScheduler):  # type: ignore[misc]
    """The one that schedules a step while the one before is computed, with shares."""


def scheduler(vllm_config: Any, **given: Any) -> Scheduler:
    """The one that this configuration asks for; for `--scheduler-cls`."""
    fair = FairAsyncScheduler if vllm_config.scheduler_config.async_scheduling else FairScheduler
    return fair(vllm_config=vllm_config, **given)
