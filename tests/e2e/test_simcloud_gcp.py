"""The simulated Google Cloud: the real SkyPilot launches on it, with Google's own libraries, and nothing stays behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from simcloud import SimCloud
from test_simcloud import NODE_SSH

TASK = """
resources:
  infra: gcp/us-central1
  instance_type: n2-standard-4
  ports: 8080
run: |
  echo "ran as $(whoami)"
  exec python3 -m http.server 8080
"""
NO_UPLOAD = ["--config", "gcp.remote_identity=NO_UPLOAD"]
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
    with SimCloud(clouds=["gcp"], root=tmp_path_factory.mktemp("sim") / "root") as sim:
        yield sim


def call(sim: SimCloud, expression: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sim.run([sys.executable, "-c", CALL, expression], timeout=60).stdout)
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


def on_node(sim: SimCloud, *command: str) -> subprocess.CompletedProcess[str]:
    [instance] = sim.instances("gcp")
    [key] = sim.home.glob(".sky/clients/*/ssh/sky-key")
    return sim.run([*NODE_SSH, "-i", key, f"gcpuser@{instance.address}", *command], timeout=60, check=False)


def fetch(sim: SimCloud, address: str | None, port: int) -> int:
    """The exit status of an HTTP request to a node from outside: 0 answered, 7 refused."""
    return sim.run(["curl", "-sf", "-m", "5", f"http://{address}:{port}/"], check=False).returncode


def test_a_launch_avoids_the_zone_without_capacity_and_down_leaves_nothing(sim: SimCloud, tmp_path: Path) -> None:
    sim.fault("gcp", "capacity", zone="us-central1-[a-b]")
    (tmp_path / "task.yaml").write_text(TASK)
    launched = sim.run(["sky", "launch", "-y", "-d", "-c", "one", *NO_UPLOAD, tmp_path / "task.yaml"], timeout=240)

    [instance] = sim.instances("gcp")
    assert (instance.type, instance.region, instance.state, instance.spot) == ("n2-standard-4", "us-central1", "running", False)
    assert instance.zone not in ("us-central1-a", "us-central1-b")
    assert "'ZONE_RESOURCE_POOL_EXHAUSTED' in us-central1-a" in launched.stdout + launched.stderr
    [volume] = sim.volumes("gcp")
    assert volume["instance"] == instance.id

    assert on_node(sim, "whoami; hostname").stdout.split() == ["gcpuser", instance.id]
    deadline = time.monotonic() + 30
    while fetch(sim, instance.address, 8080) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert fetch(sim, instance.address, 8080) == 0

    # Only what a rule opens is open; nothing can leave.
    on_node(
        sim, "nohup python3 -m http.server 8081 > /dev/null 2>&1 & sleep 1; curl -sf -o /dev/null http://$(hostname -i):8081/"
    )
    assert fetch(sim, instance.address, 8081) == 7
    assert on_node(sim, "ip -o link | wc -l; ip route | wc -l").stdout.split() == ["1", "0"]  # loopback, and no way out

    sim.run(["sky", "down", "-y", "one"], timeout=120)
    assert sim.instances("gcp") == []
    assert sim.volumes("gcp") == []
    assert [rule["name"] for rule in sim.firewalls("gcp") if rule["name"].startswith("sky-ports-")] == []
    assert json.loads(sim.run(["sky", "status", "-o", "json"], timeout=60).stdout) == []
    sim.clear_faults()


READ = "import google.cloud.storage as s; print(s.Client().bucket('models').blob('tiny/config.json').download_as_text())"


def test_the_store_opens_for_the_laptop_and_for_a_nodes_identity_and_for_nobody_else(sim: SimCloud, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    sim.put_weights(tmp_path / "weights", "gs://models/tiny")
    assert sim.run([sys.executable, "-c", READ]).stdout == "{}\n"
    url = "https://storage.googleapis.com/storage/v1/b/models/o/tiny%2Fconfig.json?alt=media"
    status = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]
    assert sim.run([*status, url]).stdout == "401"
    assert sim.run([*status, "-H", "Authorization: Bearer ya29.made-up", url]).stdout == "401"

    (tmp_path / "task.yaml").write_text(TASK.replace("n2-standard-4", "n2-standard-8").replace("  ports: 8080\n", ""))
    sim.run(["sky", "launch", "-y", "-d", "-c", "two", *NO_UPLOAD, tmp_path / "task.yaml"], timeout=240)
    assert on_node(sim, "ls -A ~/.config/gcloud ~/.boto").stdout == ""  # no key files
    read = on_node(sim, f'~/skypilot-runtime/bin/python -c "{READ}"')
    assert read.stdout == "{}\n", read.stderr
    asked = {event["by"] for event in sim.journal("gcp") if event.get("action") == "storage GET"}
    assert asked == {"laptop@example.com", "skypilot-v1@simulated-project.iam.gserviceaccount.com"}
    sim.run(["sky", "down", "-y", "two"], timeout=120)
    assert sim.instances("gcp") == []


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
    refused = sim.run(["sky", "launch", "-y", "-c", "none", tmp_path / "task.yaml"], timeout=120, check=False)
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
    deadline = time.monotonic() + 10
    while sim.instances("gcp") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sim.instances("gcp") == []
    assert [(one["id"], one["instance"]) for one in sim.volumes("gcp")] == [("kept", None)]
    call(sim, "compute.disks().delete(project=project, zone='us-central1-a', disk='kept')")
    assert sim.volumes("gcp") == []


def test_a_project_without_a_default_network_gets_skypilots_own(sim: SimCloud, tmp_path: Path) -> None:
    for rule in sim.firewalls("gcp"):
        call(sim, f"compute.firewalls().delete(project=project, firewall={rule['name']!r})")
    call(sim, "compute.networks().delete(project=project, network='default')")
    (tmp_path / "task.yaml").write_text(TASK)
    sim.run(["sky", "launch", "-y", "-d", "-c", "bare", *NO_UPLOAD, tmp_path / "task.yaml"], timeout=240)
    assert len(sim.instances("gcp")) == 1
    sim.run(["sky", "down", "-y", "bare"], timeout=120)
    assert sim.instances("gcp") == []
    assert sorted(rule["name"].removeprefix("skypilot-vpc-allow-") for rule in sim.firewalls("gcp")) == ["custom", "icmp", "ssh"]
