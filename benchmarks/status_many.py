"""`mistralctl status` of 50 deployments on three clouds beside that of one, on simulated AWS, GCP and Azure, in turns.

One is real: brought up by `mistralctl up` on AWS with the real SkyPilot, on a node of its own, with its tunnel. The
other 49 have a record here, a machine in their cloud's listing, a launcher's status on a node and a tunnel, but this machine has no room
for 50 engines: their SSH goes to the node of the one. So `status` does all that it does for 50: it asks each region of each cloud, reads 50
launchers' statuses over 50 connections and asks 50 endpoints. Beside it, `status` of a single one on each of the clouds.
Printed are the medians, and the ratio of the 50 to the slowest cloud's one, which the 50 have to wait for; the goal is at most 1.5.

    python benchmarks/status_many.py [--rounds 5] [--quick] [-o json]     # as root; see tests/e2e/simcloud/README.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from deployments import PLACES, simulated, up  # noqa: E402 - found by the line before
from simcloud import SimCloud  # noqa: E402

MANY, GOAL = 50, 1.5
REGIONS = {"aws": ("us-east-1", "us-west-2", "eu-west-1"), "gcp": ("us-central1",), "azure": ("eastus",)}
RENT_ON_AWS = """
import json, sys
import boto3
image, machines = json.loads(sys.argv[1])
for region, labels in machines:
    own = [{"Key": key, "Value": value} for key, value in labels.items()]
    boto3.client("ec2", region_name=region).run_instances(
        ImageId=image, MinCount=1, MaxCount=1, InstanceType="m6i.large", TagSpecifications=[{"ResourceType": "instance", "Tags": own}]
    )
"""
RENT_ON_GCP = """
import json, sys
import google.auth, googleapiclient.discovery
credentials, project = google.auth.default()
compute = googleapiclient.discovery.build("compute", "v1", credentials=credentials, cache_discovery=False)
for region, labels in json.loads(sys.argv[1])[1]:
    compute.instances().insert(project=project, zone=f"{region}-a", body={
        "name": labels["mistralctl-name"], "machineType": f"zones/{region}-a/machineTypes/n2-standard-4", "labels": labels,
        "networkInterfaces": [{"network": "global/networks/default"}], "disks": [{"boot": True, "autoDelete": True}],
    }).execute()
"""
AZURE_BY_HAND = ROOT / "tests" / "e2e" / "azure_by_hand.py"
TUNNELS = """
import socket, sys, time
from mistralctl import processes, state
from mistralctl.runtime import ssh
for name in sys.argv[1:]:
    state.save(processes.noted(state.known(name), ssh.start_tunnel(name)))
for name in sys.argv[1:]:
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", state.known(name).port), 5).close()
            break
        except OSError:
            assert time.monotonic() < deadline, name
            time.sleep(0.5)
