"""The role files under docs/roles allow what SkyPilot says that it needs, and what our own code asks the clouds for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from mistralctl.clouds.aws import api as aws
from mistralctl.clouds.azure import api as azure
from moto import mock_aws
from moto.core.responses import BaseResponse
from moto.ec2.models.amis import AMIS

sys.path.append(str(Path(__file__).parent.parent / "e2e"))  # the simulated clouds' policies
from simcloud.authorization import requests
from simcloud.policies import Request, allows

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
        assert not [action for action in actions if "*" in action]
        for statement in role["Statement"]:  # whatever is not a look names the resources, and no owner is a pattern
            if statement["Sid"] != "Look":
                assert "*" not in statement["Resource"]
            assert 'mistralctl-owner": "*' not in json.dumps(statement)


OURS, THEIRS = "0123456789abcdef0123", "ffffffffffffffffffff"
LAPTOP, NODE, ADMIN = "AKIALAPTOP", "AKIANODE", "AKIAADMIN"


class Account:
    """moto's EC2, which asks the role files for each call of a laptop and of a node, and none for an administrator's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policies = {LAPTOP: policy("aws"), NODE: policy("aws-node")}
        self.node = ""  # the instance that the node's credentials come from
        self.refused: list[str] = []
        call = BaseResponse.call_action

        def call_action(response: Any) -> Any:
            key = re.search(r"Credential=(\w+)/", str(response.headers.get("Authorization")))
            allowing = self.policies.get(key[1] if key else "")
            asked = requests(response) if allowing else []
            if key and key[1] == NODE:
                source = {"ec2:SourceInstanceARN": f"arn:aws:ec2:{response.region}:123456789012:instance/{self.node}"}
                asked = [replace(one, context={**one.context, **source}) for one in asked]
            refused = [one for one in asked if allowing and not allows(allowing, one)]
            if refused:
                self.refused.append(refused[0].action)
                words = "<Code>UnauthorizedOperation</Code><Message>no</Message>"
                body = f"<Response><Errors><Error>{words}</Error></Errors><RequestID>x</RequestID></Response>"
                return 403, {"status": "403", "Content-Type": "text/xml"}, body
            return call(response)

        monkeypatch.setattr(BaseResponse, "call_action", call_action)
        self.admin, self.laptop, self.by_node = self.client(ADMIN), self.client(LAPTOP), self.client(NODE)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", LAPTOP)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")

    @staticmethod
    def client(key: str) -> Any:
        return boto3.client("ec2", region_name="us-west-2", aws_access_key_id=key, aws_secret_access_key=ADMIN)

    def group(self, client: Any, name: str) -> str:
        """A security group as SkyPilot makes one."""
        [vpc] = self.admin.describe_vpcs()["Vpcs"]
        marked = [{"ResourceType": "security-group", "Tags": [{"Key": "skypilot", "Value": "true"}]}]
        group = client.create_security_group(GroupName=name, Description=name, VpcId=vpc["VpcId"], TagSpecifications=marked)[
            "GroupId"
        ]
        rules = [
            {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]} for port in (22, 8000)
        ]
        client.authorize_security_group_ingress(GroupId=group, IpPermissions=rules)
        return str(group)

    def machine(self, client: Any, owner: str, group: str, name: str = "one") -> dict[str, Any]:
        """A machine as SkyPilot rents one for mistralctl, with its disk."""
        labels = {
            "mistralctl-owner": owner,
            "mistralctl-name": name,
            "mistralctl-ttl": "60",
            "ray-cluster-name": f"mctl-{name}-0a1b2c3d",
        }
        tags = [{"Key": key, "Value": value} for key, value in labels.items()]
        [subnet] = [one for one in self.admin.describe_subnets()["Subnets"] if one["AvailabilityZone"] == "us-west-2a"]
        [one] = client.run_instances(
            ImageId=AMIS[0]["ami_id"], MinCount=1, MaxCount=1, InstanceType="g6.xlarge", IamInstanceProfile={"Name": "skypilot-v1"},
            SubnetId=subnet["SubnetId"], SecurityGroupIds=[group],
            TagSpecifications=[{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")],
        )["Instances"]  # fmt: skip
        return dict(one)


def policy(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROLES / f"{name}.json").read_text().replace("OWNER", OURS))
    return found


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    monkeypatch.setattr(aws, "regions", lambda: ["us-west-2"])
    with mock_aws():
        iam = boto3.client("iam", region_name="us-east-1", aws_access_key_id=ADMIN, aws_secret_access_key=ADMIN)
        iam.create_role(RoleName="skypilot-v1", AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName="skypilot-v1")
        iam.add_role_to_instance_profile(InstanceProfileName="skypilot-v1", RoleName="skypilot-v1")
        yield Account(monkeypatch)


def test_a_whole_life_is_allowed_under_ones_own_label(account: Account) -> None:
    laptop = account.laptop
    group, other = account.group(laptop, "sky-sg-mine"), account.group(laptop, "sky-sg-shared")
    machine = account.machine(laptop, OURS, group)
    identity = machine["InstanceId"]
    # SkyPilot names its head node after it was made, with all tags that it has.
    there = laptop.describe_instances(InstanceIds=[identity])["Reservations"][0]["Instances"][0]["Tags"]
    laptop.create_tags(Resources=[identity], Tags=[*there, {"Key": "Name", "Value": "sky-mctl-one-head"}])
    assert aws.label_others(OURS, "one", "us-west-2") == 1
    assert aws.label_others(OURS, "one", "us-west-2") == 1  # once more changes nothing
    [part] = aws.ours(OURS, "one")
    aws.relabel(part, {"mistralctl-ttl": "120"})
    assert aws.narrow(OURS, "one", "us-west-2", 8000, ["203.0.113.0/24"]) == 1
    laptop.stop_instances(InstanceIds=[identity])
    laptop.start_instances(InstanceIds=[identity])
    laptop.modify_instance_attribute(InstanceId=identity, Groups=[other])
    aws.delete([part])
    laptop.delete_security_group(GroupId=group)
    assert aws.ours(OURS) == []
    assert account.refused == []


def test_a_node_may_end_itself_and_no_other_machine_of_the_same_owner(account: Account) -> None:
    group = account.group(account.admin, "sky-sg-mine")
    mine, beside = (account.machine(account.admin, OURS, group, name)["InstanceId"] for name in ("one", "two"))
    theirs = account.machine(account.admin, THEIRS, group, "three")["InstanceId"]
    account.node = mine
    node = account.by_node
    for other in (beside, theirs):
        refused(node.terminate_instances, InstanceIds=[other])
        refused(node.modify_instance_attribute, InstanceId=other, Groups=[group])
    refused(node.terminate_instances, InstanceIds=[mine, beside])
    refused(node.create_tags, Resources=[mine], Tags=[{"Key": "mistralctl-ttl", "Value": "never"}])
    refused(account.machine, node, OURS, group, "four")
    node.modify_instance_attribute(InstanceId=mine, Groups=[group])
    node.terminate_instances(InstanceIds=[mine])


def refused(call: Callable[..., object], *words: Any, **given: Any) -> None:
    with pytest.raises(ClientError) as caught:
        call(*words, **given)
    assert caught.value.response["Error"]["Code"] == "UnauthorizedOperation"


def test_nothing_of_a_second_owner_can_be_touched(account: Account) -> None:
    laptop, admin = account.laptop, account.admin
    mine = account.machine(laptop, OURS, account.group(laptop, "sky-sg-mine"))["InstanceId"]
    group, plain = (
        account.group(admin, "sky-sg-theirs"),
        admin.create_security_group(GroupName="plain", Description="x")["GroupId"],
    )
    machine = account.machine(admin, THEIRS, group)
    theirs, volume = machine["InstanceId"], machine["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
    bare = account.machine(admin, THEIRS, group, "bare")["InstanceId"]
    admin.delete_tags(Resources=[bare], Tags=[{"Key": "mistralctl-owner"}])
    disk = admin.create_volume(AvailabilityZone="us-west-2a", Size=8)["VolumeId"]
    address = admin.allocate_address(Domain="vpc")["AllocationId"]
    card = admin.create_network_interface(SubnetId=machine["SubnetId"])["NetworkInterface"]["NetworkInterfaceId"]
    admin.create_tags(Resources=[group, disk, address, card], Tags=[{"Key": "mistralctl-owner", "Value": THEIRS}])
    before = everything(admin)
    label = [{"Key": "mistralctl-owner", "Value": OURS}]
    rule = [{"IpProtocol": "tcp", "FromPort": 1, "ToPort": 9, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    for identity in (theirs, bare):
        refused(laptop.terminate_instances, InstanceIds=[identity])
        refused(laptop.terminate_instances, InstanceIds=[mine, identity])
        refused(laptop.stop_instances, InstanceIds=[identity])
        refused(laptop.start_instances, InstanceIds=[identity])
        refused(laptop.modify_instance_attribute, InstanceId=identity, Groups=[group])
        refused(laptop.reboot_instances, InstanceIds=[identity])
    for identity in (theirs, bare, volume, disk, address, card, group, plain):  # to label it first, and then to end it
        refused(laptop.create_tags, Resources=[identity], Tags=label)
        refused(laptop.create_tags, Resources=[identity], Tags=[*label, {"Key": "skypilot", "Value": "true"}])
        refused(laptop.create_tags, Resources=[identity], Tags=[{"Key": "mistralctl-ttl", "Value": "1"}])
        refused(laptop.delete_tags, Resources=[identity], Tags=[{"Key": "mistralctl-owner"}])
    refused(laptop.create_tags, Resources=[mine, theirs], Tags=label)
    refused(laptop.create_tags, Resources=[mine], Tags=[{"Key": "mistralctl-owner", "Value": THEIRS}])  # nor given away
    for identity in (disk, volume):
        refused(laptop.delete_volume, VolumeId=identity)
    refused(laptop.release_address, AllocationId=address)
    refused(laptop.delete_network_interface, NetworkInterfaceId=card)
    for one in (group, plain):
        refused(laptop.authorize_security_group_ingress, GroupId=one, IpPermissions=rule)
        refused(laptop.revoke_security_group_ingress, GroupId=one, IpPermissions=rule)
        refused(laptop.delete_security_group, GroupId=one)
    for owner in (THEIRS, "", f"{OURS}x"):  # a machine under another's label, or none
        refused(account.machine, laptop, owner, group)
    refused(laptop.run_instances, ImageId=AMIS[0]["ami_id"], MinCount=1, MaxCount=1, InstanceType="m6i.large")
    assert everything(admin) == before


def everything(ec2: Any) -> Any:
    """All that there is and how it is labelled."""
    return [
        [one for held in ec2.describe_instances()["Reservations"] for one in held["Instances"]],
        ec2.describe_volumes()["Volumes"], ec2.describe_security_groups()["SecurityGroups"],
        ec2.describe_addresses()["Addresses"], ec2.describe_network_interfaces()["NetworkInterfaces"],
    ]  # fmt: skip


def test_the_policy_of_before_let_its_holder_end_anybodys_machine(account: Account) -> None:
    account.policies[LAPTOP] = {
        "Statement": [
            {"Effect": "Allow", "Action": ["ec2:CreateTags"], "Resource": "*"},
            {
                "Effect": "Allow", "Action": ["ec2:TerminateInstances"], "Resource": "*",
                "Condition": {"StringLike": {"aws:ResourceTag/mistralctl-owner": "*"}},
            },
        ]
    }  # fmt: skip
    theirs = account.machine(account.admin, THEIRS, account.group(account.admin, "sky-sg-theirs"))["InstanceId"]
    account.laptop.create_tags(Resources=[theirs], Tags=[{"Key": "mistralctl-owner", "Value": OURS}])
    account.laptop.terminate_instances(InstanceIds=[theirs])


@pytest.mark.parametrize(
    ("condition", "context", "allowed"),
    [
        ({"StringEquals": {"k": "a"}}, {"K": "a"}, True),
        ({"StringEquals": {"k": "a"}}, {}, False),
        ({"StringEqualsIfExists": {"k": "a"}}, {}, True),
        ({"StringEqualsIfExists": {"k": "a"}}, {"k": "b"}, False),
        ({"StringLike": {"k": "a*"}}, {"k": "abc"}, True),
        ({"Null": {"k": "true"}}, {}, True),
        ({"Null": {"k": "true"}}, {"k": ""}, False),
        ({"ForAllValues:StringEquals": {"k": ["a", "b"]}}, {"k": ["a"]}, True),
        ({"ForAllValues:StringEquals": {"k": ["a", "b"]}}, {"k": ["a", "c"]}, False),
        ({"ForAllValues:StringEquals": {"k": ["a"]}}, {}, True),
        ({"ForAnyValue:StringEquals": {"k": ["a"]}}, {"k": ["c", "a"]}, True),
        ({"ArnLike": {"k": "arn:aws:ec2:*:*:instance/${i}"}}, {"k": "arn:aws:ec2:x:1:instance/i-1", "i": "i-1"}, True),
        ({"ArnLike": {"k": "arn:aws:ec2:*:*:instance/${i}"}}, {"k": "arn:aws:ec2:x:1:instance/i-1", "i": "i-2"}, False),
        ({"ArnLike": {"k": "arn:aws:ec2:*:*:instance/${i}"}}, {"k": "arn:aws:ec2:x:1:instance/i-1"}, False),
    ],
)
def test_conditions_mean_what_iams_documentation_says(condition: dict[str, Any], context: dict[str, Any], allowed: bool) -> None:
    statement = {"Effect": "Allow", "Action": ["ec2:X"], "Resource": ["arn:aws:ec2:*:*:instance/*"], "Condition": condition}
    request = Request("ec2:X", "arn:aws:ec2:r:1:instance/i-1", context)
    assert allows({"Statement": [statement]}, request) is allowed
    assert not allows({"Statement": [statement, {"Effect": "Deny", "Action": "*", "Resource": "*"}]}, request)


class Name(str):
    """resource.name in Google's expression language: https://cloud.google.com/iam/docs/conditions-attribute-reference#extract"""

    def extract(self, template: str) -> Name:
        """The text between what comes before and after the braces; empty without both."""
        before, after = template.partition("{")[0], template.partition("}")[2]
        rest = self.partition(before)[2]
        return Name(rest if not after else rest.partition(after)[0] if after in rest else "")

    startsWith, endsWith = str.startswith, str.endswith  # noqa: N815 - Google's names


@pytest.mark.parametrize(
    ("kind", "name", "allowed"),
    [
        ("Instance", "zones/z/instances/mctl-one-0a1b2c3d-head-x1y2-compute", True),
        ("Instance", "zones/z/instances/mctl-one-ffffffff-head-x1y2-compute", False),
        ("Instance", "zones/z/instances/mctl-0a1b2c3d-ffffffff-head-x1y2-compute", False),
        ("Instance", "zones/z/instances/database", False),
        ("Disk", "zones/z/disks/mctl-one-0a1b2c3d-head-x1y2-compute", True),
        ("Disk", "zones/z/disks/mctl-one-ffffffff-head-x1y2-compute", False),
        ("Disk", "zones/z/disks/data-0a1b2c3d", False),
        ("Firewall", "global/firewalls/sky-ports-mctl-one-0a1b2c3d", True),
        ("Firewall", "global/firewalls/sky-ports-mctl-one-ffffffff", False),
        ("Firewall", "global/firewalls/default-allow-ssh", False),
        ("Network", "global/networks/default", True),
    ],
)
def test_googles_condition_lets_through_what_skypilot_named_for_this_user(kind: str, name: str, allowed: bool) -> None:
    expression = yaml.safe_load((ROLES / "gcp-condition.yaml").read_text())["expression"].replace("SKYPILOT_USER", "0a1b2c3d")
    python = (
        expression.replace("&&", " and ").replace("||", " or ").replace("resource.type", "kind").replace("resource.name", "name")
    )
    found = eval(python, {"kind": f"compute.googleapis.com/{kind}", "name": Name(f"projects/p/{name}")})  # noqa: S307 - our own file
    assert found is allowed


def test_a_role_is_printed_with_this_homes_owner(mistralctl: Callable[..., CompletedProcess[str]], home: Path) -> None:
    printed = mistralctl("doctor", "--role", "aws", MISTRALCTL_OWNER="")
    owner = (home / ".mistralctl" / "owner").read_text().strip()
    assert printed.stdout == (ROLES / "aws.json").read_text().replace("OWNER", owner)
    assert printed.stdout.count(owner) == 8
    assert mistralctl("doctor", "--role", "aws-node").stdout == (ROLES / "aws-node.json").read_text()
    condition = mistralctl("doctor", "--role", "gcp-condition", SKYPILOT_USER_ID="0a1b2c3d").stdout
    assert condition.count("-0a1b2c3d") == 3
    failed = mistralctl("doctor", "--role", "gcp-condition")
    assert (failed.returncode, failed.stderr.count("\n")) == (8, 1)
    wrong = mistralctl("doctor", "--role", "ibm")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "mistralctl: --role: 'ibm' is not one of aws, aws-node, gcp, gcp-condition, azure\n",
    )
