"""What Amazon asks its policies for a call: each resource that the call touches, with the context keys that the role files name.

By the Service Authorization Reference for EC2 (resource types and condition keys of each action) and EC2's "Grant permission to tag resources
during creation" (ec2:CreateAction). A call that changes something and is not known here is asked for as one on `*` without any key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from simcloud.policies import Request

# The resource type in an ARN, by the beginning of an id.
TYPES = {
    "i": "instance", "vol": "volume", "sg": "security-group", "eipalloc": "elastic-ip", "eni": "network-interface", "subnet": "subnet",
    "ami": "image", "vpc": "vpc",
}  # fmt: skip
# Parameters that name what a call is about, by action.
TOUCHED = {
    "TerminateInstances": ("InstanceIds",), "StopInstances": ("InstanceIds",), "StartInstances": ("InstanceIds",),
    "RebootInstances": ("InstanceIds",), "ModifyInstanceAttribute": ("InstanceId", "Groups"), "DeleteVolume": ("VolumeId",),
    "ReleaseAddress": ("AllocationId",), "DeleteNetworkInterface": ("NetworkInterfaceId",), "DeleteSecurityGroup": ("GroupId",),
    "AuthorizeSecurityGroupIngress": ("GroupId",), "AuthorizeSecurityGroupEgress": ("GroupId",),
    "RevokeSecurityGroupIngress": ("GroupId",), "RevokeSecurityGroupEgress": ("GroupId",),
}  # fmt: skip
PREFIXES = {"service-quotas": "servicequotas"}  # where IAM's prefix is not the service's name
ACCOUNT = "123456789012"


class Call:
    """A call as moto has it: its service, action, region, parameters, and the tags of what is there."""

    def __init__(self, response: Any) -> None:
        name = str(response.service_name or "")
        self.service = PREFIXES.get(name, name)
        self.action, self.region = str(response._get_action() or ""), str(response.region)
        self.params: Mapping[str, Any] = response._get_params() if name in ("ec2", "iam") else {}
        self.tags: Mapping[str, Mapping[str, str]] = response.ec2_backend.tags if name == "ec2" else {}

    def arn(self, identity: str) -> str:
        """The ARN of a resource of EC2 by its id; images have no account."""
        kind = TYPES.get(identity.partition("-")[0], "unknown")
        return f"arn:aws:ec2:{self.region}:{'' if kind == 'image' else ACCOUNT}:{kind}/{identity}"

    def about(self, identity: str) -> dict[str, str]:
        """The context keys of a resource that is there."""
        found = {f"aws:ResourceTag/{key}": str(value) for key, value in dict(self.tags.get(identity, {})).items()}
        return found | ({"ec2:InstanceID": identity} if identity.startswith("i-") else {})

    def specified(self, kind: str) -> dict[str, str]:
        """The tags that a call gives to what it makes."""
        specs = [spec for spec in self.params.get("TagSpecifications") or [] if spec["ResourceType"] == kind]
        return {tag["Key"]: tag["Value"] for spec in specs for tag in spec.get("Tags") or []}


def _keys(tags: Mapping[str, str]) -> dict[str, Any]:
    return {f"aws:RequestTag/{key}": value for key, value in tags.items()} | ({"aws:TagKeys": list(tags)} if tags else {})


def _made(call: Call, kind: str) -> Iterable[Request]:
    """Something that a call makes, and its tags."""
    arn, tags = f"arn:aws:ec2:{call.region}:{ACCOUNT}:{kind}/*", call.specified(kind)
    yield Request(f"ec2:{call.action}", arn, _keys(tags))
    if tags:
        yield Request("ec2:CreateTags", arn, {**_keys(tags), "ec2:CreateAction": call.action})


def _run_instances(call: Call) -> Iterable[Request]:
    for kind in ("instance", "volume"):
        yield from _made(call, kind)
    given = call.params
    cards = given.get("NetworkInterfaces") or []
    used = [given.get("ImageId"), given.get("SubnetId"), *(given.get("SecurityGroupIds") or [])]
    for card in cards:
        used += [card.get("SubnetId"), card.get("NetworkInterfaceId"), *(card.get("Groups") or [])]
    for identity in dict.fromkeys(one for one in used if one):
        yield Request("ec2:RunInstances", call.arn(identity), call.about(identity))
    if not any(card.get("NetworkInterfaceId") for card in cards):
        yield Request("ec2:RunInstances", f"arn:aws:ec2:{call.region}:{ACCOUNT}:network-interface/*")
    if (given.get("InstanceMarketOptions") or {}).get("MarketType") == "spot":
        yield Request("ec2:RunInstances", f"arn:aws:ec2:{call.region}:{ACCOUNT}:spot-instances-request/*")
    if profile := (given.get("IamInstanceProfile") or {}).get("Name"):
        yield Request("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/{profile}", {"iam:PassedToService": "ec2.amazonaws.com"})


def _tagged(call: Call) -> Iterable[Request]:
    tags = {tag["Key"]: tag.get("Value") or "" for tag in call.params.get("Tags") or []}
    for identity in call.params.get("Resources") or []:
        yield Request(f"ec2:{call.action}", call.arn(identity), {**call.about(identity), **_keys(tags)})


def requests(response: Any) -> list[Request]:
    """Everything that has to be allowed for a call that moto is about to answer."""
    call = Call(response)
    action = f"{call.service}:{call.action}"
    if call.service == "iam":
        kinds = {"RoleName": "role", "InstanceProfileName": "instance-profile"}
        named = [f"arn:aws:iam::{ACCOUNT}:{kind}/{call.params[key]}" for key, kind in kinds.items() if call.params.get(key)]
        return [Request(action, arn) for arn in named or ["*"]]
    if call.service != "ec2":
        return [Request(action, "*")]
    if call.action == "RunInstances":
        return list(_run_instances(call))
    if call.action in ("CreateTags", "DeleteTags"):
        return list(_tagged(call))
    if call.action == "CreateSecurityGroup":
        vpc = call.params.get("VpcId")
        return [*_made(call, "security-group"), *([Request(action, call.arn(vpc), call.about(vpc))] if vpc else [])]
    found: list[str] = []
    for name in TOUCHED.get(call.action, ()):
        given = call.params.get(name)
        found += [given] if isinstance(given, str) else given or []
    return [Request(action, call.arn(one), call.about(one)) for one in found] or [Request(action, "*")]
