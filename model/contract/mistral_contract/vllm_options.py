"""Judge further options of `vllm serve` before vLLM is started: as vLLM's own parser would, and whether a deployment may have them.

`vllm_options.json` is what the parser of the pinned vLLM says of each option (`make vllm-options` writes it, and tests compare it).
Each of them is open, set by mistralctl itself, or closed for a reason; tests/plugin/test_vllm_options.py holds that none is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from mistral_contract.suggest import suggest

# What mistralctl sets itself, and what to use instead.
SET = {
    "--host": "mistralctl listens on 127.0.0.1 only, or with --public",
    "--port": "use --port",
    "--uds": "mistralctl serves on a port",
    "--api-key": "mistralctl makes a key itself",
    "--middleware": "the guard is mistralctl's own",
    "--root-path": "the guard's routes would not match",
    "--model": "use MODEL",
    "--hf-token": "a token in an argument is read by everybody; set HF_TOKEN or log in with hf auth login",
    "--hf-overrides": "the architecture is mistralctl's own",
    "--tokenizer": "the tokenizer comes with the model",
    "--tokenizer-mode": "the tokenizer comes with the model",
    "--tokenizer-revision": "the tokenizer comes with the model",
    "--trust-remote-code": "mistralctl never runs code that comes with weights",
    "--load-format": "only safetensors are served",
    "--config-format": "it follows from the weights",
    "--served-model-name": "use --served-model-name",
    "--max-model-len": "use --max-model-len",
    "--max-num-seqs": "use --max-concurrency",
    "--max-num-batched-tokens": "it follows from the window",
    "--tensor-parallel-size": "use --tensor-parallel",
    "--dtype": "use --dtype",
    "--quantization": "use --quantization",
    "--quantization-config": "use --quantization",
    "--lora-modules": "use --lora",
    "--enable-lora": "use --lora",
    "--max-lora-rank": "it follows from the adapters of --lora",
    "--max-loras": "it follows from the adapters of --lora",
    "--revision": "the table of models pins it",
    "--config": "use -f mistralctl.yaml",
    "--ssl-keyfile": "mistralctl makes certificates itself",
    "--ssl-certfile": "mistralctl makes certificates itself",
    "--ssl-ca-certs": "mistralctl makes certificates itself",
    "--ssl-cert-reqs": "clients show a key, not a certificate",
    "--ssl-ciphers": "mistralctl chooses them",
    "--enable-ssl-refresh": "a new certificate is a new up",
    "--allowed-origins": "the guard refuses other origins",
    "--allowed-methods": "the guard refuses other origins",
    "--allowed-headers": "the guard refuses other origins",
    "--allow-credentials": "the guard refuses other origins",
    "--h11-max-incomplete-event-size": "the guard limits requests itself",
    "--h11-max-header-count": "the guard limits requests itself",
    "--disable-access-log-for-endpoints": "mistralctl keeps its own checks of health out of the log",
    "--worker-extension-cls": "the launcher reads the engine through it",
    "--shutdown-timeout": "the launcher drains requests itself",
    "--distributed-executor-backend": "it follows from the machine",
    "--gpu-memory-utilization": "plan computes with it",
    "--tool-call-parser": "it follows from the model",
    "--enable-auto-tool-choice": "it follows from the model",
    "--chat-template": "it comes with the model",
}

# What a deployment may not have: options, by the reason.
CLOSED = {
    "the window is the model's": "disable-sliding-window disable-hybrid-kv-cache-manager swa-bounded-replay",
    "plan computes the memory with vLLM's default": (
        "kv-cache-dtype kv-cache-dtype-skip-layers kv-cache-memory-bytes num-gpu-blocks-override block-size cpu-offload-gb cpu-offload-params "
        "offload-backend offload-group-size offload-num-in-group offload-prefetch-step offload-params kv-offloading-size "
        "kv-offloading-backend enable-cumem-allocator max-cpu-loras lora-dtype"
    ),
    "the prefill chunks follow from the window": "enable-chunked-prefill max-num-scheduled-tokens",
    "use --max-concurrency": "max-num-active-seqs",
    "use --tensor-parallel: plan computes with no other way to share a model": (
        "pipeline-parallel-size decode-context-parallel-size prefill-context-parallel-size dcp-comm-backend dcp-q-replicate "
        "dcp-kv-cache-interleave-size cp-kv-cache-interleave-size enable-hc-sp enable-batch-sharded-sampling"
    ),
    "a deployment is one server on one machine": (
        "headless api-server-count data-parallel-size data-parallel-rank data-parallel-start-rank data-parallel-size-local "
        "data-parallel-address data-parallel-rpc-port data-parallel-backend data-parallel-hybrid-lb data-parallel-external-lb "
        "data-parallel-multi-port-external-lb data-parallel-supervisor-port dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s "
        "dp-supervisor-probe-failure-threshold dp-sync-interval disable-nccl-for-dp-synchronization master-addr master-port nnodes "
        "node-rank device-ids enable-elastic-ep elastic-ep-max-dp-size enable-fault-tolerance fault-tolerance-config "
        "aggregate-engine-logging kv-transfer-config ec-transfer-config ec-manager-config weight-transfer-config"
    ),
    "it opens a port or a route, which the guard keeps shut": (
        "grpc grpc-port enable-scale-out tokens-only enable-tokenizer-info-endpoint enable-offline-docs enable-sleep-mode "
        "sleep-mode-offload-cudagraph sleep-preserve-parameter-names enable-nccl-comm-suspend kv-events-config tool-server profiler-config"
    ),
    "the guard keeps /metrics and /load shut": (
        "enable-server-load-tracking show-hidden-metrics-for-version custom-histogram-buckets kv-cache-metrics kv-cache-metrics-sample "
        "per-request-spec-decode-metrics"
    ),
    "it sends what the server does to other machines": "otlp-traces-endpoint collect-detailed-traces",
    "it loads other code": (
        "logits-processors io-processor-plugin tool-parser-plugin reasoning-parser-plugin worker-cls scheduler-cls model-class-overrides "
        "model-impl code-revision model-loader-extra-config logging-config log-config-file additional-config"
    ),
    "it lets a request choose what the server loads or runs": (
        "trust-request-chat-template trust-request-mm-kwargs enable-prompt-embeds enable-mm-embeds allowed-local-media-path "
        "allowed-media-domains enable-trace-replay"
    ),
    "mistralctl pulls and checks the files itself": "hf-config-path download-dir ignore-patterns pt-load-map-location allow-deprecated-quantization",
    "the choice that serves without a compiler on the machine is vLLM's default": (
        "attention-backend attention-config kernel-config linear-backend moe-backend ir-op-priority enable-flashinfer-autotune "
        "gdn-prefill-backend kda-prefill-backend kda-decode-backend sparse-indexer-topk-backend"
    ),
    "prompts that are read at one time have equal shares of a step": "long-prefill-token-threshold long-prefill-token-threshold-adaptive",
    "it is for developers of vLLM": "ray-workers-use-nsight enable-layerwise-nvtx-tracing jit-monitor-mode jit-monitor-verbose cudagraph-metrics",
    "speculative decoding is not planned with": "speculative-config spec-method spec-model spec-tokens",
    "the models are served for text generation alone": "runner convert pooler-config skip-tokenizer-init enable-flash-late-interaction",
    "the models take text alone": (
        "language-model-only limit-mm-per-prompt media-io-kwargs mm-processor-kwargs mm-processor-cache-gb mm-processor-cache-type "
        "mm-hasher-algorithm mm-shm-cache-max-object-size-mb mm-encoder-only mm-encoder-tp-mode mm-encoder-attn-backend "
        "mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-path mm-encoder-fp8-scale-save-margin "
        "interleave-mm-strings skip-mm-profiling video-pruning-rate video-pruning-method mm-tensor-ipc mm-processor-device "
        "mm-ipc-gpu-memory-gb mm-device-do-normalize disable-chunked-mm-input default-mm-loras enable-tower-connector-lora"
    ),
    "the models have no experts": (
        "enable-expert-parallel enable-ep-weight-filter all2all-backend enable-dbo ubatch-size dbo-decode-token-threshold "
        "dbo-prefill-token-threshold enable-eplb eplb-config expert-placement-strategy enable-return-routed-experts "
        "enable-mixed-moe-lora-format enable-moe-shared-loras"
    ),
    "it is for other models": (
        "mamba-backend mamba-ssu-algorithm enable-mamba-cache-stochastic-rounding mamba-cache-philox-rounds mamba-cache-dtype "
        "mamba-ssm-cache-dtype mamba-block-size mamba-cache-mode enable-mamba-shared-prefix-checkpoint replayssm-buffer-len use-replayssm "
        "prefix-match-unit kv-sharing-fast-prefill disable-cascade-attn engram-config diffusion-config aux-output-config watermark-config "
        "max-lora-cls-labels cohere-is-reasoning-model cohere-format anthropic-disabled-thinking-effort return-sampling-mask "
        "enable-shm-tensor-arena"
    ),
}

OPEN = (
    "seed max-logprobs logprobs-mode use-fp64-gumbel enforce-eager generation-config override-generation-config renderer-num-workers "
    "safetensors-load-strategy safetensors-prefetch-num-threads safetensors-prefetch-block-size use-tqdm-on-load reasoning-parser "
    "reasoning-config distributed-timeout-seconds cpu-distributed-timeout-seconds numa-bind numa-bind-nodes numa-bind-cpus "
    "max-parallel-loading-workers disable-custom-all-reduce enable-prefix-caching prefix-caching-hash-algo prefix-cache-retention-interval "
    "fully-sharded-loras lora-target-modules specialize-active-lora log-level enable-mfu-metrics enable-logging-iteration-details "
    "max-num-queued-reqs max-num-queued-tokens scheduling-policy "
    "scheduler-reserve-full-isl watermark prefill-schedule-interval async-scheduling stream-interval cudagraph-capture-sizes "
    "max-cudagraph-capture-size compilation-config structured-outputs-config optimization-level performance-mode disable-log-stats "
    "fail-on-environ-validation enable-log-requests enable-log-outputs enable-log-deltas max-log-len log-error-stack uvicorn-log-level "
    "disable-uvicorn-access-log disable-fastapi-docs enable-request-id-headers chat-template-content-format default-chat-template-kwargs "
    "response-role return-tokens-as-token-ids exclude-tools-when-tool-choice-none tool-strict-level enable-prompt-tokens-details "
    "enable-per-request-metrics enable-force-include-usage sse-keep-alive-interval fingerprint-mode fingerprint-value"
).split()
# Keys of open options that load code or write files.
CLOSED_KEYS = {
    "--structured-outputs-config": ("reasoning_parser_plugin",),
    "--compilation-config": ("backend", "inductor_passes", "inductor_compile_config", "cache_dir", "debug_dump_path"),
}
# Options of which mistralctl sets a key on a GPU. vLLM 0.32's parser merges the keys of `--option.key` into one object, which it puts last.
BY_KEY = ("--compilation-config",)
# Keys that vLLM takes with some backends alone.
BACKENDS = {"disable_any_whitespace": ("xgrammar", "guidance"), "disable_additional_properties": ("guidance",)}

# What older versions had, and what is there today.
GONE = {
    "--disable-log-requests": "requests are logged with --enable-log-requests only",
    "--guided-decoding-backend": "write --structured-outputs-config.backend=NAME",
    "--swap-space": "nothing is swapped to the machine's memory any more",
    "--rope-scaling": "the positions are the model's (config.json)",
    "--rope-theta": "the positions are the model's (config.json)",
    "--num-scheduler-steps": "write --async-scheduling",
    "--max-seq-len-to-capture": "write --max-cudagraph-capture-size",
    "--cuda-graph-sizes": "write --cudagraph-capture-sizes",
    "--speculative-model": "speculative decoding is not planned with",
    "--num-speculative-tokens": "speculative decoding is not planned with",
    "--task": "the models are served for text generation alone",
    "--device": "it follows from the machine",
    "--enable-reasoning": "write --reasoning-parser=NAME",
    "--disable-frontend-multiprocessing": "the launcher needs the server as it is",
}


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    return found


@cache
def _names() -> dict[str, dict[str, Any]]:
    """Every spelling of every option, with what the parser says of it."""
    return {name: option for option in _data()["options"] for name in option["names"]}


@cache
def _reasons() -> dict[str, str]:
    return {f"--{name}": reason for reason, names in CLOSED.items() for name in names.split()}


def check(arguments: Iterable[str]) -> None:
    """ValueError with what is wrong with the first argument that may not follow `vllm serve`."""
    forms: dict[str, bool] = {}
    for argument in arguments:
        own, by_key = _check(argument)
        if forms.setdefault(own, by_key) is not by_key:
            raise ValueError(
                f"{own} is given as a whole and by a key, of which vLLM drops one; write each key as {own}.KEY=VALUE"
            )


def _check(argument: str) -> tuple[str, bool]:
    """The option that an argument means, and whether it sets one key of that; ValueError if it may not follow `vllm serve`."""
    name, equals, value = argument.partition("=")
    if any(ord(c) < 32 for c in argument) or len(argument) > 4096:
        raise ValueError(f"{name[:60]!r} has a control character or is longer than 4096 characters")
    if not re.fullmatch(r"--?[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise ValueError(f"{argument!r} is not an argument; write it in one piece, for example --seed=7")
    if not name.startswith("--"):
        raise ValueError(f"{argument!r} is a short argument{_long(name)}")
    # vLLM's parser takes underscores for hyphens, and --option.key=value for a key of a JSON object.
    head, dot, path = name.partition(".")
    spelling = _spelling(head.replace("_", "-"), name)
    option = _names()[spelling]
    own = next(found for found in option["names"] if found.startswith("--"))
    if own in SET:
        raise ValueError(f"{name} would set {own}, which mistralctl sets itself: {SET[own]}")
    if own in _reasons():
        raise ValueError(f"{name} is closed in a deployment: {_reasons()[own]}")
    if own.removeprefix("--") not in OPEN:  # its help
        raise ValueError(f"{name} is no option of a server")
    if "kind" not in option:
        if equals or dot:
            raise ValueError(f"{name} takes no value; write {spelling}")
        return own, False
    if not equals and (dot or not option.get("bare")):
        raise ValueError(f"{name} needs a value; write it in one piece, for example {name}=VALUE")
    if not equals:
        return own, False
    if own in BY_KEY and not dot:
        raise ValueError(f"{name}: mistralctl sets a key of it, and vLLM would drop the rest; write each key as {own}.KEY=VALUE")
    try:
        if dot:
            value = _nested(path, value)
        _check_value(option, own, value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} {error}") from None
    return own, bool(dot)


def _spelling(head: str, name: str) -> str:
    """The spelling of an option that an argument means: a whole one, or the only one that begins so."""
    known = _names()
    if head in known:
        return head
    version = _data()["vllm"]
    if head in GONE:
        raise ValueError(f"{name} is no option of vLLM {version}: {GONE[head]}")
    found = [spelling for spelling in known if spelling.startswith(head)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name} could be any of {', '.join(found[:4])}; write the whole name")
    near = suggest(head, known)
    raise ValueError(f"{name} is no option of vLLM {version}" + (f"; did you mean {near}?" if near else ""))


def _long(name: str) -> str:
    """What to write instead of a short argument: `-tp`, or `-O3` with its value behind it."""
    level = re.fullmatch(r"-O([0-9])", name)
    option = _names().get("--optimization-level" if level else name)
    if option is None:
        return "; write the long one, for example --seed=7"
    own = next(found for found in option["names"] if found.startswith("--"))
    if own in SET:
        return f" of {own}, which mistralctl sets itself: {SET[own]}"
    if own in _reasons():
        return f" of {own}, which is closed in a deployment: {_reasons()[own]}"
    return f" of {own}; write {own}={level[1] if level else 'VALUE'}"


def _nested(path: str, value: str) -> str:
    """The JSON object that vLLM's parser makes of `--option.path=value`."""
    keys = path.removesuffix("+").split(".")
    if path.endswith("+"):
        value = json.dumps(value.split(","))
    try:
        found = json.loads(value)
    except ValueError:
        try:
            found = _size(value)
        except (ValueError, OverflowError):
            found = value
    for key in reversed(keys):
        found = {key: found}
    return json.dumps(found)


