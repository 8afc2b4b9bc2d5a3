from __future__ import annotations

from pathlib import Path

import pytest
from mistralctl import clouds, refusals
from mistralctl.errors import Exit
from mistralctl.refusals import Refusal, read, refused

AWS = (
    "\x1b[0m⚙︎ Launching on AWS us-east-1\x1b[0m (us-east-1a,us-east-1b).\n"
    "botocore.exceptions.ClientError: An error occurred (InsufficientInstanceCapacity) when calling the RunInstances operation: "
    "We currently do not have sufficient g6.xlarge capacity in the Availability Zone you requested (us-east-1a).\n"
    "An error occurred (VcpuLimitExceeded) when calling the RunInstances operation: You have requested more vCPU capacity than "
    "your current vCPU limit of 0 allows in us-west-2\n"
    "An error occurred (UnauthorizedOperation) when calling the RunInstances operation: You are not authorized.\n"
)


def test_each_place_and_code_once_with_what_is_missing() -> None:
    assert read([AWS, AWS]) == [
        Refusal("us-east-1a", "capacity", "InsufficientInstanceCapacity", ""),
        Refusal("us-west-2", "quota", "VcpuLimitExceeded", ""),
        Refusal("us-east-1a", "permission", "UnauthorizedOperation", "RunInstances"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "Got return code 'QUOTA_EXCEEDED' in us-central1-a: Quota 'NVIDIA_L4_GPUS' exceeded. Limit: 0.0 in region us-central1.",
            Refusal("us-central1-a", "quota", "QUOTA_EXCEEDED", "NVIDIA_L4_GPUS"),
        ),
        ("Got return code 'ZONE_RESOURCE_POOL_EXHAUSTED' in us-east4-c", Refusal("us-east4-c", "capacity", "ZONE_RESOURCE_POOL_EXHAUSTED", "")),
        ("Got return codes 'VM_MIN_COUNT_NOT_REACHED', 'ZONE_RESOURCE_POOL_EXHAUSTED' in us-east4-c: 'Requested minimum count of 1'",
         Refusal("us-east4-c", "capacity", "ZONE_RESOURCE_POOL_EXHAUSTED", "")),
        ("Got return code 'forbidden' in us-east4-c: \"Required 'compute.instances.create' permission for 'projects/p'\"",
         Refusal("us-east4-c", "permission", "forbidden", "compute.instances.create")),
        ("\x1b[33mFound no quota for g2-standard-4 on-demand instances in region us-east4 in GCP. \x1b[0mTo request quotas, see",
         Refusal("us-east4", "quota", "no quota", "g2-standard-4 on-demand")),
        ("(OperationNotAllowed) Operation could not be completed as it results in exceeding approved StandardNCADSA100v4Family Cores quota.",
         Refusal("", "quota", "OperationNotAllowed", "StandardNCADSA100v4Family")),
        ("Launching on Azure eastus.\n(OperationNotAllowed) ... exceeding approved Standard NCASv3_T4 Family Cores quota.",
         Refusal("eastus", "quota", "OperationNotAllowed", "Standard NCASv3_T4 Family")),
        ("(AuthorizationFailed) The client 'a' with object id 'b' does not have authorization to perform action "
         "'Microsoft.Compute/virtualMachines/write' over scope '/subscriptions/c'",
         Refusal("", "permission", "AuthorizationFailed", "Microsoft.Compute/virtualMachines/write")),
        ("Launching on Azure eastus.\n(MissingSubscriptionRegistration) The subscription is not registered to use namespace "
         "'Microsoft.Compute'. See https://aka.ms/rps-not-found for how to register subscriptions.",
         Refusal("eastus", "registration", "MissingSubscriptionRegistration", "Microsoft.Compute")),
        ("ERROR: AADSTS700082: The refresh token has expired due to inactivity.", Refusal("", "credentials", "AADSTS700082", "")),
        ("(SkuNotAvailable) The requested VM size is not available", Refusal("", "capacity", "SkuNotAvailable", "")),
    ],
)  # fmt: skip
def test_the_codes_of_other_clouds(line: str, expected: Refusal) -> None:
    assert read([line]) == [expected]


def test_a_detail_that_is_said_later_counts() -> None:
    log = (
        'Launching on GCP europe-west4 (europe-west4-a).\nWARNING:googleapiclient.http:Encountered 403 with reason "forbidden"\n'
        "Got return code 'forbidden' in europe-west4-a: \"Required 'compute.instances.create' permission for 'projects/p'\"\n"
    )
    assert read([log]) == [Refusal("europe-west4-a", "permission", "forbidden", "compute.instances.create")]


