"""The role files under docs/roles allow what SkyPilot says that it needs, and what our own code asks the clouds for."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from mistralctl.clouds.azure import api as azure

ROLES = Path(__file__).parent.parent.parent / "docs" / "roles"


def test_gcp_allows_what_skypilot_checks_for_and_what_we_call() -> None:
    from sky.provision.gcp import constants

    role = yaml.safe_load((ROLES / "gcp.yaml").read_text())
    allowed = role["includedPermissions"]
    assert allowed == sorted(set(allowed))
    needed = {*constants.GCP_MINIMAL_PERMISSIONS, *constants.VM_MINIMAL_PERMISSIONS, *constants.FIREWALL_PERMISSIONS}
    ours = {
        "compute.regions.get",
        "compute.projects.get",
        "compute.images.get",  # SkyPilot asks for the size of an image that --image names
        "compute.images.useReadOnly",  # https://cloud.google.com/compute/docs/reference/rest/v1/instances/insert, sourceImage
        "compute.disks.delete",
        "compute.firewalls.update",
        "iam.serviceAccounts.actAs",
    }
    assert needed | ours <= set(allowed)
    assert not {one for one in allowed if one.endswith(("setIamPolicy", "serviceAccounts.create", "networks.create"))}


def test_azure_allows_every_resource_of_skypilots_template_and_the_quotas() -> None:
    import sky.provision.azure

    [folder] = sky.provision.azure.__path__
    template = json.loads((Path(folder) / "azure-config-template.json").read_text())
    role = json.loads((ROLES / "azure.json").read_text())
    assert role["Actions"] == sorted(set(role["Actions"]), key=str.lower)
    assert {f"{resource['type']}/write" for resource in template["resources"]} <= set(role["Actions"])
    assert "Microsoft.Compute/locations/usages/read" in role["Actions"]
    # SkyPilot asks for the size of an image of the marketplace, which machines with GPUs get.
    assert "Microsoft.Compute/locations/publishers/artifacttypes/offers/skus/versions/read" in role["Actions"]
    assert not [action for action in role["Actions"] if "*" in action]
    # What doctor asks, and what a subscription that never had a machine needs once.
    assert "Microsoft.Resources/subscriptions/providers/read" in role["Actions"]
    assert {f"{provider}/register/action" for provider in azure.PROVIDERS} <= set(role["Actions"])
    used = {action.partition("/")[0] for action in role["Actions"]} - {"Microsoft.Authorization", "Microsoft.Resources"}
    assert used == set(azure.PROVIDERS)


def test_no_role_of_aws_allows_whole_services() -> None:
    for name in ("aws", "aws-node"):
        role = json.loads((ROLES / f"{name}.json").read_text())
        actions = [action for statement in role["Statement"] for action in statement["Action"]]
        assert len(actions) == len(set(actions))
        assert not [action for action in actions if "*" in action]
        for statement in role["Statement"]:  # whatever ends a machine or a disk is bound to our labels
            if {"ec2:TerminateInstances", "ec2:DeleteVolume"} & set(statement["Action"]):
                assert statement["Condition"] == {"StringLike": {"aws:ResourceTag/mistralctl-owner": "*"}}
