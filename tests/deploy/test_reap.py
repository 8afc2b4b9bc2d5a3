"""`reap` part by part: what one label, one machine, one region or one cloud refuses keeps nobody from the rest; the clouds' listings are made up."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from mistralctl import clouds, owners, sweep
from mistralctl.clouds import Part, Refused, ahead
from mistralctl.clouds.aws import api as aws
from mistralctl.clouds.azure import api as azure
from mistralctl.clouds.gcp import api as gcp
from mistralctl.commands import reap
from mistralctl.errors import Exit, UserError

NOW = 1e9
OLD = NOW - 86400.0


def part(id: str, ttl: str | None = "60", cloud: str = "aws", **changed: Any) -> Part:
    labels = {"mistralctl-name": "one"} | ({} if ttl is None else {"mistralctl-ttl": ttl})
    given: dict[str, Any] = {
        "kind": "machine",
        "place": "us-east-1a",
        "state": "running",
        "size": "g6.xlarge",
        "created": OLD,
    } | changed
    return Part(cloud, id=id, labels=labels, **given)


class Cloud:
    """A cloud that has these parts, and refuses to delete some."""

    def __init__(self, *parts: Part, keeps: dict[str, Exception] | None = None, refuses: tuple[str, ...] = ()) -> None:
        self.parts, self.keeps, self.refuses = list(parts), keeps or {}, refuses

    def listed(self, owner: str | None, name: str | None, within: Iterable[str] | None, refused: Refused | None) -> list[Part]:
        if refused is not None:
            refused += [UserError(why, Exit.CLOUD) for why in self.refuses]
        return list(self.parts)

    def ours(self, owner: str | None, name: str | None = None, within: Iterable[str] | None = None) -> list[Part]:
        return list(self.parts)

    def delete(self, parts: list[Part]) -> None:
        for one in parts:
            if one.id in self.keeps:
                raise self.keeps[one.id]
            self.parts.remove(one)


@pytest.fixture
def reaped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[reap.Reaped, str]]:
    """What reap says of these clouds after a yes, and why its exit code is not 0."""

    def run(**named: Cloud) -> tuple[reap.Reaped, str]:
        empty = Cloud()
        monkeypatch.setattr(reap, "listing", lambda cloud: named.get(cloud, empty))
        monkeypatch.setattr(
            reap, "listed_partly", lambda cloud, owner, name, refused: named.get(cloud, empty).listed(owner, name, None, refused)
        )
        monkeypatch.setattr(owners, "known", lambda environ: [("a1", None)])
        monkeypatch.setattr("mistralctl.commands.reap.time.time", lambda: NOW)
        monkeypatch.setattr("mistralctl.commands.reap.time.sleep", lambda seconds: None)
        result = reap.run([], all_owners=False, dry_run=False, confirm=lambda due: True)
        try:
            reap.check(result)
        except UserError as error:
            return result, str(error) if error.code == Exit.CLOUD else repr(error)
        return result, ""

    return run


STRANGE = ["²", "", "٣٠", "1e3", "-5", "60 ", "0x10", "9" * 40, "60\n"]


@pytest.mark.parametrize("ttl", [*STRANGE, None])
def test_a_strange_label_concerns_its_machine_alone(reaped: Any, ttl: str | None) -> None:
    result, why = reaped(aws=Cloud(part("strange", ttl), part("due")), gcp=Cloud(part("other", cloud="gcp")))
    assert {one.id: one.deleted for one in result.parts} == {"strange": False, "due": True, "other": True}
    assert why.startswith(
        f"machine strange on aws: its label mistralctl-ttl is {(ttl or '')[:40]!r}, which is no number of minutes; "
    )


def test_never_is_no_strange_label(reaped: Any) -> None:
    result, why = reaped(aws=Cloud(part("kept", "never")))
    assert ([one.deleted for one in result.parts], why) == ([False], "")


@pytest.mark.parametrize(
    "error", [UserError("it is protected; switch that off", Exit.CLOUD), RuntimeError("it is protected; switch that off")]
)
def test_what_one_machine_refuses_keeps_none_of_the_others(reaped: Any, error: Exception) -> None:
    parts = [part("first"), part("locked"), part("last"), part("disk", kind="disk", size="100 GiB")]
    result, why = reaped(aws=Cloud(*parts, keeps={"locked": error}))
    assert {one.id: one.deleted for one in result.parts} == {"first": True, "locked": False, "last": True, "disk": True}
    assert "machine locked on aws: " in why
    assert "it is protected; switch that off" in why


def test_a_region_that_refuses_is_named_and_the_others_are_reaped(reaped: Any) -> None:
    denied = "eu-west-3: AWS refused DescribeInstances (UnauthorizedOperation)"
    loose = part("loose", kind="address", created=None, size="198.51.100.7")
    result, why = reaped(aws=Cloud(part("due"), loose, refuses=(denied,)))
    assert {one.id: one.deleted for one in result.parts} == {
        "due": True,
        "loose": False,
    }  # its machine may be where nobody could look
    assert (result.clouds[0].state, why) == ("partly", f"aws: {denied}")


def test_what_a_cloud_says_that_nobody_understands_does_not_hide_the_others(reaped: Any) -> None:
    class Broken(Cloud):
        def listed(self, owner: str | None, name: str | None, within: Any, refused: Refused | None) -> list[Part]:
            raise KeyError("items")

    result, why = reaped(aws=Broken(), gcp=Cloud(part("due", cloud="gcp")))
    assert [one.deleted for one in result.parts] == [True]
    assert why == "aws: KeyError: 'items'"


def test_what_stays_listed_is_said(reaped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Cloud):
        def delete(self, parts: list[Part]) -> None:
            pass

    monkeypatch.setattr(reap, "GONE_SECONDS", -1.0)
    result, why = reaped(aws=Deaf(part("due")))
    assert ([one.deleted for one in result.parts], why.partition(": ")[0]) == ([False], "machine due on aws")
    assert "it is still there" in why


@pytest.mark.parametrize("days", [-1, 0, 1])
def test_ages_are_by_the_clouds_clock(reaped: Any, days: int) -> None:
    """The laptop says NOW; the cloud's clock is so many days ahead of it."""
    skew = days * 86400.0
    young, due = NOW + skew - 600, NOW + skew - 7200
    result, why = reaped(aws=Cloud(part("young", created=young, ahead=skew), part("due", created=due, ahead=skew)))
    assert [(one.id, one.age_minutes, one.deleted) for one in result.parts] == [("young", 10.0, False), ("due", 120.0, True)]
    assert why == ""


