from __future__ import annotations

import doctest
from dataclasses import replace
from typing import get_args

import pytest
from mistral_contract.quantization import METHODS, Scheme
from mistralctl import durations, fields, fit, shells, spec
from mistralctl.gpus import GIB, GPUS
from mistralctl.models import MODELS, V01, V02, V03


@pytest.mark.parametrize("module", [fields, fit, durations, shells, spec])
def test_the_worked_examples_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


def test_mistral_7b_is_14_48_gb_and_131072_bytes_a_token() -> None:
    assert fit.weight_bytes(V01, "bfloat16", None) == 14_483_464_192
    assert fit.kv_bytes_per_token(V01, "bfloat16") == 131_072


@pytest.mark.parametrize(("name", "thousands"), [("L4", 47), ("A10G", 47), ("A100", 178), ("L40S", 216), ("H100", 477)])
def test_tokens_that_fit_beside_the_weights(name: str, thousands: int) -> None:
    serving, memory = fit.Serving("bfloat16", 32768, "cuda"), GPUS[name].memory_gib * GIB * fit.MEMORY_UTILIZATION
    got = fit.fit(V03, serving, memory_bytes=memory, weights=fit.weight_bytes(V03, "bfloat16", None))
    assert got.cache_tokens / 1000 == pytest.approx(thousands, abs=1)
    assert got.reason is None


@pytest.mark.parametrize(
    ("length", "window", "device", "chunk", "blocks"),
    [
        (32768, None, "cuda", 2048, 2048),
        (32768, 4096, "cuda", 2048, 513),  # 4095 + 2 x 2048 = 8191 tokens are 512 blocks, and the one that the edge cuts
        (32768, 4096, "cuda", 512, 321),
        (4096, 4096, "cuda", 2048, 257),  # never more tokens than the request has
        (100, None, "cpu", 2048, 1),
        (32768, 4096, "cpu", 2048, 49),
    ],
)
def test_blocks_that_one_request_holds(length: int, window: int | None, device: str, chunk: int, blocks: int) -> None:
    assert fit.blocks_per_request(length, window, device, chunk) == blocks


def test_cache_that_requests_fill() -> None:
    """With a window 41 blocks of 128 tokens a request, without one 256; and the block that vLLM keeps."""
    for shape, blocks in ((V01, 41), (V02, 256)):
        got = fit.cache_bytes(shape, fit.Serving("bfloat16", 32768, "cpu", requests=2))
        assert got == (2 * blocks + 1) * 128 * 131_072


def test_with_a_window_chunks_are_smaller_and_more_long_requests_fit() -> None:
    assert (fit.max_batched_tokens(4096), fit.max_batched_tokens(None)) == (1024, 2048)
    assert fit.blocks_per_request(32768, 4096, "cuda") == fit.blocks_per_request(32768, 4096, "cuda", 1024) == 385


def test_tensor_parallel_divides_weights_and_heads() -> None:
    one, two = (
        fit.fit(V02, fit.Serving("bfloat16", 32768, "cuda", gpus=n), memory_bytes=20 * GIB, weights=14_483_464_192)
        for n in (1, 2)
    )
    assert two.weight_bytes * 2 == one.weight_bytes
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token


def test_a_gpu_that_cannot_do_the_arithmetic_says_why() -> None:
    assert fit.refused(GPUS["T4"], "bfloat16", None) == ["no bf16"]
    assert fit.refused(GPUS["T4"], "float16", "fp8") == []
    hopper = Scheme("compressed-tensors", 4, (), capability=(9, 0))
    assert fit.refused(GPUS["L4"], "bfloat16", None, hopper) == ["compressed-tensors needs compute capability 9.0"]
    assert fit.refused(GPUS["V100"], "float16", None) == ["compute capability 7.0, vLLM needs 7.5"]
    assert fit.refused(GPUS["L4"], "bfloat16", "awq") == []