"""
STATUS = """
import json, subprocess, sys, time
began = time.monotonic()
done = subprocess.run(["mistralctl", "status", *sys.argv[1:], "-o", "json"], stdout=subprocess.PIPE, check=True)
print(json.dumps([time.monotonic() - began, json.loads(done.stdout)["items"]]))
"""


def rent(sim: SimCloud, cloud: str, machines: list[tuple[str, dict[str, str]]]) -> None:
    """Machines with these labels in these regions, which nobody asks for more than that they are listed."""
    if cloud == "azure":
        for region, labels in machines:
            words = [f"{key}={value}" for key, value in labels.items()]
            sim.run([sys.executable, AZURE_BY_HAND, labels["mistralctl-name"], region, "Standard_D4s_v5", *words], timeout=120)
        return
    image = ""
    if cloud == "aws":
        query = ["--query", "Reservations[].Instances[].ImageId", "--output", "text"]
        image = sim.run(["aws", "ec2", "describe-instances", *query]).stdout.strip()
    program = RENT_ON_AWS if cloud == "aws" else RENT_ON_GCP
    sim.run([sys.executable, "-c", program, json.dumps([image, machines])], timeout=300)


def multiply(sim: SimCloud) -> dict[str, str]:
    """Makes 49 more of the deployment `many-0`: records, machines and statuses on the node; one name of each cloud."""
    deployments = sim.home / ".mistralctl" / "deployments"
    record = json.loads((deployments / "many-0" / "record.json").read_text())
    [instance] = sim.instances("aws")
    labels = {key: value for key, value in instance.tags.items() if key.startswith("mistralctl-")}
    machines: dict[str, list[tuple[str, dict[str, str]]]] = {cloud: [] for cloud in REGIONS}
    for number in range(1, MANY):
        name, cloud = f"many-{number}", list(REGIONS)[number % len(REGIONS)]
        region = REGIONS[cloud][number // len(REGIONS) % len(REGIONS[cloud])]
        folder = deployments / name
        folder.mkdir(mode=0o700)
        for file in ("api_key", "ssh_config"):
            (folder / file).write_text((deployments / "many-0" / file).read_text())
            (folder / file).chmod(0o600)
        changed = {"name": name, "cluster": f"mctl-{name}", "cloud": cloud, "region": region, "port": record["port"] + number}
        (folder / "record.json").write_text(json.dumps(record | changed))
        machines[cloud].append((region, labels | {"mistralctl-name": name}))
    for cloud, wanted in machines.items():
        rent(sim, cloud, wanted)
    copies = "cd ~/.mistralctl/run && for n in $(seq 49); do mkdir -p many-$n && cp many-0/status.json many-$n/; done"
    # One server takes 10 connections that are not signed in yet, by default; 50 nodes would take 500.
    more = "echo MaxStartups 200 | sudo tee -a /etc/ssh/sshd_config > /dev/null && sudo kill -HUP $(pgrep -o -x sshd)"
    sim.run(["mistralctl", "ssh", "many-0", f"{copies} && {more}"])
    sim.run([sys.executable, "-c", TUNNELS, *(f"many-{number}" for number in range(1, MANY))], timeout=300)
    return {"aws": "many-0", "gcp": "many-1", "azure": "many-2"}


def seconds(sim: SimCloud, *names: str) -> float:
    """How long `status` takes; it must find everything up."""
    took, found = json.loads(sim.run([sys.executable, "-c", STATUS, *names]).stdout)
    assert len(found) == (1 if names else MANY), len(found)
    assert {(one["state"], one["why"]) for one in found} == {("up", "")}, [
        (one["name"], one["state"], one["why"]) for one in found
    ]
    assert all(one["idle_left"] is not None for one in found)
    return float(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one round: proves that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    one: dict[str, list[float]] = {cloud: [] for cloud in REGIONS}
    many = []
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as name, simulated(Path(name), list(REGIONS)) as sim:
        up(sim, PLACES["aws"], "many-0")
        named = multiply(sim)
        for each in named.values():
            seconds(sim, each)  # not counted: byte code is made
        for _ in range(1 if options.quick else options.rounds):
            for cloud, each in named.items():
                one[cloud].append(seconds(sim, each))
            many.append(seconds(sim))
        began = time.monotonic()
        sim.run(["sky", "status", "--refresh", "mctl-many-0"])
        skypilot = time.monotonic() - began
    of_one = {cloud: statistics.median(took) for cloud, took in one.items()}
    ratio = statistics.median(many) / max(of_one.values())
    if options.output == "json":
        print(json.dumps({"name": "status_many", "ratio": round(ratio, 3), "goal": GOAL, "one": one, "many": many}))
        return
    print(f"status of one: {', '.join(f'{cloud} {took:.2f} s' for cloud, took in of_one.items())}")
    print(f"status of {MANY}: {statistics.median(many):.2f} s (medians of {len(many)})")
    print(f"for comparison, `sky status --refresh` of the one on AWS: {skypilot:.2f} s")
    print(f"ratio to the slowest one: {ratio:.2f}  (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