def test_a_stopped_machine_costs_its_disk_and_goes(reaped: Any) -> None:
    states = [("aws", "stopped"), ("azure", "deallocated"), ("gcp", "stopped")]
    named = {cloud: Cloud(part(cloud, "never", cloud, state=state, disk_gib=128.0)) for cloud, state in states}
    result, why = reaped(**named)
    assert [(one.due, one.deleted) for one in result.parts] == [
        ("it is stopped, and its disk costs", True), ("it is stopped, and its disk costs", True), ("it is deallocated, and its disk costs", True)
    ]  # fmt: skip
    assert why == ""
    for one in result.parts:
        assert one.per_day == round(128 * (clouds.facts(one.cloud).disk_price or 0) / 30.4, 2) > 0.1
    assert not reap.judge(part("young", "never", state="stopped", created=NOW - 600), NOW)


@pytest.mark.parametrize("size", ["", "None GiB", "² GiB", "large"])
def test_a_disk_of_an_unknown_size_has_no_price_and_goes(reaped: Any, size: str) -> None:
    result, _ = reaped(azure=Cloud(part("disk", cloud="azure", kind="disk", size=size)))
    assert [(one.per_day, one.deleted) for one in result.parts] == [(None, True)]


def test_ahead_is_by_the_date_of_an_answer() -> None:
    assert abs(ahead(email.utils.formatdate(time.time() + 86400)) - 86400) < 2
    assert [ahead(text) for text in (None, "", "yesterday", "²")] == [0.0] * 4


