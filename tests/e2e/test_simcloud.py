"""The simulated AWS itself: refusals, what becomes of machines, and nothing stays behind. SkyPilot launches there in stories_simulated.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from deployments import simulated
from simcloud import SimCloud, SimUnavailable
from simcloud.sim import check

E2E = Path(__file__).parent


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    """What is called here by hand needs no role."""
    with simulated(tmp_path_factory.mktemp("aws"), ["aws"]) as sim:
        yield sim


def test_the_node_has_the_environment_that_the_task_names(sim: SimCloud) -> None:
    from mistralctl.tasks import NODE_PYTHON, environment_id
    from simcloud.image import MISTRALCTL_ENVS, USER, baked

    environment = baked() / "upper" / "home" / USER / MISTRALCTL_ENVS / environment_id("cpu", NODE_PYTHON)
    assert (environment / ".complete").exists()


def launch_by_hand(sim: SimCloud, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["aws", "ec2", "run-instances", "--image-id", "ami-0e6842148a3d9982b", "--instance-type", "g6.xlarge", *options]
    return sim.run(command, check=False, env={"AWS_MAX_ATTEMPTS": "1"})


def test_faults_have_the_codes_of_amazon(sim: SimCloud) -> None:
    spot = ["--instance-market-options", "MarketType=spot"]
    for kind, options, code in (
        ("capacity", [], "InsufficientInstanceCapacity"), ("quota", [], "VcpuLimitExceeded"),
        ("quota", spot, "MaxSpotInstanceCountExceeded"), ("permission", [], "UnauthorizedOperation"),
        ("throttle", [], "RequestLimitExceeded"), ("credentials", [], "AuthFailure"),
    ):  # fmt: skip
        sim.fault("aws", kind, instance_type=None if kind == "credentials" else "g6.*", count=1)
        refused = launch_by_hand(sim, *options)
        assert refused.returncode != 0
        assert f"({code})" in refused.stderr
        assert sim.instances("aws") == []
        sim.clear_faults()


def test_spot_is_taken_back_and_hardware_dies(sim: SimCloud) -> None:
    for options in (["--instance-market-options", "MarketType=spot"], []):
        assert launch_by_hand(sim, *options).returncode == 0
    spot, other = sorted(sim.instances("aws"), key=lambda one: not one.spot)
    assert (spot.spot, other.spot) == (True, False)
    sim.preempt(spot.id)
    sim.kill_node(other.id)
    assert [(one.id, one.state) for one in sim.instances("aws")] == [(other.id, "running")]
    sim.run(["aws", "ec2", "terminate-instances", "--instance-ids", other.id])
    assert sim.instances("aws") == []
    assert [event["event"] for event in sim.journal("aws") if event["event"] in ("preempt", "kill_node")] == [
        "preempt",
        "kill_node",
    ]


KILLED = """
import sys, time
from pathlib import Path
from simcloud import SimCloud
with SimCloud(clouds=["aws"], root=Path(sys.argv[1])) as sim:
    sleeper = sim.popen(["sleep", "1000"])
    print("up", flush=True)
    time.sleep(1000)
"""


def below(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(root) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_test_leaves_no_process_and_no_mount(sim: SimCloud, tmp_path: Path) -> None:
    """A second SimCloud beside the first, whose process is killed; the first stays as it is."""
    root = tmp_path / "second"
    program = textwrap.dedent(KILLED)
    test = subprocess.Popen(
        [sys.executable, "-c", program, root], env=os.environ | {"PYTHONPATH": str(E2E)}, stdout=subprocess.PIPE, text=True
    )
    with test:
        assert test.stdout
        assert test.stdout.readline() == "up\n"
        assert len(below(root)) > 3
        test.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 300
    while below(root) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert below(root) == []
    assert str(root) not in Path("/proc/self/mounts").read_text()
    assert sim.instances("aws") == []
    assert sim.run(["true"]).returncode == 0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simcloud.sim.SYSTEM_PATH", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SimUnavailable, match=r"unshare, ip, ssh, .*; install them with `make simcloud-packages`"):
        check()
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(SimUnavailable, match="this is darwin"):
        check()
