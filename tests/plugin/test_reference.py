"""The reference computes what Hugging Face's eager attention computes: every log-probability in float32, to 5e-5."""

from __future__ import annotations

import dataclasses
import doctest
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import consolidated, hugging_face, log_probabilities, prompts, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from vllm_mistral import reference
from vllm_mistral.reference import BlockTable, Engine, Mistral, Sampling, blocks_held, sample

LIMIT = 5e-5
Measured = Callable[[str, float, float], None]
FULL, SLIDING = "full_attention", "sliding_attention"

SHAPES: dict[str, dict[str, Any]] = {
    "gqa 1, head 32, window 48": {"num_key_value_heads": 4},
    "gqa 2, head 64, window 33": {"head_dim": 64, "sliding_window": 33},
    "gqa 4, head 32, window 50, tied": {"num_key_value_heads": 1, "sliding_window": 50, "tie_word_embeddings": True},
    "gqa 8, head 96, window 77": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 96, "sliding_window": 77},
    "gqa 4, head 128, window 64, tied": {
        "num_attention_heads": 8, "head_dim": 128, "sliding_window": 64, "tie_word_embeddings": True,
    },
    "gqa 2, window 31, theta 1e6": {"sliding_window": 31, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "window 1": {"sliding_window": 1},
    "window larger than any prompt": {"sliding_window": 700},
    "no window": {"sliding_window": None},
    "layers sliding, full, sliding": {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
    "all layers full, window ignored": {"layer_types": [FULL, FULL]},
}  # fmt: skip


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, so that a key behind the window leaves no trace at all."""
    return write(tmp_path_factory.mktemp("tiny") / "weights", num_hidden_layers=1)


def test_the_worked_examples_of_the_docstrings() -> None:
    assert doctest.testmod(reference) == (0, doctest.testmod(reference).attempted)
    assert doctest.testmod(reference).attempted > 20


@pytest.mark.parametrize("case", SHAPES)
def test_every_position_of_a_ragged_batch_and_what_it_generates(tmp_path: Path, case: str, measured: Measured) -> None:
    folder = write(tmp_path / "weights", **SHAPES[case])
    window = min(SHAPES[case].get("sliding_window", 48) or 60, 70)
    batch = prompts([8 * window, window - 1 or 1, window, window + 1, 3 * window + 7, 5, 100])
    expected_of = hugging_face(folder)
    engine = Engine(Mistral.load(folder), block_size=7, max_num_batched_tokens=64)
    worst = max(
        difference(rows, log_probabilities(expected_of, ids)) for rows, ids in zip(engine.score(batch), batch, strict=True)
    )
    measured(f"reference, {case}: every position, {len(batch)} prompts at once, chunks of 64, blocks of 7", worst, LIMIT)

    [whole, *_] = completions = engine.generate(batch, Sampling(max_tokens=2 * window))
    for ids, completion in zip(batch, completions, strict=True):
        rows = log_probabilities(expected_of, ids + completion.token_ids)[len(ids) - 1 : -1]
        assert difference(torch.tensor(completion.logprobs), rows.max(dim=-1).values) <= LIMIT
        assert (
            difference(torch.tensor(completion.logprobs), rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0])
            <= LIMIT
        )
    assert len(whole.token_ids) == 2 * window


def test_llama_is_mistral_without_a_window(tmp_path: Path, measured: Measured) -> None:
    folder = write(tmp_path / "weights", sliding_window=None)
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    expected_of = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    [ids] = prompts([200])
    [rows] = Engine(Mistral.load(folder)).score([ids])
    measured("reference, llama", difference(rows, log_probabilities(expected_of, ids)), LIMIT)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_chunk_and_block_size(tiny: Path, data: st.DataObject) -> None:
    window = data.draw(st.sampled_from([None, 1, 2, 15, 16, 48, 100]), label="window")
    block_size = data.draw(st.integers(1, 40), label="block_size")
    chunk = data.draw(st.integers(1, 200), label="chunk")
    lengths = data.draw(st.lists(st.integers(1, 130), min_size=1, max_size=5), label="lengths")
    batch = prompts(lengths, seed=sum(lengths))
    model = Mistral.load(tiny)
    model = Mistral(dataclasses.replace(model.config, windows=(window,)), model.weights)
    expected_of = hugging_face(tiny, sliding_window=window)
    for ids, rows in zip(batch, Engine(model, block_size, chunk).score(batch), strict=True):
        assert difference(rows, log_probabilities(expected_of, ids)) <= LIMIT


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    window=st.none() | st.integers(1, 40),
    block_size=st.integers(1, 9),
    chunk=st.integers(1, 30),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
)
def test_a_sequence_never_holds_more_than_its_bound_and_gives_all_blocks_back(
    window: int | None, block_size: int, chunk: int, lengths: list[int]
) -> None:
    bounds = [blocks_held(window, chunk, block_size, length) for length in lengths]
    pool = list(range(sum(bounds)))
    tables = [BlockTable(pool, block_size, window) for _ in lengths]
    for start in range(0, max(lengths), chunk):
        for table, length, bound in zip(tables, lengths, bounds, strict=True):
            if start < length:
                table.advance(start, min(start + chunk, length))
                held = [block for block in table.blocks if block != reference.RECYCLED]
                assert len(held) <= bound
                oldest = 0 if window is None else max(0, start - window + 1)
                assert table.slot_mapping(oldest, min(start + chunk, length))[0] >= 0
        owned = [block for table in tables for block in table.blocks if block != reference.RECYCLED]
        assert sorted(owned + pool) == list(range(sum(bounds)))
    for table in tables:
        table.recycle(len(table.blocks))
    assert sorted(pool) == list(range(sum(bounds)))


def test_blocks_go_back_while_the_sequence_still_runs(tiny: Path) -> None:
    held: list[tuple[int, int]] = []
    engine = Engine(Mistral.load(tiny), block_size=4, max_num_batched_tokens=32)
    engine.progress = lambda computed, total: held.append((computed, engine.caches[0].key.shape[1] - len(engine.caches[0].pool)))
    engine.generate(prompts([500]), Sampling(max_tokens=20))
    assert blocks_held(48, 32, 4, 520) == 21
    assert [blocks for computed, blocks in held[:-1]][:6] == [8, 16, 20, 20, 20, 20]
    assert {blocks for computed, blocks in held if 500 < computed < 519} <= {12, 13}
    assert held[-1][1] == 0
    assert engine.caches[0].key.shape[1] == 21


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_window_that_is_off_by_one_is_far_from_equal(tiny: Path, off_by: int) -> None:
    [ids] = prompts([384])
    [rows] = Engine(Mistral.load(tiny)).score([ids])
    wrong = log_probabilities(hugging_face(tiny, sliding_window=48 + off_by), ids)
    first_wrong = 48 + min(off_by, 0)
    assert difference(rows[:first_wrong], wrong[:first_wrong]) <= LIMIT
    assert difference(rows[first_wrong:], wrong[first_wrong:]) > 0.1


def sharded(folder: Path, target: Path) -> Path:
    """The same checkpoint in two files with an index."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, target / name)
    index = {"weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"sliding_window": None, "num_key_value_heads": 1}])
def test_consolidated_and_sharded_files_are_the_same_model(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = write(tmp_path / "whole", **shape)
    whole = Mistral.load(folder)
    for other in (consolidated(folder, tmp_path / "consolidated"), sharded(folder, tmp_path / "sharded")):
        for stream in (False, True):
            model = Mistral.load(other, stream=stream)
            assert model.config == whole.config
            assert model.weights.keys() == whole.weights.keys()
            assert all(torch.equal(model.weights[name], whole.weights[name]) for name in whole.weights)


@pytest.mark.parametrize("case", SHAPES)
def test_streamed_weights_give_the_same_bits(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path / "whole", **SHAPES[case])
    narrow = {name: w.bfloat16() for name, w in load_file(folder / "model.safetensors").items()}
    save_file(narrow, folder / "model.safetensors")
    batch = prompts([300, 1, 47, 120])
    for place in (folder, sharded(folder, tmp_path / "sharded")):
        plain, streamed = (Engine(Mistral.load(place, stream=stream), 7, 1000) for stream in (False, True))
        for expected, rows in zip(plain.score(batch), streamed.score(batch), strict=True):
            assert torch.equal(expected, rows)
        assert plain.generate(batch, Sampling(max_tokens=5)) == streamed.generate(batch, Sampling(max_tokens=5))


def test_a_streamed_step_reads_each_weight_once_and_holds_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = Mistral.load(write(tmp_path / "weights"), stream=True)
    read, alive = list[str](), list[weakref.ref[torch.Tensor]]()
    original = reference.StoredWeights.__getitem__

    def counting(stored: reference.StoredWeights, name: str) -> torch.Tensor:
        assert not [one for one in alive if one() is not None], f"{read[-1]} is still held when {name} is read"
        tensor = original(stored, name)
        read.append(name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(reference.StoredWeights, "__getitem__", counting)
    Engine(streamed, max_num_batched_tokens=1000).score(prompts([300, 20, 47]), last=1)
    assert sorted(read) == sorted([*streamed.weights, *["lm_head.weight"] * 2])  # the head is asked once for each prompt


def test_streaming_takes_the_memory_of_a_layer_and_says_what_7b_would_take() -> None:
    program = Path(reference.__file__).parents[3] / "benchmarks" / "streamed_canary.py"
    done = subprocess.run(
        [sys.executable, program, "--quick", "--threads", "1", "-o", "json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["same_bits"] is True
    assert found["differences"]["in memory, small steps"] <= LIMIT
    saved = found["peak_mib"]["in memory"] - found["peak_mib"]["streamed"]
    assert saved > 0.6 * found["weights_mib"] > 100, found
    assert found["seconds_32_layers"] > found["layer_seconds"] * 32


def test_scores_in_memory_are_bounded_whatever_the_length(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [ids] = prompts([700])
    model = Mistral.load(tiny)
    model = Mistral(dataclasses.replace(model.config, windows=(None,)), model.weights)
    [expected] = Engine(model).score([ids])
    sizes = list[int]()
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, dim: (sizes.append(scores.numel()), softmax(scores, dim=dim))[1])
    monkeypatch.setattr(reference, "MAX_SCORES", 2**14)
    [rows] = Engine(model).score([ids])
    assert max(sizes) <= 2**14 < 4 * 700 * 700
    assert difference(rows, expected) <= LIMIT


def test_weights_kept_narrow_give_the_same_numbers_as_widened_ones(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights")
    narrow = {name: w.bfloat16() for name, w in load_file(folder / "model.safetensors").items()}
    save_file(narrow, folder / "model.safetensors")
    [ids] = prompts([100])
    wide, kept = Mistral.load(folder), Mistral.load(folder, widen=False)
    assert {w.dtype for w in kept.weights.values()} == {torch.bfloat16}
    assert torch.equal(Engine(wide).score([ids])[0], Engine(kept).score([ids])[0])


def test_sampling_depends_on_seed_and_place_and_on_nothing_else(tiny: Path) -> None:
    model = Mistral.load(tiny)
    batch = prompts([40, 90, 7])
    sampling = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=5)
    first = Engine(model, 16, 2048).generate(batch, sampling)
    again = Engine(model, 5, 33).generate(batch, sampling)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    alone = Engine(model).generate(batch[1:2], Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=6))
    assert alone[0].token_ids == first[1].token_ids
    other = Engine(model).generate(batch, Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=50))
    assert [c.token_ids for c in first] != [c.token_ids for c in other]


def test_temperature_and_top_p_draw_as_often_as_they_should() -> None:
    logprobs = torch.tensor([0.6, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(1)

    def shares(sampling: Sampling) -> list[float]:
        drawn = [sample(logprobs, sampling, generator) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(3)]

    assert shares(Sampling(temperature=1.0)) == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    assert shares(Sampling(temperature=0.5)) == pytest.approx([36 / 46, 9 / 46, 1 / 46], abs=0.03)
    assert shares(Sampling(temperature=1.0, top_p=0.85)) == pytest.approx([2 / 3, 1 / 3, 0.0], abs=0.03)
    assert shares(Sampling(temperature=1.0, top_p=0.6)) == [1.0, 0.0, 0.0]
    assert shares(Sampling(temperature=0.01)) == [1.0, 0.0, 0.0]


def test_a_stop_token_ends_a_sequence(tiny: Path) -> None:
    engine = Engine(Mistral.load(tiny))
    batch = prompts([30, 31])
    free = engine.generate(batch, Sampling(max_tokens=10))
    stop = free[0].token_ids[4]
    [stopped, other] = engine.generate(batch, Sampling(max_tokens=10, stop_token_ids=(stop,)))
    assert stopped.token_ids == free[0].token_ids[: free[0].token_ids.index(stop) + 1]
    assert other.token_ids == free[1].token_ids[: len(other.token_ids)]
