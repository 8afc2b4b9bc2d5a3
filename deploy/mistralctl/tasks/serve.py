"""From a plan to the task of a server: the template with only data set on it, so that the scripts in it are run as they were written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import yaml

from mistralctl import images, package_dir
from mistralctl.clouds import DISK_TIERS
from mistralctl.fit import MEMORY_UTILIZATION, disk_bytes
from mistralctl.gpus import GIB
from mistralctl.plan import SMALLEST_CPU_NODE, Plan
from mistralctl.tasks import NODE_DIR, NODE_PORT, NODE_PYTHON, Kind, Task, digest, environment_id, tree

KIND = Kind("serve", "a server", serves=True)
SERVE_USER = "mistralctl-serve"
AUTOSTOP_MINUTES = 5
# The system's image, vLLM's environment with CUDA (about 12 GB) and twice the weights: pulled, and room to convert.
DISK_BASE_GIB = 64
UNKNOWN_GIB = 16


def _text_or_empty(value: object) -> str:
    return "" if value is None else str(value)


def node_port(plan: Plan) -> int:
    """Where the server listens on a node in a cloud; through a tunnel nobody sees which port that is."""
    return (plan.spec.port if plan.spec.public else None) or NODE_PORT


def _resources(plan: Plan) -> dict[str, Any]:
    spec = plan.spec
    weights_gib = disk_bytes(plan.model.shape, plan.model.stored) / GIB if plan.model.shape else UNKNOWN_GIB
    if plan.model.shape and "://" in spec.model:  # known only by a look
        weights_gib = max(weights_gib, UNKNOWN_GIB)
    found: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for option in plan.options:
        place = "/".join(part for part in (option.cloud, spec.region, spec.zone) if part)
        entry: dict[str, Any] = {"infra": place}
        if option.accelerator:
            entry["accelerators"] = f"{option.accelerator}:{option.count}"
        else:
            entry |= {"cpus": f"{SMALLEST_CPU_NODE[0]}+", "memory": f"{SMALLEST_CPU_NODE[1]}+"}
        if image := images.asked_for(option.cloud, option.accelerator, spec.images.get(option.cloud)):
            entry["image_id"] = image
        if tier := spec.disk_tier or (DISK_TIERS.get(option.cloud) if option.accelerator else None):
            entry["disk_tier"] = tier
        if entry not in entries:
            entries.append(entry)
    if len(entries) == 1:
        found |= entries[0]
    else:
        found["any_of"] = entries
    found["disk_size"] = DISK_BASE_GIB + 2 * max(1, round(weights_gib))
    if spec.spot:
        found["use_spot"] = True
    if spec.public:
        found["ports"] = [node_port(plan)]
    if spec.max_price is not None:
        found["max_hourly_cost"] = spec.max_price
    found["autostop"] = {"idle_minutes": AUTOSTOP_MINUTES, "down": True, "wait_for": "jobs"}
    return found


def _labels(plan: Plan, wanted: dict[str, Any], owner: str) -> dict[str, str]:
    ttl = plan.ttl_minutes
    return {
        "mistralctl-name": plan.name,
        "mistralctl-owner": owner,
        "mistralctl-resources": digest(wanted),
        "mistralctl-ttl": "never" if ttl is None else str(ttl),
    }


def _tls(plan: Plan, certificate_id: str) -> str:
    """How the server comes by its certificate; empty where it speaks plain HTTP on its loopback."""
    if not plan.spec.public:
        return ""
    return f"own-{certificate_id}" if plan.spec.cert else "self-signed"


def _envs(
    plan: Plan, node_dir: str, port: int, python: str, weights: str, lora: Mapping[str, str], certificate_id: str
) -> dict[str, str]:
    spec, model = plan.spec, plan.model
    envs = {
        "MISTRALCTL_NAME": plan.name,
        "MISTRALCTL_NODE_DIR": node_dir,
        "MISTRALCTL_DEVICE": plan.engine,
        "MISTRALCTL_PYTHON": python,
        "MISTRALCTL_ENV_ID": environment_id(plan.engine, python),
        "MISTRALCTL_MODEL": model.name if model.shape else "custom",
        "MISTRALCTL_WEIGHTS": weights,
        "MISTRALCTL_REVISION": plan.revision,
        "MISTRALCTL_WEIGHTS_ID": plan.weights_id,
        "MISTRALCTL_SERVED_NAME": plan.served_model_name,
        "MISTRALCTL_HOST": "0.0.0.0" if spec.public else "127.0.0.1",  # noqa: S104 - asked for, with TLS
        "MISTRALCTL_PORT": str(port),
        "MISTRALCTL_TLS": _tls(plan, certificate_id),
        "MISTRALCTL_ALLOW": json.dumps(list(spec.allow)),
        "MISTRALCTL_GATE": "probe",
        "MISTRALCTL_SERVE_USER": "" if plan.local else SERVE_USER,
        "MISTRALCTL_MAX_MODEL_LEN": str(plan.max_model_len),
        "MISTRALCTL_MAX_NUM_SEQS": str(plan.max_num_seqs),
        "MISTRALCTL_MAX_BATCHED_TOKENS": str(plan.max_batched_tokens),
        "MISTRALCTL_SLIDING_WINDOW": _text_or_empty(plan.sliding_window),
        "MISTRALCTL_TENSOR_PARALLEL": str(plan.tensor_parallel),
        "MISTRALCTL_DTYPE": plan.dtype,
        "MISTRALCTL_QUANTIZATION": _text_or_empty(spec.quantization),
        "MISTRALCTL_MEMORY_UTILIZATION": str(MEMORY_UTILIZATION) if plan.engine == "cuda" else "",
        "MISTRALCTL_KV_CACHE_GIB": str(plan.kv_cache_gib) if plan.engine == "cpu" else "",
        "MISTRALCTL_TOKENIZER_MODE": model.tokenizer_mode,
        "MISTRALCTL_TOOL_PARSER": _text_or_empty(model.tool_parser),
        "MISTRALCTL_CHAT_TEMPLATE": "own" if model.chat else "none",
        "MISTRALCTL_LORA": json.dumps(lora),
        "MISTRALCTL_LORA_VERSIONS": json.dumps(dict(plan.lora_versions)),
        "MISTRALCTL_VLLM_ARGS": json.dumps(list(spec.vllm_args)),
        "MISTRALCTL_IDLE_MINUTES": _text_or_empty(plan.idle_minutes),
        "MISTRALCTL_TTL_MINUTES": _text_or_empty(plan.ttl_minutes),
    }
    envs |= plan.endpoints
    sources = tree(package_dir("model"))
    return envs | {"MISTRALCTL_SERVING_ID": digest([envs, sources])}


def render(
    plan: Plan,
    *,
    owner: str,
    node_dir: str = NODE_DIR,
    port: int | None = None,
    python: str = NODE_PYTHON,
    certificate_id: str = "",
) -> Task:
    """The task of a plan: plain data that SkyPilot accepts whole, and that the local runtime runs as well.

    `certificate_id` is a hash of the user's own certificate, where there is one.
    """
    task: Task = yaml.safe_load((package_dir("task_templates") / "serve.yaml").read_text("utf-8"))
    local = plan.local
    run_dir = f"{node_dir}/run/{plan.name}"
    weights, mounts = plan.weights, {f"{run_dir}/model": str(package_dir("model"))}
    if weights.startswith("file://") and not local:  # a folder of this machine travels with the task
        folder, one = unquote(weights.removeprefix("file://")), weights.rpartition("/")[2] if weights.endswith(".gguf") else ""
        files = dict(plan.model.stored.links) or ({one: folder} if one else {})
        mounts |= {f"{run_dir}/upload/{name}": path for name, path in files.items()} or {f"{run_dir}/upload": folder}
        weights = f"file://{run_dir}/upload" + (f"/{one}" if one else "")
    lora = dict(plan.spec.lora)
    for adapter, uri in plan.spec.lora.items():
        if uri.startswith("file://") and not local:
            mounts[f"{run_dir}/adapters/{adapter}"] = unquote(uri.removeprefix("file://"))
            lora[adapter] = f"file://{run_dir}/adapters/{adapter}"
    wanted = {} if local else _resources(plan)
    task["name"] = plan.name
    task["resources"] = {} if local else wanted | {"labels": _labels(plan, wanted, owner)}
    task["envs"] = _envs(plan, node_dir, port or node_port(plan), python, weights, lora, certificate_id)
    task["file_mounts"] = mounts
    return task
