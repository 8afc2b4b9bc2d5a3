"""vLLM in this process, with our class: started in two seconds, ended before the next."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoints import ARCHITECTURE
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

BLOCK = 32


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """An engine with blocks of 32 tokens and prefill chunks of 64, in float32 unless told otherwise."""
    overrides = {"architectures": [ARCHITECTURE]} | options.pop("hf_overrides", {})
    given = {
        "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True,
        "max_num_batched_tokens": 64, "block_size": BLOCK, "num_gpu_blocks_override": 256, "hf_overrides": overrides,
    }  # fmt: skip
    gc.freeze()  # what is imported needs no collection, which vLLM otherwise spends seconds on
    llm = LLM(str(folder), **(given | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def runner(llm: Any) -> Any:
    """The model runner of the engine's worker."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def scheduler(llm: Any) -> Any:
    """The scheduler, which owns the blocks."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def run(llm: Any, batch: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
    """One result for each prompt of token ids, all admitted at once."""
    lora_request = sampling.pop("lora_request", None)
    parameters = SamplingParams(**({"temperature": 0, "detokenize": False} | sampling))
    batch_of_ids = [{"prompt_token_ids": list(ids)} for ids in batch]
    return list(llm.generate(batch_of_ids, parameters, use_tqdm=False, lora_request=lora_request))


def prompt_logprobs(llm: Any, batch: Sequence[Sequence[int]], **options: Any) -> list[torch.Tensor]:
    """For each prompt [T - 1]: the log-probability of each of its tokens but the first."""
    found = run(llm, batch, max_tokens=1, prompt_logprobs=0, **options)
    return [
        torch.tensor([step[token].logprob for step, token in zip(one.prompt_logprobs[1:], ids[1:], strict=True)])
        for one, ids in zip(found, batch, strict=True)
    ]


def generated(one: Any) -> tuple[list[int], torch.Tensor]:
    """The generated tokens of a result and their log-probabilities (ask with logprobs=0)."""
    output = one.outputs[0]
    ids = list(output.token_ids)
    return ids, torch.tensor([step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)])
