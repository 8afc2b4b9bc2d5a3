"""The class in vLLM computes what Hugging Face's eager attention computes: log-probabilities in float32, to 5e-5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import difference_behind, hugging_face, largest_difference, log_probabilities, of_tokens, prompts, write
from engines import engine, generated, prompt_logprobs, run, runner

LIMIT = 5e-5
Measured = Callable[[str, float, float], None]
FULL, SLIDING = "full_attention", "sliding_attention"

SHAPES: dict[str, dict[str, Any]] = {
    "gqa 1, head 32, window 48": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa 2, head 64, window 33": {"head_dim": 64, "sliding_window": 33},
    "gqa 4, head 32, window 50, tied": {"num_key_value_heads": 1, "sliding_window": 50, "tie_word_embeddings": True},
    "gqa 8, head 96, window 77": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 96, "sliding_window": 77},
    "gqa 4, head 128, window 64, tied": {
        "num_attention_heads": 8, "head_dim": 128, "sliding_window": 64, "tie_word_embeddings": True,
    },
    "gqa 2, head 80, window 31, theta 1e6": {
        "head_dim": 80, "sliding_window": 31, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "window larger than any prompt": {"sliding_window": 700},
    "no window": {"sliding_window": None},
    "no window, tied, one layer": {"sliding_window": None, "tie_word_embeddings": True, "num_hidden_layers": 1},
    "layers sliding, full, sliding": {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
    "all layers full, window ignored": {"layer_types": [FULL, FULL]},
    "all layers sliding by name": {"layer_types": [SLIDING, SLIDING]},
}  # fmt: skip


def lengths_for(window: int | None) -> list[int]:
    """Prompts of eight windows, of a bit more and less than one, and of a few tokens."""
    w = min(window or 60, 70)
    return [8 * w, w - 1, w, w + 1, 3 * w + 7, 5, 100]


@pytest.mark.parametrize("case", SHAPES)
def test_every_position_and_generated_tokens_after_a_cache_hit(tmp_path: Path, case: str, measured: Measured) -> None:
    folder = write(tmp_path / "weights", **SHAPES[case])
    window = SHAPES[case].get("sliding_window", 48)
    batch = prompts(lengths_for(window))
    reference = hugging_face(folder)
    with engine(folder) as llm:
        model = runner(llm).model
        assert f"{type(model).__module__}.{type(model).__qualname__}" == "vllm_mistral.model.MistralSWAForCausalLM"
        # Seven requests at once, in chunks of 64 tokens, so one step carries chunks of several and decodes of others.
        found = prompt_logprobs(llm, batch)
        worst = largest_difference(found, reference, batch)
        measured(f"{case}: every position of {len(batch)} prompts, chunks of 64", worst, LIMIT)

        asked = batch[0][:300]
        run(llm, [asked], max_tokens=1)
        [hit] = run(llm, [asked], max_tokens=24, logprobs=0, ignore_eos=True)
        assert hit.num_cached_tokens > 0
        ids, logprobs = generated(hit)
        worst = difference_behind(asked, ids, logprobs, reference)
        measured(f"{case}: {len(ids)} tokens behind {hit.num_cached_tokens} cached", worst, LIMIT)


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_window_that_is_off_by_one_is_far_from_equal(tmp_path: Path, off_by: int) -> None:
    folder = write(tmp_path / "weights")
    [ids] = prompts([384])
    wanted = of_tokens(log_probabilities(hugging_face(folder), ids), ids)
    with engine(folder, hf_overrides={"sliding_window": 48 + off_by}) as llm:
        [found] = prompt_logprobs(llm, [ids])
    difference = (found - wanted).abs()
    first_wrong = 48 + min(off_by, 0) - 1  # entry i is about the token behind position i
    assert float(difference[:first_wrong].max()) < LIMIT
    assert float(difference[first_wrong:].max()) > 0.1


@pytest.mark.parametrize("chunk", [8, 33, 1024])
def test_any_chunk_size_gives_the_same(tmp_path: Path, chunk: int, measured: Measured) -> None:
    folder = write(tmp_path / "weights")
    batch = prompts([384, 47, 130])
    reference = hugging_face(folder)
    with engine(folder, max_num_batched_tokens=chunk, max_num_seqs=8) as llm:
        found = prompt_logprobs(llm, batch)
    measured(f"chunks of {chunk}", largest_difference(found, reference, batch), LIMIT)


def test_many_requests_at_once(tmp_path: Path, measured: Measured) -> None:
    folder = write(tmp_path / "weights")
    batch = prompts([20 + 9 * i for i in range(32)])
    reference = hugging_face(folder)
    with engine(folder, max_num_seqs=32, max_num_batched_tokens=96) as llm:
        found = run(llm, batch, max_tokens=60, logprobs=0, ignore_eos=True)
    worst = max(difference_behind(ids, *generated(one), reference) for ids, one in zip(batch, found, strict=True))
    measured("32 requests at once, 60 generated tokens each", worst, LIMIT)
