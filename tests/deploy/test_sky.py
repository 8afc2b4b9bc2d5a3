"""Every rendered task goes through the real SkyPilot: parser, resources, file mounts, optimizer; no cloud, no account."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mistralctl import checkpoints, images, package_dir, plan, prices, tasks
from mistralctl.config import load
from mistralctl.tasks import finetune, serve
from test_finetune_command import CASES as FINETUNES
from test_finetune_command import planned
from test_mirror import CASES as MIRRORS
from test_mirror import rendered as mirror_rendered
from test_task import CASES

pytestmark = pytest.mark.slow  # SkyPilot takes its time to begin
RUNS = [name for name in FINETUNES if name != "finetune-local"]
CLOUD_CASES = [name for name in CASES if name != "local"]


def run(home: Path, script: str, *arguments: Path) -> list[str]:
    """The lines that a script beside this file prints, which asks SkyPilot in a process of its own, with that home and no account."""
    env = {
        "HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    checkout = package_dir("model").parent
    done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SkyPilot says of each task, by name."""
    folder = tmp_path_factory.mktemp("sky")
    upload = folder / "weights"
    upload.mkdir()
    files = []
    for name in CLOUD_CASES:
        sourced = load(CASES[name], {}, None)
        made = plan.make(sourced, checkpoints.resolve(sourced), None)
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(tasks.dump(serve.render(made, owner="0123456789ab")), "utf-8")
    for name in MIRRORS:
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(tasks.dump(mirror_rendered(name)), "utf-8")
    (folder / "chats.jsonl").write_text("{}", "utf-8")
    for name in RUNS:
        files.append(folder / f"{name}.yaml")
        run_of = replace(planned(name), data=str(folder / "chats.jsonl"), eval_data="")
        files[-1].write_text(tasks.dump(finetune.render(run_of, owner="0123456789ab")), "utf-8")
    for name in ("serve.yaml", "mirror.yaml", "finetune.yaml"):
        files.append(folder / name)
        files[-1].write_text((package_dir("task_templates") / name).read_text("utf-8"), "utf-8")
    (folder / "broken.yaml").write_text(files[0].read_text("utf-8").replace("resources:", "resorces:"), "utf-8")
    files.append(folder / "broken.yaml")
    found = [
        json.loads(line.removeprefix("accepted "))
        for line in run(folder, "sky_accepts.py", *files)
        if line.startswith("accepted ")
    ]
    return {entry.pop("task"): entry for entry in found}


@pytest.mark.parametrize("name", CLOUD_CASES)
def test_skypilot_accepts_the_task_and_chooses_what_the_plan_chose(name: str, accepted: dict[str, dict[str, Any]]) -> None:
    got = accepted[name]
    assert "error" not in got
    sourced = load(CASES[name], {}, None)
    chosen = plan.make(sourced, checkpoints.resolve(sourced), None).chosen
    assert got["cloud"] == chosen.cloud
    entry = serve.render(plan.make(sourced, checkpoints.resolve(sourced), None), owner="x")["resources"]
    entry = entry.get("any_of", [entry])[0]
    assert list((got["image"] or {None: None}).values()) == [entry.get("image_id")]
    if chosen.accelerator:
        assert got["accelerators"] == {chosen.accelerator: chosen.count}
        assert got["price"] == pytest.approx(chosen.spot_price if sourced.spec.spot else chosen.price, abs=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_skypilot_accepts_a_run_of_training_and_takes_the_machine_by_which_it_costs_least(
    name: str, accepted: dict[str, dict[str, Any]]
) -> None:
    got, chosen = accepted[name], planned(name).chosen
    assert "error" not in got
    assert (got["cloud"], got["instance_type"]) == (chosen.cloud, chosen.instance_type)


@pytest.mark.parametrize("name", MIRRORS)
def test_skypilot_accepts_a_mirror_on_a_cheap_machine_of_the_buckets_cloud(
    name: str, accepted: dict[str, dict[str, Any]]
) -> None:
    got = accepted[name]
    assert "error" not in got
    assert got["cloud"] == {"s3": "aws", "gs": "gcp", "az": "azure"}[MIRRORS[name][1].partition(":")[0]]
    assert (got["accelerators"], got["price"] < (0.5 if name == "mirror-canary" else 0.3)) == (None, True)
    if MIRRORS[name][3:]:
        assert got["region"] == MIRRORS[name][3]


def test_the_templates_as_they_stand_are_accepted(accepted: dict[str, dict[str, Any]]) -> None:
    assert accepted["serve"]["accelerators"] == {"L4": 1}
    assert (accepted["mirror"]["cloud"], accepted["mirror"]["accelerators"]) == ("aws", None)


@pytest.fixture(scope="module")
def takes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SkyPilot takes for each machine of the catalog: its `images` and `machines`."""
    lines = run(tmp_path_factory.mktemp("sky"), "sky_images.py")
    return {word: json.loads(rest) for word, _, rest in (line.partition(" ") for line in lines) if word in ("images", "machines")}


def test_the_catalog_has_the_machine_that_skypilot_takes_for_each_gpu_and_count(takes: dict[str, dict[str, Any]]) -> None:
    for cloud, found in takes["machines"].items():
        assert found
        for label, types in found.items():
            if cloud == "gcp" and label.startswith(("T4", "V100")):
                continue  # GCP puts these into any n1 machine, and Mistral 7B fits neither
            sold = [offer for offer in prices.offers(cloud) if f"{offer.accelerator}:{offer.count}" == label]
            assert min(sold, key=lambda offer: offer.price).instance_type == types[0], (cloud, label)


def test_the_table_of_images_has_what_skypilot_takes_for_each_machine(takes: dict[str, dict[str, Any]]) -> None:
    found = takes["images"]
    for cloud in images.known():
        for offer in prices.offers(cloud):
            by = offer.accelerator if cloud == "gcp" else offer.instance_type
            if by:
                assert found[cloud][by] == images.skypilots(cloud, offer.accelerator), (cloud, by)


def test_a_misspelt_key_would_have_been_noticed(accepted: dict[str, dict[str, Any]]) -> None:
    assert "error" in accepted["broken"]
