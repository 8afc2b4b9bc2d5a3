"""What a launch that every place refused leaves: nothing of its own, and everything that is older; the cloud's listing from moto."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from mistralctl import state, sweep
from mistralctl.clouds import NotUsed, Part
from mistralctl.clouds.aws import api as aws
from mistralctl.clouds.azure import api as azure
from mistralctl.clouds.gcp import api as gcp
from mistralctl.errors import Exit, UserError
from test_status import ec2, remember, rent

__all__ = ["ec2"]  # a fixture, found by its name
REFUSED = UserError("no cloud gave a machine", Exit.CLOUD, "  us-west-2a capacity")


def living(ec2: Any) -> list[str]:
    found = ec2.describe_instances()["Reservations"]
    machines = [one for held in found for one in held["Instances"]]
    return [one["InstanceId"] for one in machines if one["State"]["Name"] not in ("shutting-down", "terminated")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "regions", lambda: ["us-west-2"])
    monkeypatch.setattr("mistralctl.sweep.time.sleep", lambda seconds: None)


def test_what_an_attempt_left_is_deleted(ec2: Any) -> None:
    record = remember("one", state="starting")
    rent(ec2, "one")
    other = rent(ec2, "two")
    sweep.after_refusal(record, ["aws"], time.time(), REFUSED)
    assert living(ec2) == [other]
    assert state.known("one").state == "down"


def test_an_older_machine_stays_and_is_not_forgotten(ec2: Any) -> None:
    record = remember("one", state="starting")
    old = rent(ec2, "one")
    sweep.after_refusal(record, ["aws"], time.time() + 3600, REFUSED)
    assert living(ec2) == [old]
    assert state.known("one").state == "starting"


def test_a_cloud_that_cannot_be_asked_hides_neither_the_refusals_nor_the_others(
    ec2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unused(*_: object) -> list[Part]:
        raise NotUsed("nobody is signed in to Azure here", Exit.CLOUD)

    def refuses(owner: str | None, name: str | None = None, within: Iterable[str] | None = None) -> list[Part]:
        raise UserError("GCP refused GET", Exit.CLOUD)

    monkeypatch.setattr(azure, "ours", unused)
    monkeypatch.setattr(gcp, "ours", refuses)
    record = remember("one", state="starting")
    rent(ec2, "one")
    with pytest.raises(UserError, match=r"^no cloud gave a machine; and GCP refused GET$") as caught:
        sweep.after_refusal(record, ["azure", "gcp", "aws"], time.time(), REFUSED)
    assert (caught.value.code, caught.value.details) == (Exit.CLOUD, "  us-west-2a capacity")
    assert living(ec2) == []
    left = state.known("one")
    assert (left.state, left.cloud) == ("starting", "gcp")


def test_ctrl_c_says_that_something_may_be_left(ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> list[Part]:
        raise KeyboardInterrupt

    monkeypatch.setattr(aws, "ours", interrupted)
    with pytest.raises(UserError, match=r"^interrupted; something of one may be left: mistralctl down one takes it away$"):
        sweep.after_refusal(remember("one", state="starting"), ["aws"], time.time(), REFUSED)
    assert state.known("one").state == "starting"
