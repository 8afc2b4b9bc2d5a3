"""The real SkyPilot launches on the simulated Google Cloud, and nothing stays behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from simcloud import SimCloud
from test_simcloud import NODE_SSH
from test_simcloud_gcp import call

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


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    with SimCloud(clouds=["gcp"], root=tmp_path_factory.mktemp("sim") / "root") as sim:
        yield sim


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
