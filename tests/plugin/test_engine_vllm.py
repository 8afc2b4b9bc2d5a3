"""The flags of every kind of contract go through vLLM's own argument parser."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
from mistral_node import contract, engines
from mistral_node.contract import Code, Contract, LaunchError
from mistral_node.engines import vllm
from mistral_node.isolation import Isolation
from test_contract import GOOD

MODEL = Path("/weights/model")
CUDA = {
    "MISTRALCTL_DEVICE": "cuda", "MISTRALCTL_KV_CACHE_GIB": "", "MISTRALCTL_MEMORY_UTILIZATION": "0.92", "MISTRALCTL_LORA": "{}",
}  # fmt: skip
ROWS = {
    "v0.1": {"MISTRALCTL_SLIDING_WINDOW": "4096", "MISTRALCTL_MAX_MODEL_LEN": "32768", "MISTRALCTL_TOKENIZER_MODE": "mistral"},
    "v0.3": {"MISTRALCTL_TOOL_PARSER": "mistral", "MISTRALCTL_TOKENIZER_MODE": "mistral", "MISTRALCTL_TENSOR_PARALLEL": "8"},
    "base": {"MISTRALCTL_CHAT_TEMPLATE": "none", "MISTRALCTL_TOKENIZER_MODE": "mistral"},
    "quantized": {"MISTRALCTL_QUANTIZATION": "fp8", "MISTRALCTL_DTYPE": "float16"},
    "small": {},
}


def parsed(arguments: list[str]) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(found)
    return found


@pytest.mark.parametrize("engine", ["cuda", "cpu"])
@pytest.mark.parametrize("row", ROWS)
def test_vllm_reads_the_flags_as_they_were_meant(row: str, engine: str) -> None:
    wanted = contract.read({**GOOD, "MISTRALCTL_LORA": "{}", **(CUDA if engine == "cuda" else {}), **ROWS[row]})
    got = parsed(vllm.arguments(wanted, MODEL))
    assert got.model_tag == str(MODEL) or got.model == str(MODEL)
    assert got.hf_overrides == {"architectures": ["MistralSWAForCausalLM"]}
    assert got.middleware == ["mistral_node.front.Guard"]
    assert (got.host, got.port, got.api_key) == ("127.0.0.1", 8000, None)
    assert got.served_model_name == ["m"]
    assert (got.max_model_len, got.max_num_seqs) == (wanted.max_model_len, 8)
    assert got.max_num_batched_tokens == 2048
    assert (got.max_num_queued_reqs, got.scheduler_cls) == (24, "mistral_node.scheduler.scheduler")
    assert got.tensor_parallel_size == wanted.tensor_parallel
    assert (got.dtype, got.quantization) == (wanted.dtype, "fp8_per_tensor" if wanted.quantization else None)
    assert got.tokenizer_mode == wanted.tokenizer_mode
    assert (got.load_format, got.trust_remote_code) == ("safetensors", False)
    assert got.shutdown_timeout == vllm.DRAIN_SECONDS
    assert (got.tool_call_parser, got.enable_auto_tool_choice) == (wanted.tool_parser, wanted.tool_parser is not None)
    assert got.seed == 7
    if engine == "cuda":
        assert got.gpu_memory_utilization == 0.92
        assert got.enable_flashinfer_autotune is False
        assert got.compilation_config.pass_config.fuse_allreduce_rms is False


@pytest.mark.parametrize(
    ("row", "bound", "nodes", "expected"),
    [
        ({}, None, 1, vllm.IN_THE_ENGINE),
        ({}, "nobind", 0, vllm.IN_THE_ENGINE),  # a system that does not say
        ({}, None, 2, None),
        ({}, "0-3", 1, None),
        (CUDA, None, 1, None),
    ],
)
def test_on_a_cpu_with_one_memory_node_the_model_runs_in_the_engine(
    row: dict[str, str],
    bound: str | None,
    nodes: int,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for node in range(nodes):
        (tmp_path / f"node{node}").mkdir()
    monkeypatch.setattr(vllm, "MEMORY_NODES", tmp_path)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    if bound is not None:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bound)
    wanted = contract.read({**GOOD, "MISTRALCTL_LORA": "{}", **row})
    assert parsed(vllm.arguments(wanted, MODEL)).distributed_executor_backend == expected


def test_weights_in_mistrals_own_format(tmp_path: Path) -> None:
    for name in ("params.json", "consolidated.safetensors"):
        (tmp_path / name).write_text("{}")
    wanted = contract.read({**GOOD, "MISTRALCTL_LORA": "{}"})
    got = parsed(vllm.arguments(wanted, tmp_path))
    assert (got.load_format, got.config_format) == ("mistral", "mistral")
    for name in ("config.json", "model-00001-of-00003.safetensors"):  # v0.3 has both: one of them is enough
        (tmp_path / name).write_text("{}")
    got = parsed(vllm.arguments(wanted, tmp_path))
    assert (got.load_format, got.config_format) == ("safetensors", "hf")


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def test_the_method_is_that_of_the_weights(tmp_path: Path) -> None:
    wanted = contract.read({**GOOD, "MISTRALCTL_LORA": "{}"})
    (tmp_path / "model.safetensors").touch()
    for config, method in (({}, None), ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"), (AWQ, "awq")):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        assert parsed(vllm.arguments(wanted, tmp_path)).quantization == method


@pytest.mark.parametrize(
    ("asked", "config", "says"),
    [
        ("gptq", AWQ, "gptq does not go with these weights, which are quantized with awq"),
        ("awq", {}, "awq needs weights that are so quantized"),
        ("", {"quant_method": "bitsandbytes"}, "bitsandbytes is not served"),
    ],
)
def test_a_method_that_the_weights_do_not_have_ends_the_launcher(
    asked: str, config: dict[str, object], says: str, tmp_path: Path
) -> None:
    wanted = contract.read({**GOOD, "MISTRALCTL_LORA": "{}", "MISTRALCTL_QUANTIZATION": asked})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(LaunchError, match=says) as caught:
        vllm.arguments(wanted, tmp_path)
    assert caught.value.code == Code.WEIGHTS


def test_adapters_come_with_the_rank_that_takes_them(tmp_path: Path) -> None:
    wanted: Contract = dataclasses.replace(contract.read({**GOOD, "MISTRALCTL_LORA": "{}"}), adapters=(("sql", tmp_path),))
    got = parsed(vllm.arguments(wanted, MODEL, 16))
    assert got.enable_lora is True
    assert got.max_lora_rank == 16
    [module] = got.lora_modules
    assert (module.name, module.path) == ("sql", str(tmp_path))


def test_the_environment_keeps_vllm_off_the_hub_and_to_our_plugin() -> None:
    got = vllm.environment(contract.read(GOOD), {"PATH": "/bin"})
    assert got["HF_HUB_OFFLINE"] == "1"
    assert got["VLLM_PLUGINS"] == "mistral_swa"
    assert got["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert got["TORCH_COMPILE_DISABLE"] == "1"
    assert got["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert got["GOMP_SPINCOUNT"] == engines.SPINS
    assert got["MISTRALCTL_RUN_DIR"] == "/node/run/mistral/shared"
    assert not [value for value in got.values() if "mctl-" in value]


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_whose_machine_it_is_to_say(name: str) -> None:
    got = vllm.environment(contract.read(GOOD), {name: "1"})
    assert {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(got) == {name}
    assert got[name] == "1"


def test_on_a_gpu_nothing_is_built_with_what_the_image_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs
    from vllm.v1.sample.ops import topk_topp_sampler

    wanted = contract.read(GOOD | CUDA)
    got = vllm.environment(wanted, {"PATH": "/bin", "VLLM_USE_DEEP_GEMM": "1"})
    assert got["VLLM_USE_DEEP_GEMM"] == "1"  # whoever sets it means it
    for name in vllm.NOTHING_BUILT:
        assert hasattr(envs, name)
    assert "TORCH_COMPILE_DISABLE" not in got
    assert not set(vllm.NOTHING_BUILT) & set(vllm.environment(contract.read(GOOD), {}))
    # vLLM's own question, as it asks it on a GPU: without the variable it goes on to FlashInfer, which is not here.
    monkeypatch.setattr(type(topk_topp_sampler.current_platform), "is_cuda", lambda self: True)
    with monkeypatch.context() as without:
        without.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
        with pytest.raises(ImportError, match="flashinfer"):
            topk_topp_sampler.flashinfer_sampler_supported()
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", got["VLLM_USE_FLASHINFER_SAMPLER"])
    assert topk_topp_sampler.flashinfer_sampler_supported() is False


def test_libraries_of_the_images_toolkit_do_not_reach_the_engine(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").touch()
    apart, same = Isolation("mistralctl-serve"), Isolation()
    for given, kept in (("/usr/local/cuda/lib64", None), (f"/usr/local/cuda/lib64::{tmp_path}", str(tmp_path))):
        environ = vllm.environment(contract.read(GOOD | CUDA), {"PATH": "/bin", "LD_LIBRARY_PATH": given})
        assert same.environment(environ).get("LD_LIBRARY_PATH") == kept  # but the driver's, where nothing else says where it lies
        assert "LD_LIBRARY_PATH" not in apart.environment(environ)
        assert apart.environment(environ)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    environ = vllm.environment(contract.read(GOOD), {"LD_LIBRARY_PATH": "/somewhere"})
    assert same.environment(environ)["LD_LIBRARY_PATH"] == "/somewhere"  # this machine's own, where it has no GPU
    assert "LD_LIBRARY_PATH" not in apart.environment(environ)


@pytest.mark.parametrize(
    ("tokenizer", "parser", "version", "backend"),
    [("hf", "", "", "xgrammar"), ("mistral", "", "", "xgrammar"), ("mistral", "", "v13", "xgrammar"), ("mistral", "mistral", "", "xgrammar"),
     ("mistral", "mistral", "v3", "xgrammar"), ("mistral", "mistral", "v7", "xgrammar"), ("mistral", "mistral", "v11", "guidance"),
     ("mistral", "mistral", "v13", "guidance"), ("mistral", "mistral", "no version", "xgrammar")],
)  # fmt: skip
def test_grammars_have_one_backend(tmp_path: Path, tokenizer: str, parser: str, version: str, backend: str) -> None:
    """vLLM would fall back to one whose time the guard does not try, and keep that for every later request."""
    (tmp_path / "model.safetensors").touch()
    if version:
        (tmp_path / "tekken.json").write_text(json.dumps({"config": {"version": version}, "vocab": []}))
    named = {"MISTRALCTL_LORA": "{}", "MISTRALCTL_TOKENIZER_MODE": tokenizer, "MISTRALCTL_TOOL_PARSER": parser}
    found = parsed(vllm.arguments(contract.read({**GOOD, **named}), tmp_path))
    assert found.structured_outputs_config.backend == backend


def test_vllms_own_bounds_are_those_of_the_guard() -> None:
    found = vllm.environment(contract.read({**GOOD, "MISTRALCTL_LORA": "{}"}), {})
    assert (found["VLLM_MAX_N_SEQUENCES"], found["VLLM_MAX_COMPLETION_PROMPTS"]) == ("6", "6")