def test_every_row_of_the_table_has_the_size_that_its_shape_implies() -> None:
    for model in MODELS.values():
        assert model.shape is not None
        tall = model.shape
        if model.name.startswith("mistral-7b"):
            vocabulary = 32768 if "v0.3" in model.name else 32000
            layer = 2 * 4096 * 4096 + 2 * 4096 * tall.kv_heads * tall.head_dim + 3 * 4096 * 14336 + 2 * 4096
            assert (tall.parameters, tall.tables) == (32 * layer + 2 * vocabulary * 4096 + 4096, 2 * vocabulary * 4096)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("ministral-8b-instruct-2410", 8.02), ("mistral-nemo-instruct-2407", 12.25), ("mistral-nemo-base-2407", 12.25),
        ("mathstral-7b-v0.1", 7.25), ("codestral-22b-v0.1", 22.25), ("mistral-small-24b-instruct-2501", 23.57), ("zephyr-7b-beta", 7.24),
    ],
)  # fmt: skip
def test_the_family_has_as_many_parameters_as_its_model_cards_say(name: str, billions: float) -> None:
    shape = MODELS[name].shape
    assert shape is not None
    assert round(shape.parameters / 1e9, 2) == billions


def test_a_pattern_of_windows_holds_less_than_full_attention_and_more_than_windows_alone() -> None:
    """36 layers, one in four with full attention: blocks of 9 layers, and 3 groups of 4 give theirs back behind the window."""
    pattern = replace(V02, layers=36, windows=(None, 4096, 4096, 4096) * 9, sliding_window=4096)
    serving = fit.Serving("bfloat16", 32768, "cuda")
    block = 16 * 9 * 2 * 8 * 128 * 2
    assert fit.groups(pattern.windows) == (9, (None, 4096, 4096, 4096))
    assert fit.cache_bytes(pattern, serving) == (2048 + 3 * 385 + 1) * block
    got = fit.fit(pattern, serving, memory_bytes=20 * GIB, weights=10 * GIB)
    assert (got.kv_bytes_per_token, got.cache_tokens) == (36 * 4096, 9 * GIB // block * 16 // 4)
    assert (got.request_tokens, got.request_tokens_without_window) == ((2048 + 3 * 385) * 16 // 4, 32768)
    assert got.concurrency == round(9 * GIB // block / (2048 + 3 * 385), 2)


def test_adapters_take_memory_that_the_cache_would_have() -> None:
    """Rank 16 of Mistral 7B: (4096 + 4096) x 2 of q and o, (4096 + 1024) x 2 of k and v, (4096 + 14336) x 3, in 32 layers."""
    alone, two = fit.Serving("bfloat16", 32768, "cuda"), fit.Serving("bfloat16", 32768, "cuda", adapters=2, rank=16)
    numbers = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert fit.adapter_bytes(V01, two) == 2 * 16 * 32 * numbers * 2 == 167_772_160
    assert fit.adapter_bytes(V01, replace(two, device="cpu")) == 2 * 167_772_160
    got, without = (fit.fit(V01, each, memory_bytes=20 * GIB, weights=14_483_464_192) for each in (two, alone))
    assert (got.adapter_bytes, without.cache_bytes - got.cache_bytes) == (167_772_160, 167_772_160)
    shared = fit.adapter_bytes(V01, replace(two, gpus=2))
    assert 167_772_160 / 2 < shared < 167_772_160
    none = fit.fit(V01, replace(two, adapters=64, rank=256), memory_bytes=20 * GIB, weights=14_483_464_192)
    assert none.reason == "13.5 GiB of weights and 80.0 GiB of adapters leave no room for the cache"


def test_the_options_methods_are_those_of_the_contract() -> None:
    assert get_args(spec.Quantization) == tuple(METHODS) == tuple(fit.QUANTIZED_BYTES)


def test_fp8_leaves_embedding_and_head_in_16_bits() -> None:
    assert fit.weight_bytes(V01, "bfloat16", "fp8") == 6_979_588_096 + 2 * 262_144_000
