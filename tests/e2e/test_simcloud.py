"""The simulated clouds themselves: the real SkyPilot launches on them, and nothing stays behind."""

from __future__ import annotations

import json
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
from simcloud import SimCloud, SimUnavailable, s3
from simcloud.sim import check

E2E = Path(__file__).parent
NODE_SSH = [
    "ssh",
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "-o",
    "LogLevel=ERROR",
    "-o",
    "ConnectTimeout=5",
]
TASK = """
resources:
  infra: aws/us-east-1
  instance_type: m6i.large
  ports: 8080
run: |
  echo "ran as $(whoami)"
  exec python3 -m http.server 8080
"""


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    with SimCloud(clouds=["aws"], root=tmp_path_factory.mktemp("sim") / "root") as sim:
        yield sim


def on_node(sim: SimCloud, *command: str) -> subprocess.CompletedProcess[str]:
    [instance] = sim.instances("aws")
    [key] = sim.home.glob(".sky/clients/*/ssh/sky-key")
    return sim.run([*NODE_SSH, "-i", key, f"ubuntu@{instance.address}", *command], timeout=60, check=False)


def fetch(sim: SimCloud, port: int) -> int:
    """The exit status of an HTTP request to the node from outside: 0 answered, 7 refused."""
    [instance] = sim.instances("aws")
    return sim.run(["curl", "-sf", "-m", "5", f"http://{instance.address}:{port}/"], check=False).returncode


def test_a_launch_avoids_the_zone_without_capacity_and_down_leaves_nothing(sim: SimCloud, tmp_path: Path) -> None:
    sim.fault("aws", "capacity", zone="us-east-1[a-c]")
    (tmp_path / "task.yaml").write_text(TASK)
    sim.run(["sky", "launch", "-y", "-d", "-c", "one", tmp_path / "task.yaml"], timeout=240)

    [instance] = sim.instances("aws")
    assert (instance.type, instance.region, instance.state, instance.spot) == ("m6i.large", "us-east-1", "running", False)
    assert instance.zone not in ("us-east-1a", "us-east-1b", "us-east-1c")
    refused = {event["zone"] for event in sim.journal("aws") if event.get("error") == "InsufficientInstanceCapacity"}
    assert refused <= {"us-east-1a", "us-east-1b", "us-east-1c"}
    assert refused
    [volume] = sim.volumes("aws")
    assert volume["instance"] == instance.id

    assert on_node(sim, "whoami; hostname").stdout.split() == ["ubuntu", f"ip-{str(instance.address).replace('.', '-')}"]
    deadline = time.monotonic() + 30
    while fetch(sim, 8080) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert fetch(sim, 8080) == 0

    # Only what a security group opens is open; nothing can leave.
    on_node(
        sim, "nohup python3 -m http.server 8081 > /dev/null 2>&1 & sleep 1; curl -sf -o /dev/null http://$(hostname -i):8081/"
    )
    assert fetch(sim, 8081) == 7
    assert on_node(sim, "ip -o link | wc -l; ip route | wc -l").stdout.split() == ["1", "0"]  # loopback, and no way out

    # The role's credentials come from the metadata service and open the store.
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    sim.put_weights(tmp_path / "weights", "s3://models/tiny")
    program = (
        f"import boto3; s3 = boto3.client('s3', endpoint_url='{s3.ENDPOINT}');"
        "print(s3.get_object(Bucket='models', Key='tiny/config.json')['Body'].read().decode())"
    )
    read = on_node(sim, f'mv ~/.aws ~/.not-aws; ~/skypilot-runtime/bin/python -c "{program}"')
    assert read.stdout == "{}\n", read.stderr

    sim.run(["sky", "down", "-y", "one"], timeout=120)
    assert sim.instances("aws") == []
    assert sim.volumes("aws") == []
    [gone] = sim.instances("aws", gone=True)
    assert (gone.id, gone.state) == (instance.id, "terminated")
    assert json.loads(sim.run(["sky", "status", "-o", "json"], timeout=60).stdout) == []


def test_the_node_has_the_environment_that_the_task_names(sim: SimCloud) -> None:
    from mistralctl.tasks import NODE_PYTHON, environment_id
    from simcloud.image import MISTRALCTL_ENVS, USER, baked

    environment = baked() / "upper" / "home" / USER / MISTRALCTL_ENVS / environment_id("cpu", NODE_PYTHON)
    assert (environment / ".complete").exists()


def launch_by_hand(sim: SimCloud, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["aws", "ec2", "run-instances", "--image-id", "ami-0e6842148a3d9982b", "--instance-type", "g6.xlarge", *options]
    return sim.run(command, check=False, timeout=60, env={"AWS_MAX_ATTEMPTS": "1"})


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
    deadline = time.monotonic() + 10
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
