"""The laptop's arithmetic of memory beside vLLM's own code, for the same config.json: caches of layers with and without a window."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write
from engines import engine, runner
from mistral_contract import architecture
from vllm.v1.core import kv_cache_utils
from vllm_mistral import inspection

sys.path.append(
    str(Path(__file__).parents[2] / "deploy")
)  # facts and pure arithmetic: nothing of it needs the laptop's environment

from mistralctl import fit
from mistralctl.models import Shape

FULL, SLIDING = "full_attention", "sliding_attention"
LENGTH, WINDOW = 2048, 300
PATTERNS = {
    "no window": [FULL] * 4,
    "a window": [SLIDING] * 4,
    "one in four, as Ministral": [FULL, SLIDING, SLIDING, SLIDING] * 2,
    "one in four, the other way round": [SLIDING, SLIDING, SLIDING, FULL] * 2,
    "nearly as many of each": [FULL] * 3 + [SLIDING] * 4,
    "a group with layers of padding": [FULL, SLIDING, SLIDING] * 2 + [SLIDING],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cache_is_what_vllm_computes(pattern: str, tmp_path: Path) -> None:
    kinds = PATTERNS[pattern]
    folder = write(tmp_path / "weights", num_hidden_layers=len(kinds), layer_types=kinds, sliding_window=WINDOW)
    shape = Shape.of(architecture.read(json.loads((folder / "config.json").read_text())))
    chunk = fit.max_batched_tokens(shape.sliding_window)
    serving = fit.Serving("float32", LENGTH, "cpu")
    with engine(folder, block_size=fit.BLOCK_SIZE["cpu"], max_model_len=LENGTH, max_num_batched_tokens=chunk) as llm:
        config = llm.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items() if hasattr(layer, "attn_backend")}
        groups = kv_cache_utils.get_kv_cache_groups(config, specs)
        per_request = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        block = kv_cache_utils._pool_bytes_per_block(config, groups)
        facts = inspection._facts(runner(llm).model, config) or {}
        config.cache_config.num_gpu_blocks_override = None
        cache = 100 * per_request // 7
        made = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, cache)
        concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, made)
    assert (len(specs), facts["blocks_per_request"], facts["block_size"]) == (
        len(kinds),
        per_request // block,
        fit.BLOCK_SIZE["cpu"],
    )
    for requests in (1, 3):
        assert fit.cache_bytes(shape, replace(serving, requests=requests)) == requests * per_request + block
    got = fit.fit(shape, serving, memory_bytes=cache + 10**6 + fit.OVERHEAD_BYTES["vllm"], weights=10**6)
    assert (got.concurrency, got.reason) == (round(concurrency, 2), None)
    assert got.cache_tokens == fit.cdiv(made.num_blocks * fit.BLOCK_SIZE["cpu"], len(groups))


def test_the_slots_of_adapters_are_what_vllm_allocates(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights")
    shape = Shape.of(architecture.read(json.loads((folder / "config.json").read_text())))
    with engine(folder, enable_lora=True, max_loras=2, max_lora_rank=16) as llm:
        found = sum(
            tensor.numel() * tensor.element_size()
            for module in runner(llm).model.modules()
            for name in ("lora_a_stacked", "lora_b_stacked")
            for tensor in getattr(module, name, ())
        )
    assert found == fit.adapter_bytes(shape, fit.Serving("float32", LENGTH, "cuda", adapters=2, rank=16))
