"""The contract with the laptop: the MISTRALCTL_* variables, read and checked into one value (docs/contract.md)."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

from mistral_contract import vllm_options
from mistral_contract.quantization import METHODS

T = TypeVar("T")


class Code(IntEnum):
    """Exit codes of the launcher."""

    OK = 0
    CONTRACT = 10
    PLUGIN = 11
    WEIGHTS = 12
    ENGINE = 13
    CANARY = 14
    CLASS = 15
    SECRETS = 16


class LaunchError(Exception):
    """What is wrong and what to do, in one line, with the exit code of its kind."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


@dataclass(frozen=True)
class Contract:
    """What this node shall serve. Lengths are tokens, times minutes; None means no limit or not set."""

    name: str
    node_dir: Path
    device: str
    model: str
    weights_id: str
    served_name: str
    host: str
    port: int
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    sliding_window: int | None
    tensor_parallel: int
    dtype: str
    quantization: str | None
    memory_utilization: float | None
    kv_cache_gib: int | None
    tokenizer_mode: str
    tool_parser: str | None
    chat: bool
    lora: tuple[tuple[str, Path], ...]
    vllm_args: tuple[str, ...]
    idle_minutes: int | None
    ttl_minutes: int | None
    serving_id: str
    tls: str | None = None
    gated: bool = False
    serve_user: str | None = None

    @property
    def run_dir(self) -> Path:
        return self.node_dir / "run" / self.name

    @property
    def shared_dir(self) -> Path:
        """What launcher and vLLM both write: the counts, the engine's report, its routes, its certificate."""
        return self.run_dir / "shared"

    @property
    def weights_dir(self) -> Path:
        return self.node_dir / "weights" / self.weights_id


def _number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"should be a whole number from {low} to {high}")
        return int(text)

    return read


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"should be one of {', '.join(words)}")
        return text

    return read


def _matching(pattern: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"should match {pattern}")
        return text

    return read


def _share(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 0.99:
        raise ValueError("should be from 0.1 to 0.99")
    return value


def _strings(text: str) -> tuple[str, ...]:
    data = json.loads(text)
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise ValueError("should be a JSON list of strings")
    return tuple(data)


def _arguments(text: str) -> tuple[str, ...]:
    """Further arguments of `vllm serve`, without those that would undo the contract or the guard."""
    found = _strings(text)
    vllm_options.check(found)
    return found


def networks(text: str) -> tuple[str, ...]:
    """A JSON list of networks in CIDR notation."""
    found = _strings(text)
    for item in found:
        ipaddress.ip_network(item)
    return found


def _names(text: str) -> tuple[str, ...]:
    data = json.loads(text)
    if not isinstance(data, dict) or not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key) for key in data):
        raise ValueError("should be a JSON object of adapter names")
    return tuple(data)


def read(environ: Mapping[str, str]) -> Contract:
    """The contract; LaunchError with every variable that is wrong, in one line."""
    problems: list[str] = []

    def get(name: str, parse: Callable[[str], T], default: Any = ...) -> Any:
        text = environ.get(f"MISTRALCTL_{name}", "")
        if text == "" and default is not ...:
            return default
        try:
            if text == "":
                raise ValueError("is missing")
            return parse(text)
        except (ValueError, RecursionError) as error:
            problems.append(f"MISTRALCTL_{name} {error}")
            return None

    name = get("NAME", _matching(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"))
    node_dir = get("NODE_DIR", lambda text: Path(text).expanduser().absolute())
    adapters = get("LORA", _names, ())
    values: dict[str, Any] = {
        "device": get("DEVICE", _one_of("cuda", "cpu")),
        "model": get("MODEL", str),
        "weights_id": get("WEIGHTS_ID", _matching(r"[A-Za-z0-9][A-Za-z0-9._-]*")),
        "served_name": get("SERVED_NAME", str),
        "host": get("HOST", str),
        "port": get("PORT", _number(1, 65535)),
        "max_model_len": get("MAX_MODEL_LEN", _number(1, 1 << 24)),
        "max_num_seqs": get("MAX_NUM_SEQS", _number(1, 1 << 16)),
        "max_batched_tokens": get("MAX_BATCHED_TOKENS", _number(1, 1 << 20)),
        "sliding_window": get("SLIDING_WINDOW", _number(1, 1 << 24), None),
        "tensor_parallel": get("TENSOR_PARALLEL", _number(1, 64)),
        "dtype": get("DTYPE", _one_of("auto", "bfloat16", "float16", "float32")),
        "quantization": get("QUANTIZATION", _one_of(*METHODS), None),
        "memory_utilization": get("MEMORY_UTILIZATION", _share, None),
        "kv_cache_gib": get("KV_CACHE_GIB", _number(1, 4096), None),
        "tokenizer_mode": get("TOKENIZER_MODE", _one_of("mistral", "hf")),
        "tool_parser": get("TOOL_PARSER", _matching(r"[a-z0-9_]+"), None),
        "chat": get("CHAT_TEMPLATE", _one_of("own", "none")) == "own",
        "vllm_args": get("VLLM_ARGS", _arguments, ()),
        "idle_minutes": get("IDLE_MINUTES", _number(1, 1 << 20), None),
        "ttl_minutes": get("TTL_MINUTES", _number(1, 1 << 20), None),
        "serving_id": environ.get("MISTRALCTL_SERVING_ID", ""),
        "tls": get("TLS", _matching(r"self-signed|own-[0-9a-f]{12}"), None),
        "gated": get("GATE", _one_of("probe"), None) is not None,
        "serve_user": get("SERVE_USER", _matching(r"[a-z][a-z0-9-]{0,30}"), None),
    }
    get("ALLOW", networks, ())
    if values["host"] not in ("127.0.0.1", None) and not values["tls"]:
        problems.append(f"MISTRALCTL_HOST {values['host']} is reached from elsewhere and needs MISTRALCTL_TLS")
    if problems:
        raise LaunchError(Code.CONTRACT, "; ".join(problems) + "; start the deployment with mistralctl up")
    lora = tuple((adapter, node_dir / "run" / name / "lora" / adapter) for adapter in adapters)
    return Contract(name=name, node_dir=node_dir, lora=lora, **values)