def test_a_label_counts_from_the_machines_start_by_the_clouds_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A life of an hour from now, as `up` gives a machine that is there: the laptop is a day behind."""
    told: list[dict[str, str]] = []
    created = time.time() + 86400 - 600

    class One:
        def relabel(self, part: Part, labels: dict[str, str]) -> None:
            told.append(labels)

    monkeypatch.setattr(sweep, "_listed", lambda record: [part("one", created=created, ahead=86400.0)])
    monkeypatch.setattr(sweep, "listing", lambda cloud: One())
    record: Any = type("Record", (), {"cloud": "aws", "task": {}})()
    sweep.tell_cloud(record, time.time() + 3600, here=True)
    sweep.tell_cloud(record, created + 4200)
    assert told == [{"mistralctl-ttl": "70"}] * 2 or told == [{"mistralctl-ttl": "71"}, {"mistralctl-ttl": "70"}]


class Denied:
    """A client of AWS's that a policy keeps from some calls."""

    def __init__(self, real: Any, denied: tuple[str, ...]) -> None:
        self._real, self._denied = real, denied

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_paginator(self, name: str) -> Any:
        from botocore.exceptions import ClientError

        if name in self._denied:
            raise ClientError(
                {"Error": {"Code": "UnauthorizedOperation", "Message": "with an explicit deny in a service control policy"}}, name
            )
        return self._real.get_paginator(name)


def test_aws_lists_the_regions_that_answer_and_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setattr(aws, "regions", lambda: ["us-west-2", "eu-west-3"])
    client = aws._client
    monkeypatch.setattr(
        aws,
        "_client",
        lambda service, region: Denied(client(service, region), ("describe_instances",) if region == "eu-west-3" else ()),
    )
    tags = [{"ResourceType": kind, "Tags": [{"Key": "mistralctl-name", "Value": "one"}]} for kind in ("instance", "volume")]
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-west-2")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="g6.xlarge", TagSpecifications=tags)
        refused: Refused = []
        [machine] = aws.listed(None, None, None, refused)
        assert (machine.id, machine.disk_gib) == (made["Instances"][0]["InstanceId"], 8.0)
        [why] = map(str, refused)
        assert why == "eu-west-3: AWS refused describe_instances (UnauthorizedOperation); give this identity that right"
        with pytest.raises(UserError, match="UnauthorizedOperation"):
            aws.ours(None)
        ec2.modify_instance_attribute(InstanceId=machine.id, DisableApiTermination={"Value": True})
        with pytest.raises(
            UserError, match=r"TerminateInstances .* protected from termination: aws ec2 modify-instance-attribute "
        ):
            aws.delete([machine])


@pytest.mark.parametrize(("days", "word"), [(1, "24.0 hours behind AWS's"), (-1, "24.0 hours ahead of AWS's")])
def test_credentials_that_aws_refuses_for_the_clock_are_called_that(days: int, word: str) -> None:
    from botocore.exceptions import ClientError

    date = email.utils.formatdate(time.time() + days * 86400)
    answer: Any = {"Error": {"Code": "RequestExpired"}, "ResponseMetadata": {"HTTPHeaders": {"date": date}}}
    with pytest.raises(UserError, match=rf"\(RequestExpired\); this machine's clock is {word}: set it$"), aws._asked():
        raise ClientError(answer, "DescribeRegions")


class Answer:
    """An answer of Google's."""

    status_code, reason = 200, "OK"

    def __init__(self, data: Any, date: float) -> None:
        self.data, self.headers = data, {"Date": email.utils.formatdate(date)}

    def json(self) -> Any:
        if isinstance(self.data, str):
            raise ValueError(self.data)
        return self.data


def test_gcp_names_a_zone_that_does_not_answer_and_then_judges_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    made = "2026-11-28T10:00:00.000-00:00"
    machine = {
        "name": "mctl-one-1-head", "status": "TERMINATED", "machineType": "x/g2-standard-4", "zone": "x/us-central1-a", "creationTimestamp": made,
        "labels": {"mistralctl-name": "one"}, "disks": [{"diskSizeGb": "128"}],
    }  # fmt: skip
    rule = {
        "name": "sky-ports-mctl-two-0123abcd",
        "creationTimestamp": made,
        "description": "mistralctl-name=two mistralctl-owner=a1",
    }
    pages: dict[str, Any] = {
        "aggregated/instances": {"items": {"zones/us-central1-a": {"instances": [machine]}}, "unreachables": ["projects/p/zones/us-east1-b"]},
        "aggregated/disks": {}, "global/firewalls": {"items": [rule]},
    }  # fmt: skip

    class Session:
        def request(self, method: str, url: str, **_: Any) -> Answer:
            return Answer(pages[url.split("/projects/p/")[1]], time.time() + 86400)

    monkeypatch.setattr(gcp, "_signed_in", lambda: (Session(), "p"))
    refused: Refused = []
    [found] = gcp.listed(None, None, None, refused)
    assert (found.state, found.disk_gib, round(found.ahead / 100)) == ("stopped", 128.0, 864)
    assert list(map(str, refused)) == ["us-east1-b: GCP does not say which instances are there; try again later"]
    pages["aggregated/instances"] = {}  # now all is known, and a rule that outlived its machine is listed
    assert [one.kind for one in gcp.listed(None, None, None, None)] == ["rule"]
    pages["global/firewalls"] = "<html>"
    with pytest.raises(UserError, match="GCP answered GET global/firewalls with what is no JSON"):
        gcp.listed(None, None, None, None)


