"""From the command to the first token on a simulated AWS: `mistralctl up` beside the shortest equivalent by hand.

Both bring up the same task with the real SkyPilot on a node of their own (tests/e2e/simcloud), in turns, with the same weights from
the same S3 server. By hand means: `sky launch` of what `mistralctl up --dry-run` printed with the hash of a key, an ssh
tunnel, then one completion asked for again and again until it answers; nothing is checked and the server
starts open. `mistralctl up` does all its checks, and its time is
taken when it has ended, first answer included. The ratio is the geometric mean over the rounds (ours / by hand), with a 95 % confidence
interval by bootstrap. Goal: at most 1.05.

    python benchmarks/up_to_first_token.py [--rounds 3] [--quick] [-o json]     # as root; see tests/e2e/simcloud/README.md
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from mistral_contract import keys

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from deployments import PLACES, simulated, up  # noqa: E402 - found by the line before
from simcloud import SimCloud  # noqa: E402

PLACE = PLACES["aws"]
KEY = "a-key-of-this-benchmark"
GOAL = 1.05
BY_HAND = """
set -euo pipefail
now() { date +%s.%N; }
began=$(now)
sky launch -y -d -c hand "$1" > launch.log 2>&1
launched=$(now)
to_node=(-F ~/.sky/generated/ssh/hand -i ~/.sky/clients/*/ssh/sky-key)
ssh "${to_node[@]}" -N -L 127.0.0.1:9000:127.0.0.1:8000 hand &
tunnel=$!
body='{"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
until curl -sf -m 60 -H "Authorization: Bearer $2" -H 'Content-Type: application/json' -d "$body" \
    http://127.0.0.1:9000/v1/completions > answer.json; do sleep 0.2; done
echo "$began $launched $(now)"
kill $tunnel
"""


def ours(sim: SimCloud) -> dict[str, Any]:
    """One `mistralctl up`: seconds in all and by phase."""
    began = time.monotonic()
    result = up(sim, PLACE, "ours")
    seconds = time.monotonic() - began
    sim.run(["mistralctl", "down", "ours"], timeout=300)
    return {"seconds": round(seconds, 2), "phases": {phase["phase"]: phase["seconds"] for phase in result["phases"]}}


def by_hand(sim: SimCloud, folder: Path) -> dict[str, Any]:
    """The same by hand: seconds in all, and until `sky launch` had ended."""
    task = folder / "task.yaml"
    rendered = yaml.safe_load(sim.run([*PLACE.up, "--name", "hand", "--dry-run"]).stdout)
    rendered["envs"]["MISTRALCTL_KEYS"] = keys.Keys(1, (keys.make(KEY, "hand", 1.0),)).dump()
    task.write_text(yaml.safe_dump(rendered, sort_keys=False))
    done = sim.run(["bash", "-c", BY_HAND, "by-hand", task, KEY], cwd=folder, timeout=900)
    began, launched, ended = map(float, done.stdout.split()[-3:])
    sim.run(["sky", "down", "-y", "hand"], timeout=300)
    return {
        "seconds": round(ended - began, 2),
        "phases": {"sky launch": round(launched - began, 2), "until it answers": round(ended - launched, 2)},
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean, by 2000 resamples (seeded)."""
    generator = random.Random(1)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(2000))
    return means[50], means[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one round: proves that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    samples: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as name, simulated(Path(name), [PLACE.cloud]) as sim:
        sim.run(["sky", "check", PLACE.cloud], timeout=200)  # starts the API server for both
        for number in range(rounds):
            pair: dict[str, dict[str, Any]] = {}
            for program in ("ours", "by hand") if number % 2 else ("by hand", "ours"):
                pair[program] = ours(sim) if program == "ours" else by_hand(sim, sim.home)
            samples.append(pair)
    logs = [math.log(pair["ours"]["seconds"] / pair["by hand"]["seconds"]) for pair in samples]
    ratio = math.exp(statistics.fmean(logs))
    low, high = (math.exp(bound) for bound in interval(logs))
    if options.output == "json":
        print(json.dumps({"name": "up_to_first_token", "ratio": round(ratio, 3), "goal": GOAL,
                          "interval": [round(low, 3), round(high, 3)], "samples": samples}))  # fmt: skip
        return
    for program in ("ours", "by hand"):
        print(f"{program}: {statistics.median(pair[program]['seconds'] for pair in samples):.1f} s (median of {rounds})")
        for phase in samples[0][program]["phases"]:
            print(f"  {phase:18} {statistics.median(pair[program]['phases'].get(phase, 0.0) for pair in samples):6.1f} s")
    print(f"mistralctl up / by hand: {ratio:.3f}  95 % [{low:.3f}, {high:.3f}]  (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
