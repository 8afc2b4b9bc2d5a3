"""The simulated Google Cloud: the real SkyPilot launches on it, with Google's own libraries, and nothing stays behind."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployments import simulated
from simcloud import SimCloud

# What the laptop runs with Google's own library: a call, its answer as JSON or the error's reason.
CALL = """
import json, sys
import google.auth, googleapiclient.discovery, googleapiclient.errors
from google.auth.exceptions import RefreshError
credentials, project = google.auth.default()
compute = googleapiclient.discovery.build("compute", "v1", credentials=credentials, cache_discovery=False)
try:
    print(json.dumps(eval(sys.argv[1]).execute()))
except googleapiclient.errors.HttpError as error:
    print(json.dumps({"refused": error.status_code, "reason": error.error_details[0]["reason"]}))
except RefreshError as error:
    print(json.dumps({"refused": error.args[1]["error"]}))
"""
BODY = """{
    "name": %r, "machineType": "zones/us-central1-a/machineTypes/n2-standard-4", "labels": {"who": "hand"}, "scheduling": %r,
    "networkInterfaces": [{"network": "global/networks/default"}], "disks": [{"boot": True, "autoDelete": %r, "initializeParams": {"labels": %r}}],
}"""


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    """What is called here by hand needs no role."""
    with simulated(tmp_path_factory.mktemp("gcp"), ["gcp"]) as sim:
        yield sim


def call(sim: SimCloud, expression: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sim.run([sys.executable, "-c", CALL, expression]).stdout)
    return found


def by_hand(
    sim: SimCloud, name: str, spot: bool = False, keep_disk: bool = False, disk_labels: dict[str, str] | None = None
) -> dict[str, Any]:
    """What became of the operation that makes an instance."""
    scheduling = {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE", "preemptible": True} if spot else {}
    body = BODY % (name, scheduling, not keep_disk, disk_labels or {})
    made = call(sim, f"compute.instances().insert(project=project, zone='us-central1-a', body={body})")
    if "refused" in made:
        return made
    return call(sim, f"compute.zoneOperations().wait(project=project, zone='us-central1-a', operation={made['name']!r})")


def test_faults_have_the_codes_of_google(sim: SimCloud) -> None:
    for kind, found in (
        ("capacity", "ZONE_RESOURCE_POOL_EXHAUSTED"), ("quota", "QUOTA_EXCEEDED"), ("permission", "forbidden"),
        ("throttle", "rateLimitExceeded"), ("no_api", "accessNotConfigured"), ("credentials", "invalid_grant"),
    ):  # fmt: skip
        sim.fault("gcp", kind)
        done = by_hand(sim, "refused")
        codes = [one["code"] for one in done.get("error", {}).get("errors", [])]
        assert [*codes, done.get("reason"), done.get("refused")].count(found) == 1
        assert sim.instances("gcp") == []
        sim.clear_faults()
    sim.quota("gcp", "N2_CPUS", 3, region="us-central1")
    [error] = by_hand(sim, "refused")["error"]["errors"]
    assert error == {"code": "QUOTA_EXCEEDED", "message": "Quota 'N2_CPUS' exceeded.  Limit: 3.0 in region us-central1."}
    sim.clear_faults()


def test_a_gpu_quota_of_zero_is_known_without_an_attempt(sim: SimCloud, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("resources:\n  infra: gcp/us-east4\n  accelerators: L4:1\nrun: 'true'\n")
    sim.quota("gcp", "NVIDIA_L4_GPUS", 0, region="us-east4")
    refused = sim.run(["sky", "launch", "-y", "-c", "none", tmp_path / "task.yaml"], check=False)
    assert "Found no quota for" in refused.stdout + refused.stderr
    assert [event for event in sim.journal("gcp") if event.get("instance_type") == "g2-standard-4"] == []
    sim.clear_faults()


def test_a_spot_machine_vanishes_and_a_disk_that_is_kept_stays(sim: SimCloud) -> None:
    assert "error" not in by_hand(sim, "cheap", spot=True)
    assert "error" not in by_hand(sim, "kept", keep_disk=True)
    sim.preempt("cheap")
    sim.kill_node("kept")
    assert [(one.id, one.state, one.tags) for one in sim.instances("gcp")] == [("kept", "running", {"who": "hand"})]
    call(sim, "compute.instances().delete(project=project, zone='us-central1-a', instance='kept')")
    deadline = time.monotonic() + 300
    while sim.instances("gcp") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sim.instances("gcp") == []
    assert [(one["id"], one["instance"]) for one in sim.volumes("gcp")] == [("kept", None)]
    call(sim, "compute.disks().delete(project=project, zone='us-central1-a', disk='kept')")
    assert sim.volumes("gcp") == []
