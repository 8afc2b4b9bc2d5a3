"""Long prompts that are read leave every other request its share of each step, and all of them the same answers."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mistral_node.scheduler as fair
import pytest
from checkpoints import difference_behind, hugging_face, prompts, write
from engines import engine, generated, run, scheduler
from vllm import SamplingParams

LIMIT = 5e-5
Measured = Callable[[str, float, float], None]
FAIR = "mistral_node.scheduler.scheduler"
STEP = 64


def test_examples() -> None:
    assert doctest.testmod(fair) == (0, 1)


def asked(llm: Any, ids: list[int], numbers: count[int]) -> str:
    name = str(next(numbers))
    wanted = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, wanted)
    return name


def read_in_first_step(llm: Any, long: int) -> list[int]:
    """Tokens of each prompt that one step reads, when a short one of 6 comes while `long` others are read."""
    numbers, given = count(), prompts([400 + number for number in range(long)])
    for ids in given:
        asked(llm, ids, numbers)
    for _ in range(2):
        llm.llm_engine.step()
    before = {one.request_id: one.num_computed_tokens for one in scheduler(llm).running}
    asked(llm, [7, 8, 9, 10, 11, 12], numbers)
    llm.llm_engine.step()
    return [one.num_computed_tokens - before.get(one.request_id, 0) for one in scheduler(llm).running]


def test_it_is_of_the_kind_that_the_configuration_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on a CPU has no asynchronous one."""
    for name in ("FairScheduler", "FairAsyncScheduler"):
        monkeypatch.setattr(fair, name, lambda name=name, **given: name)
    found = [fair.scheduler(SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=each))) for each in (False, True)]
    assert found == ["FairScheduler", "FairAsyncScheduler"]


def test_a_short_prompt_is_read_beside_long_ones(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights")
    with engine(folder, max_num_batched_tokens=STEP, scheduler_cls=FAIR) as llm:
        read = read_in_first_step(llm, long=5)
    assert len(read) == 6
    assert read[-1] == 6
    assert sum(read) <= STEP
    assert min(read[:-1]) >= (STEP - 6) // 5


def test_vllm_alone_keeps_it_waiting(tmp_path: Path) -> None:
    with engine(write(tmp_path / "weights"), max_num_batched_tokens=STEP, long_prefill_token_threshold=STEP // 4) as llm:
        assert len(read_in_first_step(llm, long=5)) == 4  # a version that changes that needs no scheduler of ours


def test_requests_with_shares_equal_hugging_face(tmp_path: Path, measured: Measured) -> None:
    folder = write(tmp_path / "weights")
    batch = prompts([20 + 17 * number for number in range(12)])
    reference = hugging_face(folder)
    with engine(folder, max_num_batched_tokens=STEP, scheduler_cls=FAIR) as llm:
        found = run(llm, batch, max_tokens=20, logprobs=0, ignore_eos=True)
    worst = max(difference_behind(ids, *generated(one), reference) for ids, one in zip(batch, found, strict=True))
    measured("12 requests, shares of a step of 64", worst, LIMIT)


def test_a_step_on_a_cpu_is_small_while_requests_run_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(fair.time, "monotonic", lambda: now)
    with engine(write(tmp_path / "weights"), max_num_batched_tokens=2048, scheduler_cls=FAIR) as llm:
        found = scheduler(llm)
        assert found._tokens(1, 0) == fair.CPU_STEP
        assert found._tokens(2, 1) == fair.CPU_SHARED_STEP + 1
        now += fair.SHARED_SECONDS / 2
        assert found._tokens(1, 0) == fair.CPU_SHARED_STEP
        now += fair.SHARED_SECONDS
        assert found._tokens(1, 0) == fair.CPU_STEP
