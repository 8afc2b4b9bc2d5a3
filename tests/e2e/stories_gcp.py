"""What goes wrong on GCP and nowhere else: `make e2e`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployments import PLACES, gone, simulated, status, story, up
from simcloud import SimCloud
from test_simcloud_gcp import call

GCP = PLACES["gcp"]


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    with simulated(tmp_path_factory.mktemp("gcp"), ["gcp"]) as sim:
        yield sim


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def test_wrong_credentials_are_named(sim: SimCloud) -> None:
    with story("credentials that Google refuses", GCP.cloud):
        sim.fault("gcp", "credentials")
        refused = sim.run([*GCP.up, "--name", "wrong"], check=False)
        print(refused.stderr)
        assert refused.returncode == 8
        named = "GCP does not accept these credentials (invalid_grant: Token has been expired or revoked.)"
        assert refused.stderr.splitlines()[-1] == f"mistralctl: {named}; run gcloud auth application-default login"
        doctor = sim.run(["mistralctl", "doctor", "--cloud", "gcp"]).stdout
        assert named in doctor
        sim.clear_faults()
        gone(sim, GCP, "wrong")


def test_an_api_that_is_not_enabled_is_named(sim: SimCloud) -> None:
    with story("the Compute Engine API is not enabled and cannot be", GCP.cloud):
        sim.fault("gcp", "no_api")
        refused = sim.run([*GCP.up, "--name", "off"], check=False)
        assert refused.returncode == 8
        print(refused.stderr)
        assert "Traceback" not in refused.stderr
        reap = sim.run(["mistralctl", "reap", "--cloud", "gcp", "--dry-run"], check=False)
        assert (reap.returncode, "gcloud services enable compute.googleapis.com" in reap.stderr) == (8, True)
        sim.clear_faults()
        gone(sim, GCP, "off")


def test_a_rule_outlives_a_spot_machine_and_down_takes_it(sim: SimCloud, tmp_path: Path) -> None:
    with story("a rule outlives a preempted machine; down deletes it", GCP.cloud):
        up(sim, GCP, "spot", "--spot")
        [instance] = sim.instances("gcp")
        cluster = instance.tags["ray-cluster-name"]
        rule = {
            "name": f"sky-ports-{cluster}",
            "network": "projects/simulated-project/global/networks/default",
            "targetTags": [cluster],
        }
        call(sim, f"compute.firewalls().insert(project=project, body={rule | {'direction': 'INGRESS', 'allowed': []}!r})")
        sim.preempt(instance.id)
        one = status(sim, "spot")
        assert (one["state"], "took its spot machine away" in one["why"]) == ("lost", True)
        gone(sim, GCP, "spot")
        assert [found["name"] for found in sim.firewalls("gcp") if found["name"].startswith("sky-ports-")] == []


def test_a_project_without_a_default_network(sim: SimCloud) -> None:
    with story("a project without a default network gets SkyPilot's own, which stays", GCP.cloud):
        for rule in sim.firewalls("gcp"):
            call(sim, f"compute.firewalls().delete(project=project, firewall={rule['name']!r})")
        call(sim, "compute.networks().delete(project=project, network='default')")
        assert up(sim, GCP, "bare")["answer"]
        gone(sim, GCP, "bare")
        assert {rule["name"] for rule in sim.firewalls("gcp")} == {
            f"skypilot-vpc-allow-{what}" for what in ("custom", "icmp", "ssh")
        }
