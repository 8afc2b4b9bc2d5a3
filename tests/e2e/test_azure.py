"""The main job on a simulated Azure: the real SkyPilot, a node of its own, weights from az://, vLLM, an answer, and down."""

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
from simcloud.arm.identity import LAPTOP

CLOUD = "azure"
AZURE = PLACES[CLOUD]


@pytest.fixture(scope="module")
def served(sim: SimCloud) -> dict[str, Any]:
    return up(sim, AZURE, "served")


def test_it_answers_through_the_tunnel_and_only_there(sim: SimCloud, served: dict[str, Any]) -> None:
    answers_through_the_tunnel(sim, AZURE, served)


def test_the_nodes_identity_reads_the_weights_and_no_key_is_there(sim: SimCloud, served: dict[str, Any]) -> None:
    read = [event for event in sim.journal("azure") if str(event.get("action")).endswith("/blobs/read")]
    assert read
    assert {event["who"] for event in read} - {LAPTOP}  # the laptop has looked at their beginning before it rented
    key = Path(served["key_file"]).read_text().strip()
    assert secrets_on_node(sim, AZURE, "served", key) == []
    # What the node has of Azure it has from its own sign-in.
    signed_in = json.loads(on_node(sim, "served", "~/skypilot-runtime/bin/az account show"))
    assert signed_in["user"] == {"assignedIdentityInfo": "MSI", "name": "systemAssignedIdentity", "type": "servicePrincipal"}
    assert LAPTOP not in on_node(sim, "served", "cat ~/.azure/*.json")


def test_down_sees_a_deletion_through_that_fails_after_it_was_accepted(sim: SimCloud, served: dict[str, Any]) -> None:
    sim.fault("azure", "late_failure")
    refused = sim.run(["mistralctl", "down", "served"], check=False)
    assert refused.returncode == 8
    print(refused.stderr)
    assert "ResourceGroupDeletionBlocked" in refused.stderr
    assert sim.instances("azure")[0].id in refused.stderr
    sim.clear_faults()
    assert sim.run(["mistralctl", "down", "served"]).stdout.startswith("served ")
    assert (sim.groups("azure"), sim.instances("azure"), sim.volumes("azure")) == ([], [], [])
    assert sim.run(["mistralctl", "down", "served"]).stdout == "served was down already\n"


def test_when_every_place_refuses_it_says_which_and_why(sim: SimCloud) -> None:
    sim.fault("azure", "capacity", region="eastus")
    sim.fault("azure", "quota", region="westus2")
    sim.fault("azure", "permission", region="westus3")
    refused = sim.run([*AZURE.up, "--name", "refused"], check=False)
    sim.clear_faults()
    assert refused.returncode == 8
    print(refused.stderr)
    assert "no cloud gave a machine" in refused.stderr
    for line in (
        "  eastus   capacity    AllocationFailed",
        "  westus2  quota       OperationNotAllowed: standardDSv5Family",
        "  westus3  permission  AuthorizationFailed: Microsoft.Compute/virtualMachines/write",
    ):
        assert line in refused.stderr
    assert "Traceback" not in refused.stderr
    assert sim.instances("azure") == []
    assert status(sim, "refused")["state"] == "down"


REGISTER = "az provider register -n Microsoft.Compute --wait"


def test_doctor_shows_a_resource_provider_that_is_not_registered(sim: SimCloud) -> None:
    sim.fault("azure", "unregistered", action="Microsoft.Compute")
    said = json.loads(sim.run(["mistralctl", "doctor", "--cloud", "azure", "-o", "json"]).stdout)
    sim.clear_faults()
    found = next(one for one in said["checks"] if one["name"] == "resource providers on azure")
    assert (found["ok"], found["found"], found["mend"]) == (False, "Microsoft.Compute NotRegistered", REGISTER)


def test_up_names_the_command_for_a_resource_provider_that_is_not_registered(sim: SimCloud) -> None:
    sim.fault("azure", "unregistered", action="Microsoft.Compute")
    # With the right to, Azure's libraries register what is missing when something is listed.
    sim.fault("azure", "permission", action="Microsoft.Compute/register/action")
    for arguments in ([], ["--accelerators", "A100-80GB"]):  # a GPU's image is of the marketplace, for which SkyPilot asks first
        refused = sim.run([*AZURE.up, "--name", "new", *arguments], check=False)
        print(refused.stderr)
        assert refused.returncode == 8
        assert f"run {REGISTER}" in refused.stderr
        assert "Traceback" not in refused.stderr
    sim.clear_faults()
    assert sim.instances("azure") == []