def test_azure_judges_no_groups_where_it_does_not_list_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    from azure.core.exceptions import HttpResponseError

    class Nobody:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

    class Machines:
        def list_all(self, **_: Any) -> Any:
            raise HttpResponseError("busy")

    class Compute:
        virtual_machines = Machines()
        disks = type("Disks", (), {"list": lambda self: []})()

    monkeypatch.setattr(azure, "_clients", lambda clock: (Compute(), Nobody()))
    refused: Refused = []
    assert azure.listed(None, None, None, refused) == []
    assert [str(one).partition(";")[0] for one in refused] == ["Azure refused (HttpResponseError): busy"]


MACHINE = {
    "name": "good", "status": "RUNNING", "machineType": "x/g2-standard-4", "zone": "x/us-central1-a", "labels": {"mistralctl-name": "one"},
    "creationTimestamp": "2026-11-28T10:00:00Z", "disks": [{"diskSizeGb": "128"}],
}  # fmt: skip


ODD: list[dict[str, Any]] = [
    {"status": None}, {"creationTimestamp": "yesterday"}, {"creationTimestamp": ""}, {"disks": [{"diskSizeGb": "many"}]}, {"disks": [7]},
    {"labels": None}, {"zone": 7}, {"machineType": None},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_machine_that_nobody_understands_hides_no_other(monkeypatch: pytest.MonkeyPatch, odd: dict[str, Any]) -> None:
    machines = [MACHINE | {"name": "bad"} | odd, MACHINE]

    def call(method: str, path: str, body: Any = None, query: Any = None) -> dict[str, Any]:
        return {"items": {"z": {"instances": machines}}, gcp.AHEAD: 0.0} if path == "aggregated/instances" else {gcp.AHEAD: 0.0}

    monkeypatch.setattr(gcp, "_call", call)
    refused: Refused = []
    assert [part.id for part in gcp.listed(None, None, None, refused)] == ["good"]
    [why] = map(str, refused)
    assert why.startswith("a machine is listed that cannot be understood (")
    with pytest.raises(UserError, match="cannot be understood"):
        gcp.machines(None, ["us-central1"])


def test_aws_lists_addresses_and_interfaces_of_other_kinds() -> None:
    """An address of a carrier's network, an interface in a subnet of version 6 alone, and one that nobody understands."""
    tags = [{"Key": "mistralctl-name", "Value": "one"}]
    addresses = [
        {"AllocationId": "a-1", "CarrierIp": "203.0.113.1", "Tags": tags},
        {"Tags": tags},
        {"AllocationId": "a-2", "PublicIp": "203.0.113.2"},
    ]
    interface = {"NetworkInterfaceId": "i-1", "Status": "available", "AvailabilityZone": "us-east-1a", "TagSet": tags}

    class EC2:
        def describe_addresses(self, **_: Any) -> Any:
            return {"Addresses": addresses}

        def get_paginator(self, name: str) -> Any:
            pages = [{"NetworkInterfaces": [{"Status": None}, interface]}]
            return type("Pages", (), {"paginate": lambda self, **_: pages})()

    refused: Refused = []
    assert [part.id for part in aws._addresses(EC2(), [], "us-east-1", refused)] == ["a-1", "a-2"]
    assert [part.id for part in aws._interfaces(EC2(), [], refused)] == ["i-1"]
    assert len(refused) == 1
