"""Whether the role files under docs/roles allow the calls that a simulated cloud's journal holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from simcloud import SimCloud
from simcloud.arm.identity import LAPTOP
from simcloud.clouds.gcp import ACCOUNT
from simcloud.policies import Request, allows

ROLES = Path(__file__).parent.parent.parent / "docs" / "roles"
Journal = list[dict[str, Any]]
PREFIXES = {"service-quotas": "servicequotas"}  # where IAM's prefix is not the service's name
# Where a permission of Google's is not called as the method that needs it.
VERBS = {"aggregatedList": "list", "bulkInsert": "create", "insert": "create", "patch": "update", "wait": "get"}
# Done once in a project that has no account for nodes yet, by an owner; testIamPermissions needs no right.
ONCE_ON_GCP = {
    "iam.serviceAccounts.create",
    "resourcemanager.projects.setIamPolicy",
    "resourcemanager.projects.testIamPermissions",
}


def exceeded(sim: SimCloud, cloud: str) -> set[str]:
    """What was called on a simulated cloud, whatever a test did there, that its role file does not allow."""
    journal = sim.journal(cloud)
    if cloud == "gcp":
        return _on_gcp(journal, ACCOUNT)
    if cloud == "azure":
        return _on_azure(journal, LAPTOP)
    return _on_aws(journal, "laptop", "aws") | _on_aws(journal, "node", "aws-node")


def _on_aws(journal: Journal, by: str, role: str) -> set[str]:
    """The actions that `by` (`laptop` or `node`) called and that the policy in `role`.json does not name, and what else it does not allow."""
    text = (ROLES / f"{role}.json").read_text()
    allowed = {action for statement in json.loads(text)["Statement"] for action in statement["Action"]}
    calls = [call for call in journal if call["event"] == "call" and call["by"] == by]
    asked = [[Request(*one) for one in call["asked"]] for call in calls if call.get("asked") and "error" not in call]
    owners = {value for call in asked for one in call for value in one.values("aws:RequestTag/mistralctl-owner")} or {"nobody"}
    policies = [json.loads(text.replace("OWNER", owner)) for owner in owners]
    refused = {
        f"{one.action} on {one.resource}, {dict(one.context)}"
        for call in asked
        if not any(all(allows(policy, one) for one in call) for policy in policies)
        for one in call
        if not any(allows(policy, one) for policy in policies)
    }
    return {f"{PREFIXES.get(call['service'], call['service'])}:{call['action']}" for call in calls} - allowed | refused


def _on_gcp(journal: Journal, by: str) -> set[str]:
    """The permissions that an account used in its calls, but for those of objects, and that gcp.yaml does not give."""
    allowed = set(yaml.safe_load((ROLES / "gcp.yaml").read_text())["includedPermissions"])
    called = {str(call["action"]) for call in journal if call["event"] == "call" and call.get("by") == by}
    used = set()
    for action in called:
        if not action.startswith("storage "):
            *resource, method = action.replace("cloudresourcemanager.", "resourcemanager.").split(".")
            used.add(".".join([*resource, VERBS.get(method, method)]))
    return used - allowed - ONCE_ON_GCP


def _on_azure(journal: Journal, by: str) -> set[str]:
    """The actions that an identity called, but for those on data, and that azure.json does not name."""
    allowed = {action.lower() for action in json.loads((ROLES / "azure.json").read_text())["Actions"]}
    called = {str(call["action"]) for call in journal if call["event"] == "call" and call.get("who") == by}
    return {
        action for action in called if action.lower() not in allowed and "/blobs/" not in action and "Simulated" not in action
    }
