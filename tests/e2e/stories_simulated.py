"""The simulated clouds themselves: the real SkyPilot launches on each, and nothing stays behind: `make e2e`; -k gcp for one cloud."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deployments import PLACES, Place
from simcloud import SimCloud, s3
from simcloud.clouds.azure import NODES_IDENTITY
from simcloud.sim import Instance
from test_simcloud_azure import wait_until_empty
from test_simcloud_gcp import call

NODE_SSH = [
    "ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5",
]  # fmt: skip
TASK = """
resources:
  infra: %s
  instance_type: %s
  ports: 8080
run: |
  echo "ran as $(whoami)"
  exec python3 -m http.server 8080
"""
NODE_PYTHON = "~/skypilot-runtime/bin/python"
READ_AWS = (
    f"import boto3; s3 = boto3.client('s3', endpoint_url='{s3.ENDPOINT}');"
    "print(s3.get_object(Bucket='models', Key='tiny/config.json')['Body'].read().decode())"
)
READ_GCP = "import google.cloud.storage as s; print(s.Client().bucket('models').blob('tiny/config.json').download_as_text())"
READ_AZURE = """
from azure.identity import DefaultAzureCredential
from azure.storage.blob import BlobClient
url = "https://simulated.blob.core.windows.net/models/tiny/config.json"
print(BlobClient.from_blob_url(url, DefaultAzureCredential()).download_blob().readall().decode())
"""
STATUS = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]


@dataclass(frozen=True)
class Bare:
    """A cloud as SkyPilot alone uses it: what it launches, and where there is no capacity."""

    place: Place
    infra: str
    machine: str
    full: Mapping[str, Any]
    options: tuple[str, ...] = ()

    @property
    def cloud(self) -> str:
        return self.place.cloud


BARE = {
    bare.cloud: bare
    for bare in (
        Bare(PLACES["aws"], "aws/us-east-1", "m6i.large", {"zone": "us-east-1[a-c]"}),
        Bare(
            PLACES["gcp"],
            "gcp/us-central1",
            "n2-standard-4",
            {"zone": "us-central1-[a-b]"},
            ("--config", "gcp.remote_identity=NO_UPLOAD"),
        ),
        Bare(
            PLACES["azure"],
            "azure",
            "Standard_D4s_v5",
            {"region": "eastus"},
            ("--config", "azure.remote_identity=NO_UPLOAD"),
        ),
    )
}
IN_THE_FULL_ONES = {
    "aws": ("us-east-1a", "us-east-1b", "us-east-1c"),
    "gcp": ("us-central1-a", "us-central1-b"),
    "azure": ("eastus",),
}


@pytest.fixture(scope="module", params=BARE)
def bare(request: pytest.FixtureRequest) -> Bare:
    return BARE[request.param]


@pytest.fixture(scope="module")
def sim(bare: Bare, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    folder = tmp_path_factory.mktemp("sim")
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").write_text("{}")
    with SimCloud(clouds=[bare.cloud], root=folder / "root") as sim:
        sim.put_weights(folder / "weights", bare.place.weights.replace("smollm2", "tiny"))
        yield sim


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def of(cloud: str) -> pytest.MarkDecorator:
    """A test of one cloud alone."""
    return pytest.mark.parametrize("bare", [cloud], indirect=True, scope="module")


def on_node(sim: SimCloud, bare: Bare, *command: str) -> subprocess.CompletedProcess[str]:
    [instance] = sim.instances(bare.cloud)
    [key] = sim.home.glob(".sky/clients/*/ssh/sky-key")
    return sim.run([*NODE_SSH, "-i", key, f"{bare.place.user}@{instance.address}", *command], check=False)


def fetch(sim: SimCloud, instance: Instance, port: int) -> int:
    """The exit status of an HTTP request to a node from outside: 0 answered, 7 refused."""
    return sim.run(["curl", "-sf", "-m", "5", f"http://{instance.address}:{port}/"], check=False).returncode


def launch(sim: SimCloud, bare: Bare, folder: Path, name: str, *options: str) -> str:
    (folder / "task.yaml").write_text(TASK % (bare.infra, bare.machine))
    done = sim.run(["sky", "launch", "-y", "-d", "-c", name, *(options or bare.options), folder / "task.yaml"])
    return done.stdout + done.stderr


def down(sim: SimCloud, bare: Bare, name: str) -> None:
    sim.run(["sky", "down", "-y", name])
    if bare.cloud == "azure":
        wait_until_empty(sim)
    assert sim.instances(bare.cloud) == []
    assert sim.volumes(bare.cloud) == []


def test_a_launch_avoids_where_there_is_no_capacity_and_down_leaves_nothing(sim: SimCloud, bare: Bare, tmp_path: Path) -> None:
    sim.fault(bare.cloud, "capacity", **bare.full)
    said = launch(sim, bare, tmp_path, "one")
    [instance] = sim.instances(bare.cloud)
    assert (instance.type, instance.state, instance.spot) == (bare.machine, "running", False)
    assert not {instance.zone, instance.region} & set(IN_THE_FULL_ONES[bare.cloud])
    refused = [event for event in sim.journal(bare.cloud) if event.get("error") == bare.place.codes["capacity"]]
    assert bare.place.codes["capacity"] in said or refused
    [volume] = sim.volumes(bare.cloud)
    assert volume["instance"] == instance.id

    hostname = f"ip-{str(instance.address).replace('.', '-')}" if bare.cloud == "aws" else instance.id
    assert on_node(sim, bare, "whoami; hostname").stdout.split() == [bare.place.user, hostname]
    deadline = time.monotonic() + 300
    while fetch(sim, instance, 8080) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert fetch(sim, instance, 8080) == 0

    # Only what a firewall opens is open; nothing can leave.
    serve = "nohup python3 -m http.server 8081 > /dev/null 2>&1 &"
    on_node(sim, bare, f"{serve} sleep 1; curl -sf -o /dev/null --retry 30 --retry-connrefused http://$(hostname -i):8081/")
    assert fetch(sim, instance, 8081) == 7
    assert on_node(sim, bare, "ip -o link | wc -l; ip route | wc -l").stdout.split() == ["1", "0"]  # loopback, and no way out

    if bare.cloud == "aws":  # the role's credentials come from the metadata service and open the store
        read = on_node(sim, bare, f'mv ~/.aws ~/.not-aws; {NODE_PYTHON} -c "{READ_AWS}"')
        assert read.stdout == "{}\n", read.stderr
    if (
        bare.cloud == "azure"
    ):  # the identity that SkyPilot makes may do anything in its own group and nothing elsewhere, blobs not among it
        assert "AuthorizationPermissionMismatch" in on_node(sim, bare, f"{NODE_PYTHON} -c '{READ_AZURE}'").stderr
        az = "export PATH=$PATH:~/skypilot-runtime/bin; az login --identity --allow-no-subscriptions -o none; az group"
        [group] = sim.groups("azure")
        assert on_node(sim, bare, f"{az} show -n {group} -o tsv --query location").stdout == f"{instance.region}\n"
        assert "AuthorizationFailed" in on_node(sim, bare, f"{az} show -n shared").stderr

    down(sim, bare, "one")
    if bare.cloud == "aws":
        [ended] = sim.instances("aws", gone=True)
        assert (ended.id, ended.state) == (instance.id, "terminated")
    assert [rule["name"] for rule in sim.firewalls(bare.cloud) if rule["name"].startswith("sky-ports-")] == []
    assert json.loads(sim.run(["sky", "status", "-o", "json"]).stdout) == []


@of("azure")
def test_blobs_open_for_the_laptop_and_for_a_nodes_identity_with_the_role_and_for_nobody_else(
    sim: SimCloud, bare: Bare, tmp_path: Path
) -> None:
    assert sim.run([sys.executable, "-c", READ_AZURE]).stdout == "{}\n"
    url = "https://simulated.blob.core.windows.net/models/tiny/config.json"
    token = sim.run(["az", "account", "get-access-token", "--query", "accessToken", "-o", "tsv"]).stdout.strip()
    for header in ("X-Nothing: here", "Authorization: Bearer made-up", f"Authorization: Bearer {token}"):
        assert sim.run([*STATUS, "-H", header, url]).stdout == "401"  # the last one is for another service

    launch(sim, bare, tmp_path, "two", "--config", f"azure.remote_identity={NODES_IDENTITY}")
    left_by_the_image = on_node(sim, bare, f"grep -rlF {sim.credentials['azure_refresh_token']} ~/.azure")
    assert left_by_the_image.stdout == ""
    read = on_node(sim, bare, f"{NODE_PYTHON} -c '{READ_AZURE}'")
    assert read.stdout == "{}\n", read.stderr
    down(sim, bare, "two")


@of("gcp")
def test_the_store_opens_for_the_laptop_and_for_a_nodes_identity_and_for_nobody_else(
    sim: SimCloud, bare: Bare, tmp_path: Path
) -> None:
    assert sim.run([sys.executable, "-c", READ_GCP]).stdout == "{}\n"
    url = "https://storage.googleapis.com/storage/v1/b/models/o/tiny%2Fconfig.json?alt=media"
    assert sim.run([*STATUS, url]).stdout == "401"
    assert sim.run([*STATUS, "-H", "Authorization: Bearer ya29.made-up", url]).stdout == "401"

    launch(sim, bare, tmp_path, "two")
    assert on_node(sim, bare, "ls -A ~/.config/gcloud ~/.boto").stdout == ""  # no key files
    read = on_node(sim, bare, f'{NODE_PYTHON} -c "{READ_GCP}"')
    assert read.stdout == "{}\n", read.stderr
    asked = {event["by"] for event in sim.journal("gcp") if event.get("action") == "storage GET"}
    assert asked == {"laptop@example.com", "skypilot-v1@simulated-project.iam.gserviceaccount.com"}
    down(sim, bare, "two")


@of("gcp")
def test_a_project_without_a_default_network_gets_skypilots_own(sim: SimCloud, bare: Bare, tmp_path: Path) -> None:
    for rule in sim.firewalls("gcp"):
        call(sim, f"compute.firewalls().delete(project=project, firewall={rule['name']!r})")
    call(sim, "compute.networks().delete(project=project, network='default')")
    launch(sim, bare, tmp_path, "bare")
    assert len(sim.instances("gcp")) == 1
    down(sim, bare, "bare")
    assert sorted(rule["name"].removeprefix("skypilot-vpc-allow-") for rule in sim.firewalls("gcp")) == ["custom", "icmp", "ssh"]
