"""What `status` says of deployments on a cloud: the cloud's own listing from moto, nodes that nobody answers for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mistralctl import state
from mistralctl.clouds import Part
from mistralctl.commands import status
from mistralctl.errors import Exit, UserError
from mistralctl.runtime import sky, ssh
from mistralctl.runtime.ssh import Address
from mistralctl.state import Record

NEVER = Address("127.0.0.1", 9, "nobody", "/dev/null")


def remember(name: str, **changes: Any) -> Record:
    """A deployment on AWS of which this laptop has a record and an address where nothing listens."""
    given: dict[str, Any] = {
        "region": "us-west-2",
        "machine": "g6.xlarge",
        "price": 0.8,
        "cluster": f"mctl-{name}",
        "state": "up",
    } | changes
    record = Record(
        name, "aws", given.pop("state"), "mistral", "mistral", 1, "~/.mistralctl", "id", time.time() - 60,
        task={"envs": {}, "resources": {"labels": {"mistralctl-owner": "a1"}, "disk_size": 100}}, **given,
    )  # fmt: skip
    state.save(record)
    ssh.remember(name, NEVER)
    return record


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        yield boto3.client("ec2", region_name="us-west-2")


def rent(ec2: Any, name: str, owner: str = "a1") -> str:
    from moto.ec2.models.amis import AMIS

    tags = [{"Key": "mistralctl-name", "Value": name}, {"Key": "mistralctl-owner", "Value": owner}]
    [one] = ec2.run_instances(
        ImageId=AMIS[0]["ami_id"], MinCount=1, MaxCount=1, InstanceType="g6.xlarge",
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )["Instances"]  # fmt: skip
    return str(one["InstanceId"])


def test_the_clouds_own_listing_decides_without_skypilot(ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_known_to_skypilot", lambda records: pytest.fail("SkyPilot was asked"))
    for name in ("runs", "halts", "ended"):
        remember(name)
        identity = rent(ec2, name)
        if name == "halts":
            ec2.stop_instances(InstanceIds=[identity])
        if name == "ended":
            ec2.terminate_instances(InstanceIds=[identity])
    remember("taken", spot=True)
    remember("theirs")
    rent(ec2, "theirs", "b2")
    remember("new", state="starting")
    rent(ec2, "new")
    remember("away", state="down")
    found = {one.name: one for one in status.run(None)}
    assert {name: one.state for name, one in found.items()} == {
        "runs": "lost", "halts": "stopped", "ended": "lost", "taken": "lost", "theirs": "lost", "new": "starting", "away": "down",
    }  # fmt: skip
    assert "took its spot machine" in found["taken"].why
    assert "though the cloud says that it runs" in found["runs"].why
    assert (found["runs"].region, found["runs"].machine, found["runs"].price) == ("us-west-2a", "g6.xlarge", 0.8)
    assert found["runs"].cost is not None
    assert found["ended"].cost is None
    assert found["halts"].why == "its machine is stopped and its disk still costs 0.26 USD a day; run up again, or down"
    assert (found["halts"].price, found["halts"].cost) == (0.0108, None)


@pytest.mark.parametrize(
    ("said", "now", "why"),
    [
        ("", "lost", "its machine is there without a server of ours; run up again"),
        ("{broken", "lost", "its machine is there without a server of ours; run up again"),
        ('{"state": "engine", "serving_id": "id"}', "starting", ""),
        ('{"state": "stuck", "serving_id": "id"}', "stuck", "its engine has answered nothing for a minute"),
        ('{"state": "ready", "serving_id": "id"}', "up", "its tunnel is not open; run mistralctl connect runs"),
        (
            '{"state": "ready", "serving_id": "other"}',
            "up",
            "another task than this laptop's last up runs on its machine; run up again",
        ),
        ('{"state": "failed", "error": {"message": "vLLM ended with code 1"}}', "failed", "vLLM ended with code 1"),
        ('{"state": "stopped", "ended_because": "idle"}', "lost", "its server ended (idle)"),
    ],
)
def test_what_the_launcher_says_on_its_machine(
    ec2: Any, monkeypatch: pytest.MonkeyPatch, said: str, now: str, why: str
) -> None:  # fmt: skip
    remember("runs")
    rent(ec2, "runs")
    monkeypatch.setattr(ssh, "read_status", lambda name, seconds, shared: said)
    kept: list[str] = []
    monkeypatch.setattr("mistralctl.runtime.rented.keep_log", lambda record: kept.append(record.name))
    [one] = status.run("runs")
    assert (one.state, one.why.startswith(why), bool(one.why)) == (now, True, bool(why))
    assert kept == (["runs"] if "ended" in why else [])


def test_skypilot_is_asked_where_the_cloud_cannot_be_listed_or_the_place_is_not_known(
    ec2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def known(records: list[Record]) -> dict[str, status.Machine]:
        asked.extend(record.name for record in records)
        return {}

    monkeypatch.setattr(status, "_known_to_skypilot", known)
    remember("here")
    remember("launching", state="starting", region="")
    status.run(None)
    assert asked == ["launching"]

    def refuses(*_: Any) -> list[Part]:
        raise UserError("AWS refused", Exit.CLOUD)

    monkeypatch.setattr("mistralctl.clouds.aws.api.machines", refuses)
    asked.clear()
    status.run("here")
    assert asked == ["here"]


def test_fifty_nodes_that_never_answer_take_as_long_as_one(ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "SSH_SECONDS", 2.0)
    import socket

    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen(128)
        for number in range(50):
            remember(f"n{number}")
            rent(ec2, f"n{number}")
            ssh.remember(f"n{number}", Address("127.0.0.1", silent.getsockname()[1], "nobody", "/dev/null"))
        asked, at_once, node, lock = 0, list[int](), status._node, threading.Lock()

        def counted(*given: Any, **options: Any) -> Any:
            nonlocal asked
            with lock:
                asked += 1
                at_once.append(asked)
            try:
                return node(*given, **options)
            finally:
                with lock:
                    asked -= 1

        monkeypatch.setattr(status, "_node", counted)
        found = status.run(None)
    assert {(one.state, "did not answer over SSH" in one.why) for one in found} == {("lost", True)}
    assert max(at_once) > 10  # one after the other they would take 100 s


def test_what_nobody_can_be_asked_of_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyPilot does not start: the deployments on this machine are shown, and the others' rows say why nothing is known."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    task: dict[str, Any] = {"envs": {}, "resources": {}}
    state.save(Record("here", "local", "down", "m", "m", 8000, "/node", "s", 1.0, task=task))
    state.save(Record("there", "aws", "starting", "m", "m", 8001, "~/.mistralctl", "s", 1.0, task=task, cluster="mctl-there"))
    monkeypatch.setattr(sky, "clusters", raises(UserError("SkyPilot is not installed", Exit.CLOUD)))
    found = status.run(None)
    assert [(one.name, one.state, one.why) for one in found] == [
        ("here", "down", ""), ("there", "unknown", "SkyPilot is not installed"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="SkyPilot is not installed"):
        status.check(found)
    with pytest.raises(UserError, match="SkyPilot is not installed"):
        status.run("there")


def raises(error: Exception) -> Callable[..., Any]:
    def call(*given: Any, **options: Any) -> Any:
        raise error

    return call


def test_why_the_last_up_failed_is_said_until_another_one(ec2: Any) -> None:
    """Nothing was rented; or a machine is there, or was."""
    remember("refused", state="down", failure="no cloud gave a machine")
    remember("half", state="starting", failure="no memory")
    found = {one.name: (one.state, one.why) for one in status.run(None)}
    assert found == {"refused": ("down", "no cloud gave a machine"), "half": ("failed", "no memory")}
