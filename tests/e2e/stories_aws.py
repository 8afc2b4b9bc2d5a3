"""Failure stories on the simulated AWS, longer than what every test run should take: `make e2e`.

Each line that is printed is a row of the table: the story, what was seen, and how long it took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from simcloud import SimCloud
from test_aws import UP, on_node, sim, up

__all__ = ["sim"]  # the fixture, found by its name


@contextmanager
def story(title: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"\nstory: {title}: passed, {time.monotonic() - began:.0f} s")


def status(sim: SimCloud, name: str) -> dict[str, Any]:
    [one] = json.loads(sim.run(["mistralctl", "status", name, "-o", "json"], timeout=120).stdout)
    return dict(one)


def gone(sim: SimCloud, name: str) -> None:
    """Takes it down, and the cloud's listing is empty."""
    sim.run(["mistralctl", "down", name], timeout=300)
    assert sim.instances("aws") == []
    assert sim.volumes("aws") == []


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def test_zone_after_zone_refuses_and_the_next_region_gives(sim: SimCloud) -> None:
    with story("every zone of the cheapest region refuses, the next region gives"):
        sim.fault("aws", "capacity", region="us-east-1")
        result = up(sim, "--name", "moved")
        [instance] = sim.instances("aws")
        assert instance.region != "us-east-1"
        assert result["answer"]
        assert status(sim, "moved")["region"] == instance.zone
        gone(sim, "moved")


def test_wrong_credentials_are_named(sim: SimCloud) -> None:
    with story("credentials that AWS refuses"):
        sim.fault("aws", "credentials")
        refused = sim.run([*UP, "--name", "wrong"], check=False, timeout=300)
        assert refused.returncode == 8
        assert "permission InvalidClientTokenId" in refused.stderr or "AuthFailure" in refused.stderr
        assert "Traceback" not in refused.stderr
        sim.clear_faults()
        gone(sim, "wrong")


def test_a_spot_machine_that_is_taken_is_said_and_brought_back(sim: SimCloud) -> None:
    with story("a spot machine is taken while it serves; up brings it back"):
        up(sim, "--name", "cheap", "--spot")
        [before] = sim.instances("aws")
        assert before.spot
        sim.preempt(before.id)
        one = status(sim, "cheap")
        assert (one["state"], "took its spot machine away" in one["why"]) == ("lost", True)
        assert up(sim, "--name", "cheap", "--spot")["action"] == "started"
        [after] = sim.instances("aws")
        assert after.id != before.id
        gone(sim, "cheap")


def test_two_at_once_are_one(sim: SimCloud) -> None:
    with story("two up of the same name at once"):
        first = sim.popen([*UP, "--name", "twice", "-o", "json"])
        time.sleep(4)
        second = sim.run([*UP, "--name", "twice"], check=False, timeout=60)
        assert second.returncode == 5
        assert "is being brought up or down already" in second.stderr
        out, _ = first.communicate(timeout=600)
        assert json.loads(out)["action"] == "started"
        assert len(sim.instances("aws")) == 1
        gone(sim, "twice")


def test_a_laptop_that_is_killed_goes_on(sim: SimCloud) -> None:
    with story("kill -9 while the machine is made, then up"):
        process = sim.popen([*UP, "--name", "again"])
        assert process.stderr
        for line in process.stderr:
            if line.startswith("SkyPilot's runtime"):
                break
        process.kill()
        process.communicate(timeout=30)
        assert up(sim, "--name", "again")["answer"]
        assert len(sim.instances("aws")) == 1
        gone(sim, "again")


def test_a_server_that_dies_leaves_its_log(sim: SimCloud) -> None:
    with story("vLLM dies on the node; its log is here and up starts it again"):
        result = up(sim, "--name", "dies")
        on_node(sim, "dies", "pkill -9 -f vllm.entrypoints.cli.main")
        deadline = time.monotonic() + 60
        while status(sim, "dies")["state"] == "up" and time.monotonic() < deadline:
            time.sleep(1)
        one = status(sim, "dies")
        assert one["state"] == "failed"
        assert "vLLM ended with code" in one["why"]
        assert '"phase": "ready"' in sim.run(["mistralctl", "logs", "dies"], timeout=60).stdout
        assert up(sim, "--name", "dies")["action"] == "started"
        assert Path(result["log"]).exists()
        gone(sim, "dies")


def test_a_gpu_machine_is_rented_and_one_without_a_driver_is_named(sim: SimCloud) -> None:
    with story("a GPU machine type; its simulated image has no NVIDIA driver"):
        command = ["mistralctl", "up", "mistral-7b-instruct-v0.1", "--cloud", "aws", "--accelerators", "L4", "--name", "gpu"]
        refused = sim.run([*command, "--weights", "s3://models/smollm2"], check=False, timeout=600)
        assert refused.returncode == 9
        assert "this machine shows no NVIDIA GPU (nvidia-smi)" in refused.stderr
        [instance] = sim.instances("aws")
        assert instance.type.startswith(("g6.", "g5."))
        gone(sim, "gpu")
