"""From a plan to the task of a server: the template with only data set on it, so that the scripts in it are run as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from mistral_contract import envs, files
from mistral_contract.engines import ENGINES
from mistral_contract.envs import Serve

from mistralctl import images, package_dir
from mistralctl.clouds import facts
from mistralctl.errors import UserError
from mistralctl.fit import MEMORY_UTILIZATION, disk_bytes
from mistralctl.gpus import GIB
from mistralctl.plan import SMALLEST_CPU_NODE, Plan
from mistralctl.tasks import NODE_DIR, NODE_PORT, NODE_PYTHON, SETUP_MINUTES, Kind, Task, digest, environment_id, tree

KIND = Kind("serve", "a server", serves=True)
SERVE_USER = "mistralctl-serve"
AUTOSTOP_MINUTES = 5
# The system's image, vLLM's environment with CUDA (about 12 GB) and twice the weights: pulled, and room to convert.
DISK_BASE_GIB = 64
UNKNOWN_GIB = 16


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
        if tier := spec.disk_tier or (facts(option.cloud).disk_tier if option.accelerator else None):
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
    life = plan.life_minutes
    return {
        "mistralctl-name": plan.name,
        "mistralctl-owner": owner,
        "mistralctl-resources": digest(wanted),
        "mistralctl-ttl": "never" if life is None else str(life),
    }


def _tls(plan: Plan, certificate_id: str) -> str | None:
    """How the server comes by its certificate; None where it speaks plain HTTP on its loopback."""
    if not plan.spec.public:
        return None
    return f"own-{certificate_id}" if plan.spec.cert else "self-signed"


@dataclass(frozen=True)
class Node:
    """What a server runs in: the node's folder, its port (None: the usual one), the Python of vLLM's environment.

    `certificate_id` is a hash of the user's own certificate, where there is one.
    """

    folder: str = NODE_DIR
    port: int | None = None
    python: str = NODE_PYTHON
    certificate_id: str = ""


RENTED = Node()


def _envs(plan: Plan, node: Node, weights: str, lora: Mapping[str, str]) -> dict[str, str]:
    spec, model = plan.spec, plan.model
    serve = Serve(
        name=plan.name,
        node_dir=Path(node.folder),
        device=plan.device,
        engine=spec.engine,
        python=node.python,
        env_id=environment_id(plan.device, node.python),
        model=model.name if model.shape else "custom",
        weights=weights,
        revision=plan.revision,
        weights_digest=plan.weights_digest,
        weights_id=plan.weights_id,
        served_name=plan.served_model_name,
        host="0.0.0.0" if spec.public else "127.0.0.1",  # noqa: S104 - asked for, with TLS
        port=node.port or node_port(plan),
        tls=_tls(plan, node.certificate_id),
        allow=tuple(spec.allow),
        serve_user=None if plan.local else SERVE_USER,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_batched_tokens=plan.max_batched_tokens,
        sliding_window=plan.sliding_window,
        tensor_parallel=plan.tensor_parallel,
        dtype=plan.dtype,
        quantization=spec.quantization,
        memory_utilization=MEMORY_UTILIZATION if plan.device == "cuda" else None,
        kv_cache_gib=plan.kv_cache_gib if plan.device == "cpu" else None,
        tokenizer_mode=model.tokenizer_mode,
        tool_parser=model.tool_parser if ENGINES[spec.engine].tools else None,
        chat_template="own" if model.chat else "none",
        lora=dict(lora),
        lora_versions=dict(plan.lora_versions),
        vllm_args=tuple(spec.vllm_args),
        idle_minutes=plan.idle_minutes,
        ttl_minutes=plan.ttl_minutes,
        setup_minutes=None if plan.local else SETUP_MINUTES,
        budget=spec.budget,
        price=plan.price,
        restart=spec.restart,
        keys_uri=spec.keys_uri,
    )
    try:
        options = {**envs.write(serve), **plan.endpoints}
    except ValueError as error:
        raise UserError(f"{plan.name}: the node would refuse {error}; change the option that it comes from") from error
    served = {name: value for name, value in options.items() if name != envs.variable("weights_digest")}
    return options | {envs.variable("serving_id"): digest([served, tree(package_dir("model"))])}


def render(plan: Plan, *, owner: str, node: Node = RENTED) -> Task:
    """The task of a plan: plain data that SkyPilot accepts whole, and that the local runtime runs as well."""
    task: Task = yaml.safe_load((package_dir("task_templates") / "serve.yaml").read_text("utf-8"))
    local = plan.local
    run_dir = f"{node.folder}/{files.RUN.of(plan.name)}"
    weights, mounts = plan.weights, {f"{run_dir}/{files.MODEL.name}": str(package_dir("model"))}
    if weights.startswith("file://") and not local:  # a folder of this machine travels with the task
        folder, one = unquote(weights.removeprefix("file://")), weights.rpartition("/")[2] if weights.endswith(".gguf") else ""
        links = dict(plan.model.stored.links) or ({one: folder} if one else {})
        upload = f"{run_dir}/{files.UPLOAD.name}"
        mounts |= {f"{upload}/{name}": path for name, path in links.items()} or {upload: folder}
        weights = f"file://{upload}" + (f"/{one}" if one else "")
    lora = dict(plan.spec.lora)
    for adapter, uri in plan.spec.lora.items():
        if uri.startswith("file://") and not local:
            target = f"{run_dir}/{files.ADAPTERS.name}/{adapter}"
            mounts[target] = unquote(uri.removeprefix("file://"))
            lora[adapter] = f"file://{target}"
    wanted = {} if local else _resources(plan)
    labels = {} if local else {"labels": _labels(plan, wanted, owner)}
    if plan.price is not None:  # no part of what the machine is told apart by: it may get a budget later
        wanted["max_hourly_cost"] = plan.price
    task["name"] = plan.name
    task["resources"] = wanted | labels
    task["envs"] = _envs(plan, node, weights, lora)
    task["file_mounts"] = mounts
    return task
