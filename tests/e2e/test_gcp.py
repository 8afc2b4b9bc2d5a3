"""The main job on a simulated Google Cloud: the real SkyPilot, a node of its own, weights from gs://, vLLM, an answer, and down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deployments import (
    PLACES,
    answers_through_the_tunnel,
    on_node,
    secrets_on_node,
    status,
    up,
)
from simcloud import SimCloud
from test_simcloud_gcp import by_hand, call

CLOUD = "gcp"
GCP = PLACES[CLOUD]
NODE_ACCOUNT = "skypilot-v1@simulated-project.iam.gserviceaccount.com"


@pytest.fixture(scope="module")
def served(sim: SimCloud) -> dict[str, Any]:
    return up(sim, GCP, "served")


def test_it_answers_through_the_tunnel_and_only_there(sim: SimCloud, served: dict[str, Any]) -> None:
    answers_through_the_tunnel(sim, GCP, served)


def test_the_nodes_identity_reads_the_weights_and_no_key_is_there(sim: SimCloud, served: dict[str, Any]) -> None:
    readers = {event["by"] for event in sim.journal("gcp") if event.get("action") == "storage GET"}
    assert NODE_ACCOUNT in readers
    key = Path(served["key_file"]).read_text().strip()
    assert secrets_on_node(sim, GCP, "served", key) == []
    assert on_node(sim, "served", "ls -A ~/.config/gcloud 2> /dev/null || true") == ""


def left_behind(sim: SimCloud, name: str, owner: str) -> None:
    """A rule and a disk as SkyPilot names them, of a machine that is gone; with the labels of an owner, or none."""
    labels = {"mistralctl-name": name, "mistralctl-owner": owner} if owner else {}
    user = (sim.home / ".sky" / "user_hash").read_text().strip()
    assert "error" not in by_hand(sim, f"mctl-{name}-{user}-head-0a1b2c-compute", keep_disk=True, disk_labels=labels)
    call(
        sim,
        f"compute.instances().delete(project=project, zone='us-central1-a', instance='mctl-{name}-{user}-head-0a1b2c-compute')",
    )
    rule: dict[str, Any] = {
        "name": f"sky-ports-mctl-{name}-{user}",
        "network": "projects/simulated-project/global/networks/default",
        "description": " ".join(f"{key}={value}" for key, value in labels.items()),
    }
    rule |= {"targetTags": [f"mctl-{name}-{user}"], "sourceRanges": ["0.0.0.0/0"], "direction": "INGRESS"}
    rule |= {"allowed": [{"IPProtocol": "tcp", "ports": ["8443"]}]}
    call(sim, f"compute.firewalls().insert(project=project, body={rule!r})")


def test_down_takes_all_away_and_what_outlived_another_machine_is_found(sim: SimCloud, served: dict[str, Any]) -> None:
    owner = (sim.home / ".mistralctl" / "owner").read_text().strip()
    left_behind(sim, "served", owner)
    left_behind(sim, "other", owner)
    left_behind(sim, "nobodys", "")
    left_behind(sim, "theirs", "ffffffffffffffffffff")
    assert sim.run(["mistralctl", "down", "served"]).stdout == "served is down\n"
    assert sim.instances("gcp") == []
    assert sorted(one["id"].split("-")[1] for one in sim.volumes("gcp")) == ["nobodys", "other", "theirs"]
    assert sim.run(["mistralctl", "down", "served"]).stdout == "served was down already\n"
    rules = {rule["name"] for rule in sim.firewalls("gcp")}
    assert {name.split("-")[3] for name in rules if name.startswith("sky-ports-")} == {"nobodys", "other", "theirs"}
    assert "default-allow-ssh" in rules
    found = json.loads(sim.run(["mistralctl", "reap", "--cloud", "gcp", "--dry-run", "-o", "json"]).stdout)
    parts = found["parts"] if isinstance(found, dict) else found
    assert sorted((part["kind"], part["name"], part["due"]) for part in parts) == [("disk", "other", ""), ("rule", "other", "")]


def test_when_every_place_refuses_it_says_which_and_why(sim: SimCloud) -> None:
    sim.fault("gcp", "capacity", region="us-central1")
    sim.fault("gcp", "quota", region="us-east4")
    sim.fault("gcp", "permission", region="europe-west4")
    try:
        refused = sim.run([*GCP.up, "--name", "refused"], check=False)
    finally:
        sim.clear_faults()
    assert refused.returncode == 8
    print(refused.stderr)
    assert "no cloud gave a machine" in refused.stderr
    for word in (
        "us-central1-a",
        *(GCP.codes[kind] for kind in ("capacity", "quota", "permission")),
        "N2_CPUS",
        "compute.instances.create",
    ):
        assert word in refused.stderr
    assert "Traceback" not in refused.stderr
    assert sim.instances("gcp") == []
    assert status(sim, "refused")["state"] == "down"
