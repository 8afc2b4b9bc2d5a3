"""The real SkyPilot launches on the simulated Azure, and nothing stays behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from simcloud import SimCloud
from simcloud.clouds.azure import NODES_IDENTITY
from test_simcloud import NODE_SSH
from test_simcloud_azure import wait_until_empty

TASK = """
resources:
  infra: azure
  instance_type: Standard_D4s_v5
  ports: 8080
run: |
  echo "ran as $(whoami)"
  exec python3 -m http.server 8080
"""
READ = """
from azure.identity import DefaultAzureCredential
from azure.storage.blob import BlobClient
url = "https://simulated.blob.core.windows.net/models/tiny/config.json"
print(BlobClient.from_blob_url(url, DefaultAzureCredential()).download_blob().readall().decode())
"""


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    folder = tmp_path_factory.mktemp("sim")
    with SimCloud(clouds=["azure"], root=folder / "root") as sim:
        (folder / "weights").mkdir()
        (folder / "weights" / "config.json").write_text("{}")
        sim.put_weights(folder / "weights", "az://simulated/models/tiny")
        yield sim


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def on_node(sim: SimCloud, *command: str) -> subprocess.CompletedProcess[str]:
    [instance] = sim.instances("azure")
    [key] = sim.home.glob(".sky/clients/*/ssh/sky-key")
    return sim.run([*NODE_SSH, "-i", key, f"azureuser@{instance.address}", *command], timeout=60, check=False)


def fetch(sim: SimCloud, port: int) -> int:
    """The exit status of an HTTP request to the node from outside: 0 answered, 7 refused."""
    [instance] = sim.instances("azure")
    return sim.run(["curl", "-sf", "-m", "5", f"http://{instance.address}:{port}/"], check=False).returncode


def launch(sim: SimCloud, folder: Path, name: str, identity: str) -> str:
    (folder / "task.yaml").write_text(TASK)
    config = ["--config", f"azure.remote_identity={identity}"]
    done = sim.run(["sky", "launch", "-y", "-d", "-c", name, *config, folder / "task.yaml"], timeout=240)
    return done.stdout + done.stderr


def test_a_launch_avoids_the_region_without_capacity_and_down_leaves_nothing(sim: SimCloud, tmp_path: Path) -> None:
    sim.fault("azure", "capacity", region="eastus")
    said = launch(sim, tmp_path, "one", "NO_UPLOAD")
    assert "AllocationFailed" in said
    [instance] = sim.instances("azure")
    assert (instance.type, instance.state, instance.spot) == ("Standard_D4s_v5", "running", False)
    assert instance.region in ("westus2", "westus3")
    [volume] = sim.volumes("azure")
    assert volume["instance"] == instance.id

    assert on_node(sim, "whoami; hostname").stdout.split() == ["azureuser", instance.id]
    deadline = time.monotonic() + 30
    while fetch(sim, 8080) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert fetch(sim, 8080) == 0

    # Only what a security group opens is open; nothing can leave.
    on_node(
        sim, "nohup python3 -m http.server 8081 > /dev/null 2>&1 & sleep 1; curl -sf -o /dev/null http://$(hostname -i):8081/"
    )
    assert fetch(sim, 8081) == 7
    assert on_node(sim, "ip -o link | wc -l; ip route | wc -l").stdout.split() == ["1", "0"]  # loopback, and no way out

    # The identity that SkyPilot makes may do anything in its own group and nothing elsewhere; blobs are not part of that.
    read = on_node(sim, f"~/skypilot-runtime/bin/python -c '{READ}'")
    assert "AuthorizationPermissionMismatch" in read.stderr
    az = "export PATH=$PATH:~/skypilot-runtime/bin; az login --identity --allow-no-subscriptions -o none; az group"
    [group] = sim.groups("azure")
    assert on_node(sim, f"{az} show -n {group} -o tsv --query location").stdout == f"{instance.region}\n"
    assert "AuthorizationFailed" in on_node(sim, f"{az} show -n shared").stderr

    sim.run(["sky", "down", "-y", "one"], timeout=120)
    wait_until_empty(sim)
    assert json.loads(sim.run(["sky", "status", "-o", "json"], timeout=60).stdout) == []


def test_blobs_open_for_the_laptop_and_for_a_nodes_identity_with_the_role_and_for_nobody_else(
    sim: SimCloud, tmp_path: Path
) -> None:
    assert sim.run([sys.executable, "-c", READ]).stdout == "{}\n"
    url = "https://simulated.blob.core.windows.net/models/tiny/config.json"
    status = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]
    token = sim.run(["az", "account", "get-access-token", "--query", "accessToken", "-o", "tsv"]).stdout.strip()
    for header in ("X-Nothing: here", "Authorization: Bearer made-up", f"Authorization: Bearer {token}"):
        assert sim.run([*status, "-H", header, url]).stdout == "401"  # the last one is for another service

    launch(sim, tmp_path, "two", NODES_IDENTITY)
    assert on_node(sim, f"grep -rlF {sim.credentials['azure_refresh_token']} ~/.azure").stdout == ""  # what the image left there
    read = on_node(sim, f"~/skypilot-runtime/bin/python -c '{READ}'")
    assert read.stdout == "{}\n", read.stderr
    sim.run(["sky", "down", "-y", "two"], timeout=120)
    wait_until_empty(sim)
