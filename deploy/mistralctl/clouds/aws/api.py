"""What of ours AWS has, by its own API: without SkyPilot's database or any file of this laptop."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from mistralctl import state
from mistralctl.clouds import NotUsed, Part, Refused, ahead, part_by_part, understood
from mistralctl.clouds.aws.errors import ERRORS
from mistralctl.errors import Exit, UserError

GONE = "terminated"
SKEW_SECONDS = 240.0  # AWS takes no request that was signed five minutes earlier or later
PROTECTED = "disableApiTermination"  # in the words with which AWS keeps a machine
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}
_MAKING = threading.Lock()  # several at once would each make a session and read the model of all of EC2


def _client(service: str, region: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise NotUsed("AWS's SDK is not installed; pip install 'mistralctl[aws]'", Exit.CLOUD) from error
    with _MAKING:
        return boto3.client(
            service, region_name=region, config=Config(**TIMEOUTS, retries={"mode": "standard", "max_attempts": 6})
        )


def _tags(of: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in of.get("Tags", [])}


def _filters(owner: str | None, name: str | None) -> list[dict[str, Any]]:
    wanted = {"mistralctl-owner": owner, "mistralctl-name": name}
    found = [{"Name": f"tag:{key}", "Values": [value]} for key, value in wanted.items() if value]
    return found or [{"Name": "tag-key", "Values": ["mistralctl-name"]}]


def _ahead(answer: Mapping[str, Any]) -> float:
    return ahead(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date"))


def _machines(ec2: Any, wanted: Sequence[Any], disks: Mapping[str, float], refused: Refused | None = None) -> Iterator[Part]:
    """The machines that the filters `wanted` let through; `disks` are the GiB of those that are attached, by machine."""
    for page in ec2.get_paginator("describe_instances").paginate(Filters=wanted):

        def machine(one: dict[str, Any], ahead: float = _ahead(page)) -> Part | None:
            if one["State"]["Name"] == GONE:
                return None
            return Part(
                "aws", "machine", one["InstanceId"], one["Placement"]["AvailabilityZone"], one["State"]["Name"],
                one["InstanceType"], one["LaunchTime"].timestamp(), _tags(one), ahead, disks.get(one["InstanceId"]),
            )  # fmt: skip

        for reservation in page["Reservations"]:
            yield from understood(refused, "machine", reservation["Instances"], machine)


def _disks(ec2: Any, wanted: Sequence[Any], attached: dict[str, float], refused: Refused | None) -> Iterator[Part]:
    """The disks without a machine; those that have one go with it, and are added to `attached`."""
    for page in ec2.get_paginator("describe_volumes").paginate(Filters=wanted):

        def disk(one: dict[str, Any], ahead: float = _ahead(page)) -> Part | None:
            for machine in one.get("Attachments", ()):
                attached[machine["InstanceId"]] = attached.get(machine["InstanceId"], 0.0) + float(one["Size"])
            if one["State"] != "available":
                return None
            return Part(
                "aws", "disk", one["VolumeId"], one["AvailabilityZone"], one["State"], f"{one['Size']} GiB",
                one["CreateTime"].timestamp(), _tags(one), ahead,
            )  # fmt: skip

        yield from understood(refused, "disk", page["Volumes"], disk)


def _addresses(ec2: Any, wanted: Sequence[Any], region: str, refused: Refused | None) -> Iterator[Part]:
    """Neither SkyPilot nor mistralctl makes these or interfaces on AWS; who gives a deployment one and labels it finds it here."""

    def address(one: dict[str, Any]) -> Part | None:
        if "AssociationId" in one:
            return None
        public = one.get("PublicIp") or one.get("CarrierIp", "")  # of a carrier's network
        return Part("aws", "address", one["AllocationId"], region, "unused", public, None, _tags(one))

    yield from understood(refused, "address", ec2.describe_addresses(Filters=wanted)["Addresses"], address)


def _interfaces(ec2: Any, wanted: Sequence[Any], refused: Refused | None) -> Iterator[Part]:
    def interface(one: dict[str, Any]) -> Part | None:
        if one["Status"] != "available":
            return None
        tags, address = (
            _tags({"Tags": one.get("TagSet", [])}),
            one.get("PrivateIpAddress", ""),
        )  # none in a subnet of version 6 alone
        return Part("aws", "interface", one["NetworkInterfaceId"], one["AvailabilityZone"], "unused", address, None, tags)

    for page in ec2.get_paginator("describe_network_interfaces").paginate(Filters=wanted):
        yield from understood(refused, "interface", page["NetworkInterfaces"], interface)


def _region(region: str, owner: str | None, name: str | None, refused: Refused | None) -> list[Part]:
    """What is ours in a region; without its machines nobody could say what they left, so that is not asked then."""
    ec2, wanted, found = _client("ec2", region), _filters(owner, name), list[Part]()
    attached: dict[str, float] = {}
    with part_by_part(refused, region), _asked():
        found += _disks(ec2, wanted, attached, refused)
    machines: list[Part] | None = None
    with part_by_part(refused, region), _asked():
        machines = list(_machines(ec2, wanted, attached, refused))
    if machines is None:
        return []
    with part_by_part(refused, region), _asked():
        found += _addresses(ec2, wanted, region, refused)
    with part_by_part(refused, region), _asked():
        found += _interfaces(ec2, wanted, refused)
    return machines + found


def identity() -> str:
    """The ARN that these credentials stand for; UserError if AWS does not take them (expired, wrong, none)."""
    with _asked():
        return str(_client("sts", "us-east-1").get_caller_identity()["Arn"])


def account() -> str:
    """The number of the account of these credentials; UserError if AWS does not take them."""
    with _asked():
        return str(_client("sts", "us-east-1").get_caller_identity()["Account"])


def regions() -> list[str]:
    """The regions that this account may use."""
    return sorted(one["RegionName"] for one in _client("ec2", "us-east-1").describe_regions()["Regions"])


@contextmanager
def _asked() -> Iterator[None]:
    """AWS's errors as one line."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    except ImportError as error:
        raise NotUsed("AWS's SDK is not installed; pip install 'mistralctl[aws]'", Exit.CLOUD) from error
    try:
        with state.secrets_hidden():  # from the programs that credentials come from
            yield
    except NoCredentialsError as error:
        raise NotUsed("there are no credentials for AWS here; run aws configure", Exit.CLOUD) from error
    except ClientError as error:
        said = error.response.get("Error", {})
        code, what = said.get("Code", ""), "give this identity that right"
        if ERRORS.codes.get(code) == "credentials":
            what, skew = "sign in again: aws configure", _ahead(error.response)
            if abs(skew) > SKEW_SECONDS:
                what = (
                    f"this machine's clock is {abs(skew) / 3600:.1f} hours {'behind' if skew > 0 else 'ahead of'} AWS's: set it"
                )
        elif PROTECTED in said.get("Message", ""):
            what = (
                "it is protected from termination: aws ec2 modify-instance-attribute --no-disable-api-termination, then try again"
            )
        raise UserError(f"AWS refused {error.operation_name} ({code}); {what}", Exit.CLOUD) from error
    except BotoCoreError as error:
        raise UserError(f"AWS cannot be asked: {error}", Exit.CLOUD) from error


