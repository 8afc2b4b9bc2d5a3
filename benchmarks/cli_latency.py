"""How fast the command line is, beside what a person would use instead; interleaved in one run, whole processes.

1. `mistralctl up --dry-run` beside `sky launch --dryrun` on its output: at most 1/20 of the time. SkyPilot cannot dry-run a
   launch without an account, so it stops where it asks for one: the time is that of its start, its client and server, and
   the parsing; a whole dry run takes longer.
2. `mistralctl --help` beside `python -c "import typer"`: at most three times.

    python benchmarks/cli_latency.py [--quick] [-o json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MISTRALCTL = [sys.executable, "-m", "mistralctl"]


def seconds(command: list[str], env: dict[str, str]) -> float:
    """Wall time of a whole process."""
    began = time.perf_counter()
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=300)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one sample of each: proves that it runs")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    rounds = 1 if options.quick else 9
    with tempfile.TemporaryDirectory() as folder:
        env = {key: value for key, value in os.environ.items() if not key.startswith("MISTRALCTL_")}
        env |= {"HOME": folder, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONPYCACHEPREFIX": f"{folder}/pyc"}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        task = Path(folder) / "task.yaml"
        rendered = subprocess.run([*MISTRALCTL, "up", "--dry-run"], env=env, capture_output=True, check=True, timeout=60)
        task.write_bytes(rendered.stdout)
        sky = [str(Path(sys.executable).parent / "sky")]
        commands = {
            "mistralctl up --dry-run": [*MISTRALCTL, "up", "--dry-run"],
            "sky launch --dryrun": [*sky, "launch", "--dryrun", "--yes", str(task)],
            "mistralctl --help": [*MISTRALCTL, "--help"],
            "import typer": [sys.executable, "-c", "import typer"],
        }
        try:
            for command in commands.values():  # once uncounted: byte code, SkyPilot's server
                seconds(command, env)
            samples: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(rounds):
                for name, command in commands.items():
                    samples[name].append(round(seconds(command, env), 4))
        finally:
            subprocess.run([*sky, "api", "stop"], env=env, capture_output=True, check=False, timeout=60)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratio = medians["mistralctl up --dry-run"] / medians["sky launch --dryrun"]
    help_ratio = medians["mistralctl --help"] / medians["import typer"]
    if options.output == "text":
        for name, median in medians.items():
            print(f"{name:28} {median:7.3f} s  (median of {rounds})")
        print(f"dry run: {ratio:.4f} of sky launch --dryrun (goal: at most 0.05)")
        print(f"help: {help_ratio:.2f} times a bare import of typer (goal: at most 3)")
        return
    result = {"name": "cli_latency", "ratio": round(ratio, 4), "goal": 0.05, "help_ratio": round(help_ratio, 3), "help_goal": 3,
              "seconds": samples}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