def test_what_refused_before_a_machine_was_found(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    assert refusals.on_the_way(log) == ""
    log.write_text("Launching on AWS us-east-1 (us-east-1a).\nAll is well.\n")
    assert refusals.on_the_way(log) == ""
    log.write_text("".join(f"Got return code 'QUOTA_EXCEEDED' in us-east4-{zone}: Quota 'CPUS' exceeded.\n" for zone in "abc"))
    assert refusals.on_the_way(log) == ("refused on the way: us-east4 a b c (quota, QUOTA_EXCEEDED: CPUS)")
    log.write_text(
        "".join(f"InsufficientInstanceCapacity in us-east-1{zone}\n" for zone in "ab") + "AllocationFailed in eastus2\n"
    )
    assert (
        refusals.on_the_way(log)
        == "refused on the way: us-east-1 a b (capacity, InsufficientInstanceCapacity), ? (capacity, AllocationFailed)"
    )
    with log.open("a") as file:
        file.writelines(f"(SkuNotAvailable) in asia-east{n}-a\n" for n in range(9))
    assert refusals.on_the_way(log).endswith(f"asia-east5 a (capacity, SkuNotAvailable), and 3 more (log: {log})")


def test_the_error_is_one_line_and_a_table(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    log.write_text(AWS)
    error = refused("Failed to acquire resources", [RuntimeError("nothing to see")], log)
    assert error.code == Exit.CLOUD
    assert str(error) == (
        "no cloud gave a machine, 3 refused; capacity: try again later, or allow more: --cloud, another --region, --accelerators, "
        "--no-spot; quota: ask the cloud for a larger quota, or use another --region; permission: give the identity the right that "
        f"is named (log: {log})"
    )
    assert error.details.splitlines()[0] == "  us-east-1a  capacity    InsufficientInstanceCapacity"
    assert len(error.details.splitlines()) == 3


def test_without_a_code_skypilots_own_words_are_passed_on(tmp_path: Path) -> None:
    error = refused("\n  Catalog does not contain any instances\nmore", [], tmp_path / "none")
    assert str(error) == f"no cloud gave a machine: Catalog does not contain any instances (log: {tmp_path / 'none'})"
    assert error.details == ""


def test_every_kind_has_its_advice() -> None:
    assert {kind for errors in clouds.errors() for kind in errors.codes.values()} <= set(refusals.ADVICE)


def test_a_price_limit_that_todays_catalog_cannot_meet(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    log.write_text(
        "No resource satisfying AWS([cpus=2+]) on AWS.\n\x1b[90m- Max hourly cost limit ($0.2/hr) may be too restrictive. Try\n"
    )
    assert str(refused("Catalog does not contain any instances", [], log)) == (
        "--max-price 0.2 USD an hour: by today's catalog of SkyPilot no such machine costs so little; raise --max-price, or allow more "
        f"places (log: {log})"
    )


LIBRARY = (
    "⚙︎ Launching on Azure eastus.\nWARNING:azure.mgmt.core.policies._base:Resource provider 'Microsoft.Compute' used by this operation is "
    "not registered. We are registering for you.\nWARNING:azure.mgmt.core.policies._base:{}\n"
)


def test_what_azures_libraries_cannot_register_is_a_refusal_and_what_they_can_is_none(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    log.write_text(LIBRARY.format("Registration failed. Please register manually."), "utf-8")
    error = refused("Failed to provision all possible launchable resources.", [], log)
    assert "registration: run az provider register -n Microsoft.Compute --wait (log: " in str(error)
    assert error.details == "  eastus  registration  MissingSubscriptionRegistration: Microsoft.Compute"
    log.write_text(LIBRARY.format("Registration succeeded."), "utf-8")
    assert refusals.on_the_way(log) == ""


def test_a_resource_provider_that_is_not_registered_comes_with_the_command(tmp_path: Path) -> None:
    words = "(MissingSubscriptionRegistration) The subscription is not registered to use namespace '{}'."
    history = [Exception(words.format(name)) for name in ("Microsoft.Compute", "Microsoft.Compute", "Microsoft.Network")]
    error = refused("", history, tmp_path / "none.log")
    assert error.code is Exit.CLOUD
    commands = "az provider register -n Microsoft.Compute --wait, az provider register -n Microsoft.Network --wait"
    assert f"registration: run {commands} (log: " in str(error)
