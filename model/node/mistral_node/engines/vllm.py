"""vLLM: from the contract to the arguments of `vllm serve`, a list, built and never spliced."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from mistral_contract import untrusted
from mistral_node.bodies import Bounds
from mistral_node.contract import Code, Contract, LaunchError
from mistral_node.engines import DRAIN_SECONDS, surroundings
from mistral_node.grammars import GUIDANCE, TEKKEN
from mistral_node.weights import is_consolidated, quantization
from vllm_mistral import ARCHITECTURE, MODEL_CLASS

NAME, REPORTED = "vLLM", ARCHITECTURE
MODULE = ("mistral_node.start", "serve")
# What vLLM says when one of its own processes is gone and has said nothing: EngineCore, later and at its start, or a worker.
GONE = re.compile(r"^(\w+\.)*EngineDeadError\b|Engine core initialization failed|died unexpectedly")
WITHOUT_A_WORD = "a process of vLLM's engine was killed, or crashed without a word"
GUARD = "mistral_node.front.Guard"
SCHEDULER = "mistral_node.scheduler.scheduler"
IN_THE_ENGINE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
MEMORY_NODES = Path("/sys/devices/system/node")
# What vLLM 0.32 would build with the image's nvcc while it starts, where there is one (docs/gpu.md): each of these names what is used instead,
# which comes built with vLLM's wheel. FlashInfer's sampler is not even asked whether it can be built.
NOTHING_BUILT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # vLLM's own sampler
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",  # vLLM's own all-reduce, NCCL
    "VLLM_USE_DEEP_GEMM": "0",  # CUTLASS, for weights in blocks of fp8
}
NOTHING_BUILT_FLAGS = ("--no-enable-flashinfer-autotune", "--compilation-config.pass_config.fuse_allreduce_rms=false")


def runs_in_the_engine(contract: Contract) -> bool:
    """Whether the model shall run in the engine's own process: on a CPU whose memory is in one piece.

    vLLM gives a CPU's model a process of its own, so that its threads can be bound to the cores of one memory node, and both processes spin
    for a second after each message. On 2 cores a start takes 1.3 times as long that way, a token 1.1 times, and a short request 9 times the
    processor time (benchmarks/one_process.py). Where there is one memory node there is nothing to bind. A binding that was
    asked for needs vLLM's way.
    """
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") != "nobind"
    return contract.device == "cpu" and not bound and len(list(MEMORY_NODES.glob("node[0-9]*"))) <= 1


def lora_slots(adapters: int, device: str) -> int:
    """Return for how many adapters vLLM has to hold room: on a CPU for one more than there are.

    vLLM 0.32 gives a request without an adapter the slot -1, which its kernels for CPUs (`lora/ops/torch_ops`) take for the last one: beside a
    request with an adapter, the model alone would answer with the adapter of that slot. The last slot stays empty, which is all zeros.
    """
    return adapters + (device == "cpu")


def _makes_grammars_of_chats(contract: Contract, model_dir: Path) -> bool:
    """Whether vLLM makes a grammar of every chat, in llguidance's language: with Mistral's tools of tekken from version 11 on."""
    if contract.tokenizer_mode != "mistral" or not contract.tool_parser:
        return False
    try:
        config = untrusted.read_file(model_dir / TEKKEN, untrusted.MOST_TOKENIZER_BYTES).get("config")
    except (OSError, ValueError):  # vLLM says what is wrong with it
        return False
    version = re.fullmatch(r"v([0-9]{1,4})(m[0-9]+)?", str(config.get("version"))) if isinstance(config, dict) else None
    return version is not None and int(version[1]) >= 11


def arguments(contract: Contract, model_dir: Path, lora_rank: int = 0) -> list[str]:
    """What follows `vllm serve`: only safetensors are loaded, no code that comes with weights is run. `lora_rank` takes every adapter."""
    formats = ("mistral", "mistral") if is_consolidated(model_dir) else ("safetensors", "hf")
    found = [
        str(model_dir),
        "--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]}),
        "--load-format", formats[0],
        "--config-format", formats[1],
        "--tokenizer-mode", "mistral" if contract.tokenizer_mode == "mistral" else "hf",
        "--served-model-name", contract.served_name,
        "--host", contract.host,
        "--port", str(contract.port),
        "--middleware", GUARD,
        "--max-model-len", str(contract.max_model_len),
        "--max-num-seqs", str(contract.max_num_seqs),
        "--max-num-batched-tokens", str(max(contract.max_batched_tokens, contract.max_num_seqs)),
        "--scheduler-cls", SCHEDULER,
        # Behind the guard's own queue, which says when to come again.
        "--max-num-queued-reqs", str(2 * contract.max_num_seqs + 8),
        "--tensor-parallel-size", str(contract.tensor_parallel),
        "--dtype", contract.dtype,
        "--shutdown-timeout", str(DRAIN_SECONDS),
        "--enable-prefix-caching",
        "--disable-access-log-for-endpoints", "/health",
    ]  # fmt: skip
    if method := quantization(contract.quantization, model_dir):
        found += ["--quantization", method]
    if contract.memory_utilization is not None:
        found += ["--gpu-memory-utilization", str(contract.memory_utilization)]
    found += ["--enforce-eager"] if contract.device == "cpu" else NOTHING_BUILT_FLAGS
    if runs_in_the_engine(contract):
        found += ["--distributed-executor-backend", IN_THE_ENGINE]
    # The one backend whose time the guard tries (mistral_node.grammars). vLLM would fall back to llguidance or outlines for what xgrammar does not
    # know (`multipleOf`, for which llguidance took 10 s and more; `patternProperties`), and stay with that for every later request.
    found += ["--structured-outputs-config.backend", GUIDANCE if _makes_grammars_of_chats(contract, model_dir) else "xgrammar"]
    if contract.tool_parser:
        found += ["--enable-auto-tool-choice", "--tool-call-parser", contract.tool_parser]
    if contract.adapters:
        found += [
            "--enable-lora",
            "--max-lora-rank",
            str(lora_rank),
            "--max-loras",
            str(lora_slots(len(contract.adapters), contract.device)),
            "--lora-modules",
        ]
        found += [f"{adapter}={folder}" for adapter, folder in contract.adapters]
    return found + list(contract.vllm_args)


def environment(contract: Contract, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the vLLM process: off the hub, our plugin alone, the cache's size on a CPU, nothing built with nvcc on a GPU."""
    sequences = str(Bounds(contract.max_model_len, contract.max_num_seqs).sequences)
    found = surroundings(contract, environ) | {
        "VLLM_MAX_N_SEQUENCES": sequences,  # the guard's bounds, once more
        "VLLM_MAX_COMPLETION_PROMPTS": sequences,
        "VLLM_PLUGINS": "mistral_swa",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if contract.device == "cuda":
        return NOTHING_BUILT | found
    # Our engines on a CPU are eager; what vLLM compiles nevertheless (the first log-probabilities) takes a C++ compiler and 15 s.
    found.setdefault("TORCH_COMPILE_DISABLE", "1")
    found["VLLM_CPU_KVCACHE_SPACE"] = str(contract.kv_cache_gib or 1)
    # Without this vLLM leaves one core to the system, which halves a machine with two. (OMP_NUM_THREADS is for a model in the engine's own
    # process, which binds no threads.)
    found.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(str(core) for core in sorted(os.sched_getaffinity(0))))
    return found


def check_installed() -> None:
    """LaunchError if vLLM would not find our plugin at all."""
    if not any(point.name == "mistral_swa" for point in entry_points(group="vllm.general_plugins")):
        raise LaunchError(Code.PLUGIN, "the plugin vllm-mistral is not installed on this node; run mistralctl up again")


def check_class() -> None:
    """LaunchError with the true cause if the model class cannot be loaded, which vLLM only mentions in its log.

    Imports vLLM, so it is asked only after vLLM has failed.
    """
    try:
        importlib.import_module("vllm_mistral").register()
        module, _, name = MODEL_CLASS.partition(":")
        getattr(importlib.import_module(module), name)
    except Exception as error:
        raise LaunchError(
            Code.PLUGIN, f"the model class {ARCHITECTURE} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def why_ended(cause: str) -> str:
    """Return what the last words of vLLM mean, where they say only that another process is gone; empty where they say more."""
    return WITHOUT_A_WORD if GONE.search(cause) else ""