def _size(text: str) -> int:
    """A whole number, or one with a decimal (k, m, g, t) or a binary suffix (K, M, G, T)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text.strip())
    if match is None:
        return int(text)
    power = "kmgt".index(match[2].lower()) + 1
    return int(float(match[1]) * 1000**power) if match[2].islower() else int(match[1]) * 1024**power


def _size_or_auto(text: str) -> int:
    return -1 if text.strip().lower() in ("-1", "auto") else _size(text)


def _object(text: str) -> dict[str, Any]:
    """A JSON object; numbers outside its strings may have a suffix."""
    parts = re.split(r'("(?:[^"\\]|\\.)*")', text)
    parts[::2] = [re.sub(r"\b\d+(?:\.\d+)?[kKmMgGtT]\b", lambda m: str(_size(m[0])), part) for part in parts[::2]]
    found = json.loads("".join(parts))
    if not isinstance(found, dict):
        raise ValueError
    return found


def _object_or_text(text: str) -> Any:
    return json.loads(text) if re.match(r"(?s)^\s*{.*}\s*$", text) else text


KINDS: dict[str, Callable[[str], Any]] = {
    "text": str, "a whole number": int, "a number": float, "JSON": json.loads, "a size like 64k": _size, "a size like 64k, or auto": _size_or_auto,
    "a JSON object": _object, "a JSON object or text": _object_or_text,
}  # fmt: skip


def _check_value(option: dict[str, Any], own: str, text: str) -> None:
    if option.get("optional") and text in ("", "None"):
        return
    kind = option["kind"]
    try:
        value = KINDS[kind](text)
    except (ValueError, OverflowError):
        raise ValueError(f"should be {kind}, not {text[:60]!r}") from None
    choices = option.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"should be one of {', '.join(map(str, choices))}, not {text[:60]!r}")
    for key in value if "keys" in option else ():
        if key in CLOSED_KEYS.get(own, ()):
            raise ValueError(f"may not set {key} in a deployment: it loads other code or writes files")
        if key not in option["keys"]:
            near = suggest(key, option["keys"])
            raise ValueError(f"has no key {key!r}" + (f"; did you mean {near}?" if near else ""))
        wanted = option["keys"][key]
        if isinstance(wanted, list) and value[key] is not None and not _is_one_of(value[key], wanted):
            raise ValueError(f"should have one of {', '.join(map(str, wanted))} as {key}, not {str(value[key])[:60]!r}")
        if isinstance(wanted, str) and value[key] is not None and not _is(value[key], wanted):
            raise ValueError(f"should have {wanted} as {key}, not {str(value[key])[:60]!r}")
        if value[key] and key in BACKENDS and value.get("backend") not in BACKENDS[key]:
            raise ValueError(f"needs the backend {' or '.join(BACKENDS[key])} beside {key}, in one JSON object")


def _is_one_of(value: Any, words: list[Any]) -> bool:
    return value in words or (isinstance(value, str) and value.upper() in words)


def _is(value: Any, kind: str) -> bool:
    """Whether pydantic takes a JSON value for a key of this kind, by its table of conversions."""
    if kind == "text":
        return isinstance(value, str)
    if kind == "true or false":
        said = str(value).lower() if isinstance(value, str) else value
        return said in (0, 1, "0", "1", "off", "on", "f", "t", "false", "true", "n", "y", "no", "yes")
    if not isinstance(value, (str, int, float)):
        return False
    try:
        number = float(value)
    except ValueError:
        return False
    return kind == "a number" or number.is_integer()