def ours(owner: str | None, name: str | None = None, within: Iterable[str] | None = None) -> list[Part]:
    """What `listed` lists; UserError if anything of it is refused."""
    return listed(owner, name, within, None)


def listed(owner: str | None, name: str | None, within: Iterable[str] | None, refused: Refused | None) -> list[Part]:
    """Machines that are not gone, and disks, addresses and interfaces without one, with our labels; `owner` None: everybody's.

    NotUsed without credentials, UserError if AWS refuses; with `refused` a region that it refuses is added there.
    """
    with _asked(), ThreadPoolExecutor(8) as pool:
        places = list(within) if within is not None else regions()
        return [part for parts in pool.map(lambda region: _region(region, owner, name, refused), places) for part in parts]


def machines(owner: str | None, within: Iterable[str]) -> list[Part]:
    """The machines of what `ours` lists, in one question a region; NotUsed without credentials, UserError if AWS refuses."""
    with _asked(), ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda region: list(_machines(_client("ec2", region), _filters(owner, None), {})), within)
        return [part for parts in found for part in parts]


def _region_of(part: Part) -> str:
    return part.place.rstrip("abcdefghijklmnopqrstuvwxyz")


def relabel(part: Part, labels: Mapping[str, str]) -> None:
    """Sets these tags of a machine and leaves its others as they are; UserError if AWS refuses."""
    with _asked():
        tags = [{"Key": key, "Value": value} for key, value in labels.items()]
        _client("ec2", _region_of(part)).create_tags(Resources=[part.id], Tags=tags)


