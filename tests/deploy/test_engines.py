"""--engine: what each engine lacks is refused before anything is rented, and what it needs in memory is planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from mistral_contract.engines import ENGINES, REFERENCE, VLLM
from mistralctl import checkpoints, fit, package_dir, plan
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.gpus import GIB, GPUS
from mistralctl.machine import Machine
from mistralctl.models import MODELS, V01, Model
from mistralctl.output import plan_text
from mistralctl.plan import Plan
from mistralctl.spec import DeploymentSpec
from mistralctl.tasks import serve
from weights_folders import AWQ, folder


def make(row: Model | None = None, **flags: Any) -> Plan:
    sourced = load({"engine": REFERENCE, **flags}, {}, None)
    return plan.make(sourced, row or checkpoints.resolve(sourced), Machine(24 * GIB, 2))


def test_an_engine_is_a_row_and_a_file() -> None:
    files = {path.stem for path in (package_dir("model") / "node" / "mistral_node" / "engines").glob("*.py")} - {"__init__"}
    assert files == set(ENGINES)
    assert set(get_args(DeploymentSpec.model_fields["engine"].annotation)) == set(ENGINES)
    for engine in ENGINES.values():
        assert set(engine.lacks) <= set(DeploymentSpec.model_fields)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lora": {"sql": "s3://bucket/sql"}}, "does not have --lora; leave one of the two out"),
        ({"quantization": "fp8"}, "does not have --quantization; leave one of the two out"),
        ({"tensor_parallel": 2}, "does not have --tensor-parallel; leave one of the two out"),
        ({"vllm_args": ("--seed=7",)}, "does not have --vllm-arg; leave one of the two out"),
        ({"accelerators": "L4:2"}, "does not have --accelerators L4:2; ask for one GPU"),
    ],
)
def test_what_the_reference_lacks_is_refused_here(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**flags)
    assert (str(caught.value), caught.value.code) == (f"--engine: {REFERENCE} {says}", Exit.USAGE)
    assert make(tensor_parallel=1).options  # asks for nothing


def test_weights_that_the_reference_does_not_read_are_refused_here(tmp_path: Path) -> None:
    model = MODELS["mistral-7b-v0.1"]
    assert model.shape is not None
    scaled = replace(model, shape=replace(model.shape, rope_type="llama3"))
    with pytest.raises(
        UserError, match=r"does not have mistral-7b-v0\.1's rotary embedding of type llama3; serve it with --engine vllm"
    ):
        make(scaled)
    with pytest.raises(UserError, match="does not have weights that are quantized with awq; serve others, or with --engine vllm"):
        make(model=str(folder(tmp_path / "awq", quantization_config=AWQ)))


def test_the_memory_of_the_reference_is_that_of_its_own_cache() -> None:
    """Window 4096 and steps of 1024 tokens: ceil((4095 + 1024) / 16) + 1 = 321 blocks of 16 tokens in each of 32 layers."""
    serving = fit.Serving("bfloat16", 32768, "cuda", engine=REFERENCE)
    assert fit.cache_bytes(V01, serving) == (32 * 321 + 1) * 16 * 4096
    memory = GPUS["L4"].memory_gib * GIB * fit.MEMORY_UTILIZATION
    got = fit.fit(V01, serving, memory_bytes=memory, weights=14_483_464_192)
    assert (got.request_tokens, got.request_tokens_without_window) == (321 * 16, 32768)
    assert got.cache_bytes == int(memory) - 14_483_464_192 - 3 * GIB
    mixed = replace(V01, windows=(4096, None) * 16)
    assert fit.cache_bytes(mixed, serving) == (16 * 321 + 16 * 2048 + 1) * 16 * 4096
    ours, vllm = make().chosen.fit, make(engine=VLLM).chosen.fit
    assert ours is not None
    assert vllm is not None
    assert vllm.cache_bytes - ours.cache_bytes == 2 * GIB
    assert ours.weight_bytes == vllm.weight_bytes


def test_the_task_names_the_engine_and_asks_for_no_tools() -> None:
    model = "mistral-7b-instruct-v0.3"
    for engine, parser in ((VLLM, "mistral"), (REFERENCE, "")):
        task = serve.render(make(model=model, engine=engine), owner="me")
        assert (task["envs"]["MISTRALCTL_ENGINE"], task["envs"]["MISTRALCTL_TOOL_PARSER"]) == (engine, parser)


def test_a_plan_says_which_engine_computes_unless_it_is_vllm() -> None:
    assert plan_text(make()).splitlines()[0].endswith(", bfloat16, engine reference")
    assert "engine" not in plan_text(make(engine=VLLM)).splitlines()[0]
