"""What goes wrong on Azure and nowhere else: `make e2e`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployments import AUTOSTOP_SECONDS, PLACES, gone, gpu, simulated, status, story, up
from running import MODEL
from simcloud import SimCloud

AZURE = PLACES["azure"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("azure")


@pytest.fixture(scope="module")
def sim(folder: Path) -> Iterator[SimCloud]:
    with simulated(folder, ["azure"]) as sim:
        yield sim


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def test_a_driver_that_does_not_reach_an_a10_is_told_in_its_own_words(sim: SimCloud) -> None:
    with story("an A10 with an image of one's own, whose driver is no GRID driver: nvidia-smi's complaint", "azure"):
        refused = sim.run(
            [*gpu(AZURE), "--accelerators", "A10", "--weights", AZURE.weights, *AZURE.old, "--offline"], check=False
        )
        print(refused.stderr)
        assert refused.returncode == 9
        assert "the driver does not reach the GPU: NVIDIA-SMI has failed because it couldn't communicate" in refused.stderr
        gone(sim, AZURE, "gpu")


def test_a_locked_group_is_named_and_taken_away_once_it_is_open(sim: SimCloud) -> None:
    with story("a lock on the resource group; down names it, and takes all away without it", "azure"):
        up(sim, AZURE, "locked")
        sim.fault("azure", "locked")
        refused = sim.run(["mistralctl", "down", "locked"], check=False)
        print(refused.stderr)
        assert (refused.returncode, "ScopeLocked" in refused.stderr, "Traceback" in refused.stderr) == (8, True, False)
        assert len(sim.instances("azure")) == 1
        sim.clear_faults()
        gone(sim, AZURE, "locked")
        assert sim.groups("azure") == []


def test_the_identity_that_skypilot_makes_ends_its_machine_and_reads_no_blobs(sim: SimCloud, folder: Path) -> None:
    with story("SkyPilot's own identity: blobs are refused and the role is named; an idle machine takes itself away", "azure"):
        (sim.home / ".sky" / "config.yaml").unlink()
        refused = sim.run([*AZURE.up, "--name", "plain"], check=False)
        print(refused.stderr)
        assert (refused.returncode, "Storage Blob Data Reader" in refused.stderr.splitlines()[-1]) == (9, True)
        gone(sim, AZURE, "plain")
        command = ["mistralctl", "up", MODEL, "--cloud", "azure", "--weights", f"file://{folder}/weights", "--name", "plain"]
        sim.run([*command, "--idle", "1m"])
        deadline = time.monotonic() + 300 + AUTOSTOP_SECONDS
        while sim.groups("azure") and time.monotonic() < deadline:
            time.sleep(1)
        assert (sim.groups("azure"), sim.instances("azure"), sim.volumes("azure")) == ([], [], [])
        assert status(sim, "plain")["state"] == "lost"
        gone(sim, AZURE, "plain")