def delete(parts: Sequence[Part]) -> None:
    """Asks AWS to terminate machines, with their disks, and to delete what is left without one; UserError if it refuses."""
    from botocore.exceptions import ClientError

    with _asked():
        for part in parts:
            ec2 = _client("ec2", _region_of(part))
            try:
                if part.kind == "machine":
                    ec2.terminate_instances(InstanceIds=[part.id])
                elif part.kind == "disk":
                    ec2.delete_volume(VolumeId=part.id)
                elif part.kind == "address":
                    ec2.release_address(AllocationId=part.id)
                else:
                    ec2.delete_network_interface(NetworkInterfaceId=part.id)
            except ClientError as error:
                if not error.response.get("Error", {}).get("Code", "").endswith(".NotFound"):  # another one was faster
                    raise


def label_others(owner: str, name: str, region: str) -> int:
    """Labels the security groups that SkyPilot made for a deployment's machines and that bear no owner; the number of its machines.

    One that all of a user's machines share bears the owner alone; so every one does.
    """
    with _asked():
        ec2 = _client("ec2", region)
        machines = _running(ec2, owner, name)
        groups = sorted({group["GroupId"] for one in machines for group in one["SecurityGroups"]})
        for group in ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"] if groups else ():
            tags = _tags(group)
            if tags.get("skypilot") == "true" and "mistralctl-owner" not in tags:
                ec2.create_tags(Resources=[group["GroupId"]], Tags=[{"Key": "mistralctl-owner", "Value": owner}])
        return len(machines)


def _running(ec2: Any, owner: str, name: str) -> list[dict[str, Any]]:
    found = ec2.describe_instances(Filters=_filters(owner, name))["Reservations"]
    return [one for reservation in found for one in reservation["Instances"] if one["State"]["Name"] != GONE]


def narrow(owner: str, name: str, region: str, port: int, networks: Sequence[str]) -> int:
    """Lets a port of a deployment's machines be reached from these networks alone: first opened to them, then shut to all others; the
    number of groups that have a rule for it.

    Only in security groups that have a rule for that very port, which SkyPilot makes for each machine with open ports.
    """
    asked = {(network, 6 if ":" in network else 4) for network in networks}
    held = 0
    with _asked():
        ec2 = _client("ec2", region)
        groups = sorted({group["GroupId"] for one in _running(ec2, owner, name) for group in one["SecurityGroups"]})
        for group in ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"] if groups else ():
            rules = [rule for rule in group["IpPermissions"] if rule.get("FromPort") == rule.get("ToPort") == port]
            if not rules:
                continue
            held += 1
            there = {(part["CidrIp"], 4) for rule in rules for part in rule.get("IpRanges", ())}
            there |= {(part["CidrIpv6"], 6) for rule in rules for part in rule.get("Ipv6Ranges", ())}
            if new := asked - there:
                ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[_rule(port, new)])
            if old := there - asked:
                ec2.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[_rule(port, old)])
    return held


def _rule(port: int, networks: set[tuple[str, int]]) -> dict[str, Any]:
    """A security group's rule for TCP on a port from networks, each with its version of IP."""
    four = [{"CidrIp": network} for network, version in sorted(networks) if version == 4]
    six = [{"CidrIpv6": network} for network, version in sorted(networks) if version == 6]
    rule: dict[str, Any] = {"IpProtocol": "tcp", "FromPort": port, "ToPort": port}
    return rule | ({"IpRanges": four} if four else {}) | ({"Ipv6Ranges": six} if six else {})
