"""What it saves on a CPU to run the model in the engine's own process (engines.vllm.runs_in_the_engine) and not in one of its own, as vLLM does.

The same model and flags, each way started and ended by turns, the first of each pair by turns as well. Ratios are geometric means over the
pairs of vLLM's way to ours, so that above 1 is a gain, with a 95 % confidence interval by bootstrap over the pairs:

- start: seconds from exec to the first 200 of /health;
- one, eight: seconds for 64 tokens of one request, and of 8 requests at once;
- processor: processor seconds of all processes for a request of one token and the 1.5 s after it.

    python benchmarks/one_process.py [--quick] [-o json]      # in the node's environment: make bench
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from guard_cost import Server, interval
from mistral_node.contract import read
from mistral_node.engines import vllm
from startup import contract, free_port, prepare

WAYS = ("apart", "in the engine")
TITLES = {"start": "start, s", "one": "64 tokens, s", "eight": "64 tokens of 8, s", "processor": "processor, s"}


def command(way: str, folder: Path, weights: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """vLLM as the launcher starts it, without the guard; `apart` is vLLM's own choice."""
    wanted = read(contract(folder / "node", weights, port) | {"MISTRALCTL_DTYPE": "float32"})
    arguments = vllm.arguments(wanted, weights)
    for option in ("--middleware", "--distributed-executor-backend") if way == "apart" else ("--middleware",):
        at = arguments.index(option)
        del arguments[at : at + 2]
    env = vllm.environment(wanted, os.environ)
    del env["MISTRALCTL_RUN_DIR"]  # no launcher reads there what the engine reports
    return [sys.executable, "-m", "mistral_node.start", "serve", *arguments], env


def processor_seconds(process: psutil.Process) -> float:
    """Of it and all that it started."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def together(server: Server, clients: int) -> float:
    """Seconds until each of them has its 64 tokens."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:  # which passes on what fails
        list(pool.map(lambda _: server.ask(server.connect(), 64, stream=False), range(clients)))
    return time.perf_counter() - began


def sample(way: str, folder: Path, weights: Path) -> dict[str, float]:
    """Each figure of one server, which is ended."""
    port = free_port()
    line, env = command(way, folder, weights, port)
    server = Server(port, None)
    began = time.perf_counter()
    with (folder / "log").open("wb") as log, psutil.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            while not server.healthy():
                if process.poll() is not None or time.perf_counter() - began > 300:
                    raise RuntimeError((folder / "log").read_text()[-3000:])
                time.sleep(0.05)
            found = {"start": time.perf_counter() - began}
            together(server, 1)
            found["one"] = statistics.median(together(server, 1) for _ in range(3))
            found["eight"] = statistics.median(together(server, 8) for _ in range(3))
            time.sleep(1.5)
            before = processor_seconds(process)
            for _ in range(5):
                server.ask(server.connect(), 1, stream=False)
                time.sleep(1.5)
            return found | {"processor": (processor_seconds(process) - before) / 5}
        finally:
            process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    options = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        weights = prepare(Path(folder))
        for pair in range(2 if options.quick else 5):
            for way in WAYS if pair % 2 else reversed(WAYS):
                samples[way].append(sample(way, Path(folder), weights))
    rows = {}
    for what in TITLES:
        apart, engine = ([one[what] for one in samples[way]] for way in WAYS)
        ratio = interval([a / b for a, b in zip(apart, engine, strict=True)])
        rows[what] = {"apart": statistics.median(apart), "in the engine": statistics.median(engine), "ratio": ratio}
    if options.output == "json":
        print(json.dumps({"pairs": len(samples["apart"])} | rows))
        return 0
    print(f"{'':18} {WAYS[0]:>9} {WAYS[1]:>14}  ratio (95 %)")
    for what, title in TITLES.items():
        mean, low, high = rows[what]["ratio"]
        print(f"{title:18} {rows[what]['apart']:9.2f} {rows[what]['in the engine']:14.2f}  {mean:.2f} ({low:.2f} to {high:.2f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
