"""AWS: vCPUs of running instances, a quota for each group of families, on demand and spot apart, in each region.

The groups, their names and codes: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-on-demand-instances.html#ec2-on-demand-instances-limits
and https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/using-spot-limits.html, whose tables link each name to its code.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mistralctl import state
from mistralctl.quotas import Found, Need, Unknown, Wanted

SECONDS = 4
_MAKING = threading.Lock()  # clients may be used side by side, but not made side by side


@dataclass(frozen=True)
class Group:
    """Families that share a quota: the pattern of an instance type, and the quota's code and name."""

    types: str
    spot: bool
    code: str
    name: str


GROUPS = (
    Group(r"(gr?|vt)\d", False, "L-DB2E81BA", "Running On-Demand G and VT instances"),
    Group(r"(gr?|vt)\d", True, "L-3819A6DF", "All G and VT Spot Instance Requests"),
    Group(r"p\d", False, "L-417A185B", "Running On-Demand P instances"),
    Group(r"p[2-4]", True, "L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests"),
    Group(r"p5", True, "L-C4BD4855", "All P5 Spot Instance Requests"),
    Group(r"[acdhimrtz]\d", False, "L-1216C47A", "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
    Group(r"[acdhimrtz]\d", True, "L-34B43A08", "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
)
BY_CODE = {group.code: group for group in GROUPS}


def needs(wanted: Wanted) -> Sequence[Need]:
    """The one quota of its group."""
    return [
        Need(group.code, group.name, wanted.vcpus, "vCPUs")
        for group in GROUPS
        if group.spot == wanted.spot and re.match(group.types, wanted.instance_type)
    ]


def page(region: str, code: str) -> str:
    """The quota's own page of the console."""
    return f"https://{region}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{code}"


@contextmanager
def _asked() -> Iterator[Any]:
    """A function that makes clients; AWS's errors as one line."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    except ImportError as error:
        raise Unknown("AWS's SDK is not installed") from error
    config = Config(connect_timeout=SECONDS, read_timeout=SECONDS, retries={"total_max_attempts": 2})

    def client(service: str, region: str) -> Any:
        with _MAKING:
            return boto3.client(service, region_name=region, config=config)

    try:
        with state.secrets_hidden():  # from the programs that credentials come from
            yield client
    except NoCredentialsError as error:
        raise Unknown("no credentials (aws configure)") from error
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        raise Unknown(f"{error.operation_name}: {code}") from error
    except BotoCoreError as error:
        raise Unknown(f"AWS does not answer ({type(error).__name__})") from error


def _used(ec2: Any, group: Group) -> float:
    """vCPUs of the instances that count against a group: those that run or start."""
    types: Counter[str] = Counter()
    filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    for found in ec2.get_paginator("describe_instances").paginate(Filters=filters):
        for one in (one for reservation in found["Reservations"] for one in reservation["Instances"]):
            if (one.get("InstanceLifecycle") == "spot") == group.spot and re.match(group.types, one["InstanceType"]):
                types[one["InstanceType"]] += 1
    if not types:
        return 0
    pages = ec2.get_paginator("describe_instance_types").paginate(InstanceTypes=sorted(types))
    return float(
        sum(types[one["InstanceType"]] * one["VCpuInfo"]["DefaultVCpus"] for page in pages for one in page["InstanceTypes"])
    )


def ask(region: str, needs: Sequence[Need]) -> Found:
    """By Service Quotas, and by EC2's own listing of what runs; `Unknown` if AWS does not say."""
    found: dict[str, tuple[float, float | None]] = {}
    with _asked() as client:
        quotas = client("service-quotas", region)
        for need in needs:
            limit = float(quotas.get_service_quota(ServiceCode="ec2", QuotaCode=need.code)["Quota"]["Value"])
            found[need.code] = (limit, None)
    try:
        with _asked() as client:
            ec2 = client("ec2", region)
            for need in needs:
                limit, _ = found[need.code]
                if limit >= need.amount:
                    found[need.code] = (limit, _used(ec2, BY_CODE[need.code]))
    except Unknown:
        return found  # the limit alone
    return found


def regions() -> Sequence[str]:
    """Those that are enabled for this account; `Unknown` if AWS does not say."""
    with _asked() as client:
        return sorted(one["RegionName"] for one in client("ec2", "us-east-1").describe_regions()["Regions"])
