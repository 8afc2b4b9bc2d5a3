"""Rendered tasks as a whole, against golden files: only the folder of the package is replaced by a word.

`python -m pytest tests/deploy/test_task.py --golden` writes them anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mistralctl import checkpoints, package_dir, plan, tasks
from mistralctl.config import load
from mistralctl.gpus import GIB
from mistralctl.machine import Machine
from mistralctl.tasks import serve

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, dict[str, Any]] = {
    "aws": {"cloud": ["aws"]},
    "gcp": {"cloud": ["gcp"]},
    "azure": {"cloud": ["azure"]},
    "any": {},
    "spot": {"cloud": ["gcp"], "region": "us-central1", "zone": "us-central1-a", "spot": True, "max_price": 2.5},
    "cpu": {"model": "smollm2-135m-instruct"},
    "every-option": {
        "model": "mistral-7b-instruct-v0.3", "name": "tools", "cloud": ["aws", "azure"], "accelerators": "A100-80GB:8",
        "max_price": 40, "weights": "s3://bucket/v03", "max_model_len": 16384, "max_concurrency": 12, "dtype": "float16",
        "quantization": "fp8", "lora": {"sql": "s3://bucket/sql", "chat": "hf://someone/chat"}, "served_model_name": "m",
        "vllm_args": ["--seed=7", "--enable-log-requests"], "idle": "2h", "ttl": "never", "restart": 5,
        "keys_uri": "s3://bucket/team/keys.json",
    },
    "images": {
        "cloud": ["aws", "gcp", "azure"], "max_price": 4.0, "disk_tier": "best",
        "image": {"gcp": "projects/mine/global/images/gpu-580", "azure": "microsoft-dsvm:ubuntu-hpc:2204:22.04.2026082801"},
    },
    "public": {"model": "smollm2-135m-instruct", "cloud": ["gcp"], "public": True, "allow": ["203.0.113.0/24", "198.51.100.7"], "port": 8443},
    "local": {"model": "smollm2-135m-instruct", "cloud": ["local"], "port": 8123},
}  # fmt: skip


def rendered(name: str) -> tasks.Task:
    sourced = load(CASES[name], {}, None)
    made = plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2))
    if name == "local":
        return serve.render(made, owner="0123456789ab", node=serve.Node("/node", 8123, "3.11"))
    return serve.render(made, owner="0123456789ab")


@pytest.mark.parametrize("name", CASES)
def test_rendered_task(name: str, request: pytest.FixtureRequest) -> None:
    text = tasks.dump(rendered(name)).replace(str(package_dir("model").parent), "PACKAGE")
    serving = rendered(name)["envs"]["MISTRALCTL_SERVING_ID"]
    environment = rendered(name)["envs"]["MISTRALCTL_ENV_ID"].split("-")[1]
    text = re.sub(f"'?{serving}'?", "HASH-OF-OPTIONS-AND-SOURCES", text)  # quoted where a hash happens to look like a number
    text = text.replace(environment, "HASH-OF-REQUIREMENTS")
    file = GOLDEN / f"{name}.yaml"
    if request.config.getoption("--golden"):
        file.write_text(text, "utf-8")
    assert text == file.read_text("utf-8")


def test_only_data_is_set_on_the_template() -> None:
    template = yaml.safe_load((package_dir("task_templates") / "serve.yaml").read_text("utf-8"))
    got = rendered("every-option")
    assert got.keys() == template.keys()
    assert (got["setup"], got["run"]) == (template["setup"], template["run"])
    assert got["envs"].keys() == template["envs"].keys()


def test_the_dump_is_read_back_as_it_was() -> None:
    for name in CASES:
        assert yaml.safe_load(tasks.dump(rendered(name))) == rendered(name)


def test_the_contract_page_names_every_env_and_no_other() -> None:
    page = (package_dir("model").parent / "docs" / "contract.md").read_text("utf-8")
    envs = set(rendered("local")["envs"])
    for template in package_dir("task_templates").glob("*.yaml"):
        envs |= set(yaml.safe_load(template.read_text("utf-8"))["envs"])
    rows = [line for line in page.splitlines() if line.startswith("| `MISTRALCTL_")]
    named = {word.strip("`") for row in rows for word in row.split("|")[1].replace(",", " ").split()}
    assert named == envs


def test_a_gpu_gets_a_faster_disk_where_that_is_cheap_and_a_tier_that_was_asked_for_is_every_machines() -> None:
    def tiers(**flags: Any) -> dict[str, str | None]:
        wanted = rendered_with(**flags)["resources"]
        return {entry["infra"]: entry.get("disk_tier") for entry in wanted.get("any_of", [wanted])}

    assert tiers(cloud=["aws", "gcp", "azure"]) == {"aws": "high", "gcp": "high", "azure": None}
    assert tiers(model="smollm2-135m-instruct", cloud=["aws", "gcp", "azure"]) == {"aws": None, "gcp": None, "azure": None}
    for tier in ("low", "medium", "high", "best"):
        assert tiers(disk_tier=tier, cloud=["aws", "azure"]) == {"aws": tier, "azure": tier}
        assert tiers(disk_tier=tier, model="smollm2-135m-instruct", cloud=["gcp"]) == {"gcp": tier}
    one, other = (rendered_with(disk_tier=tier) for tier in ("high", "low"))
    assert tasks.resources_id(one) != tasks.resources_id(other)


def rendered_with(**flags: Any) -> tasks.Task:
    sourced = load({"cloud": ["aws"]} | flags, {}, None)
    return serve.render(plan.make(sourced, checkpoints.resolve(sourced), None), owner="x")


def test_labels_obey_the_strictest_cloud() -> None:
    import re

    for name in ("aws", "every-option", "cpu"):
        for key, value in rendered(name)["resources"]["labels"].items():
            assert re.fullmatch(r"[a-z0-9_-]{1,63}", key)
            assert re.fullmatch(r"[a-z0-9_-]{1,63}", value)


def test_the_serving_hash_changes_with_any_option_of_serving() -> None:
    base = load({"model": "smollm2-135m-instruct"}, {}, None)
    seen = set()
    for change in ({}, {"max_model_len": 512}, {"idle": "never"}, {"vllm_args": ("--seed=7",)}, {"dtype": "bfloat16"}):
        spec = base.spec.model_copy(update=change)
        made = plan.make(type(base)(spec, {}), checkpoints.resolve(base), None)
        seen.add(serve.render(made, owner="x")["envs"]["MISTRALCTL_SERVING_ID"])
    assert len(seen) == 5
