"""The simulated Azure: the real SkyPilot, Azure CLI and SDKs work with it, and nothing stays behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployments import simulated
from simcloud import SimCloud

BY_HAND = Path(__file__).parent / "azure_by_hand.py"


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    """What is called here by hand needs no role."""
    with simulated(tmp_path_factory.mktemp("azure"), ["azure"]) as sim:
        yield sim


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def by_hand(sim: SimCloud, group: str, *options: str, region: str = "eastus") -> str:
    """Makes a machine without SkyPilot; the code of a refusal, or nothing."""
    command = [sys.executable, str(BY_HAND), group, region, "Standard_D4s_v5", *options]
    return sim.run(command, check=False).stderr.strip()


def wait_until_empty(sim: SimCloud) -> None:
    """Azure goes on deleting after SkyPilot has said that it is done."""
    deadline = time.monotonic() + 300
    while sim.groups("azure") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (sim.groups("azure"), sim.instances("azure"), sim.volumes("azure")) == ([], [], [])


def test_faults_have_the_codes_of_azure(sim: SimCloud) -> None:
    signed_in = sim.home / ".azure" / "msal_token_cache.json"
    before = signed_in.read_text()
    for kind, options, code in (
        ("capacity", (), "AllocationFailed"), ("capacity", ("spot",), "SkuNotAvailable"), ("quota", (), "OperationNotAllowed"),
        ("permission", (), "AuthorizationFailed"), ("throttle", (), "TooManyRequests"), ("credentials", (), "AADSTS700082"),
    ):  # fmt: skip
        sim.fault("azure", kind)
        assert code in by_hand(sim, "refused", *options)
        assert [one for one in sim.instances("azure") if one.state != "Failed"] == []
        sim.clear_faults()
    # As `az login` does: the CLI forgets a token that was refused, and keeps the refusal for a minute.
    signed_in.write_text(before)
    (signed_in.parent / "msal_http_cache.bin").unlink()
    sim.run(["az", "group", "delete", "-y", "-n", "refused"])
    wait_until_empty(sim)


def test_a_resource_provider_that_is_not_registered_refuses_all_but_its_registration(sim: SimCloud) -> None:
    sim.fault("azure", "unregistered", action="Microsoft.Compute")
    assert by_hand(sim, "new") == "refused: MissingSubscriptionRegistration"
    show = ["az", "provider", "show", "-n", "Microsoft.Compute", "-o", "tsv", "--query", "registrationState"]
    assert sim.run(show).stdout == "NotRegistered\n"
    sim.run(["az", "provider", "register", "-n", "Microsoft.Compute", "--wait"])
    assert sim.run(show).stdout == "Registered\n"
    assert by_hand(sim, "new") == ""
    sim.run(["az", "group", "delete", "-y", "-n", "new"])
    wait_until_empty(sim)


def test_skypilot_finds_the_size_of_an_image_of_the_marketplace(sim: SimCloud) -> None:
    for version, said in (("latest", "64.0\n"), ("22.04.2023080201", "30.0\n"), ("22.04.2000010101", "")):
        ask = f"from sky.clouds import Azure; print(Azure.get_image_size('microsoft-dsvm:ubuntu-hpc:2204:{version}', None))"
        asked = sim.run([sys.executable, "-c", ask], check=False)
        assert asked.stdout == said, asked.stderr
        assert said or "Image not found: microsoft-dsvm:ubuntu-hpc:2204:22.04.2000010101" in asked.stderr


def test_a_spot_machine_is_deallocated_and_hardware_dies(sim: SimCloud) -> None:
    assert by_hand(sim, "cheap", "spot") == ""
    assert by_hand(sim, "dear") == ""
    spot, other = sim.instances("azure")
    assert (spot.spot, other.spot) == (True, False)
    sim.preempt(spot.id)
    sim.kill_node(other.id)
    assert [(one.id, one.state) for one in sim.instances("azure")] == [(spot.id, "deallocated"), (other.id, "running")]
    assert [volume["instance"] for volume in sim.volumes("azure")] == [spot.id, other.id]


def test_a_group_may_be_locked_and_a_deletion_may_fail_after_it_was_accepted(sim: SimCloud) -> None:
    delete = ["az", "group", "delete", "-y", "-n"]
    sim.fault("azure", "locked", count=1)
    assert "ScopeLocked" in sim.run([*delete, "cheap"], check=False).stderr
    sim.fault("azure", "late_failure", count=1)
    sim.run([*delete, "cheap", "--no-wait"])
    deadline = time.monotonic() + 300
    while not any(one["event"] == "group_stays" for one in sim.journal("azure")) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert sorted(sim.groups("azure")) == ["cheap", "dear"]
    for group in ("cheap", "dear"):
        sim.run([*delete, group])
    wait_until_empty(sim)


REAP = """
from mistralctl.commands import reap
reap.ORPHAN_MINUTES = -1
print(sorted((part.kind, part.name, part.due, part.deleted) for part in reap.run(["azure"], **{options}).parts))
"""


def test_reap_finds_machines_and_what_they_left_by_labels(sim: SimCloud) -> None:
    from mistralctl import owners

    mine = f"mistralctl-owner={owners.current({'MISTRALCTL_OWNER': 'me'})}"
    user = "0a1b2c3d"
    (sim.home / ".sky" / "user_hash").write_text(user)
    for group, labels in (
        (f"mctl-over-{user}-eastus", [mine, "mistralctl-name=over", "mistralctl-ttl=60", f"skypilot-cluster-name=mctl-over-{user}"]),
        (f"mctl-left-{user}-eastus", ["labelled", mine, "mistralctl-name=left", "mistralctl-ttl=60"]),
        (f"mctl-nobodys-{user}-eastus", []),
        ("own-group", [mine, "mistralctl-name=guest", "mistralctl-ttl=never"]),
        ("theirs", ["mistralctl-owner=them", "mistralctl-name=theirs", "mistralctl-ttl=60"]),
        (f"mctl-other-{user}x-eastus", []),
    ):  # fmt: skip
        assert by_hand(sim, group, *labels) == ""
    sim.age(f"mctl-over-{user}-eastus-vm", 120)
    left = f"mctl-left-{user}-eastus"
    sim.run(["az", "vm", "delete", "-y", "-g", left, "-n", f"{left}-vm"])

    def reap(options: str) -> str:
        program = REAP.replace("{options}", options)
        return sim.run([sys.executable, "-c", program], env={"MISTRALCTL_OWNER": "me"}).stdout

    dry = "{'all_owners': False, 'dry_run': True, 'confirm': None}"
    assert reap(dry) == (
        "[('group', 'left', 'its machine is gone', False), ('machine', 'guest', '', False), "
        "('machine', 'over', 'its lifetime of 60 minutes is over', False)]\n"
    )
    assert ", True" in reap("{'all_owners': False, 'dry_run': False, 'confirm': lambda found: True}")
    assert sorted(sim.groups("azure")) == [f"mctl-nobodys-{user}-eastus", f"mctl-other-{user}x-eastus", "own-group", "theirs"]
    for group in sim.groups("azure"):
        sim.run(["az", "group", "delete", "-y", "-n", group])
    wait_until_empty(sim)
