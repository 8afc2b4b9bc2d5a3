"""Does a server stay as it is? Memory, files, threads and disk of each of its processes under a bounded load, for minutes.

A real launcher with vLLM on this machine serves SmolLM2-135M-Instruct to clients with a key (streams, whole answers, answers that are given
up half-way, connections that rest), to strangers (refusals, bodies that nobody wants, connections that say nothing) and to whoever asks
`/health`. Each figure is sampled; what the first quarter of the time has filled once is no growth, so a line is fitted through the rest. It is flat
if that line rises by less than LIMITS over the whole time.

    python benchmarks/soak.py [--minutes 15] [--plot soak.png] [-o FILE]      # in the node's environment: make bench
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from startup import KEY, contract, free_port, healthy, prepare

SAMPLE_SECONDS, PIECES = 5.0, 5
PAUSE_SECONDS = 1.0  # of a client between two requests: two clients with a key and two without, beside what they wait
# What the fitted line may rise over the whole time, and be called flat. Python's allocator gives pages back late.
LIMITS = {"memory (MiB)": 24.0, "files": 3.0, "threads": 2.0, "disk (MiB)": 4.0}


class Load:
    """Clients, each a thread that does one of a few things again and again."""

    def __init__(self, port: int) -> None:
        self.port, self.stop, self.counts = port, threading.Event(), Counter[str]()
        self.threads = [
            threading.Thread(target=self._client, args=(number, [self.whole, self.streamed, self.given_up, self.resting]))
            for number in range(2)
        ]
        strange = [self.refused, self.refused_body, self.silent, self.health]
        self.threads += [threading.Thread(target=self._client, args=(2 + number, strange)) for number in range(2)]

    def _client(self, seed: int, ways: list[Callable[[], None]]) -> None:
        chance = random.Random(seed)
        while not self.stop.is_set():
            way = chance.choice(ways)
            try:
                way()
                self.counts[way.__name__] += 1
            except (OSError, http.client.HTTPException) as error:
                self.counts[f"{way.__name__}: {type(error).__name__}"] += 1
            self.stop.wait(PAUSE_SECONDS)

    def _ask(self, connection: http.client.HTTPConnection, key: str = KEY, **fields: Any) -> http.client.HTTPResponse:
        body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 16, "ignore_eos": True} | fields
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        )
        return connection.getresponse()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def whole(self) -> None:
        connection = self._connect()
        for _ in range(3):
            answer = self._ask(connection)
            answer.read()
            if answer.status != 200:
                raise OSError(answer.status)
        connection.close()

    def streamed(self) -> None:
        connection = self._connect()
        self._ask(connection, stream=True).read()
        connection.close()

    def given_up(self) -> None:
        connection = self._connect()
        self._ask(connection, stream=True, max_tokens=500).readline()
        connection.close()

    def resting(self) -> None:
        connection = self._connect()
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        connection.getresponse().read()
        self.stop.wait(3.0)
        connection.close()

    def refused(self) -> None:
        connection = self._connect()
        for _ in range(20):
            self._ask(connection, key="wrong").read()
        connection.close()

    def refused_body(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), 10) as wire, suppress(OSError):
            wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
            for _ in range(1000):
                wire.sendall(b"x" * 65536)

    def silent(self) -> None:
        wires = [socket.create_connection(("127.0.0.1", self.port), 10) for _ in range(20)]
        self.stop.wait(2.0)
        for wire in wires:
            wire.close()

    def health(self) -> None:
        if not healthy(self.port):
            raise OSError("not healthy")


def name_of(process: psutil.Process) -> str:
    """What a process of the launcher is."""
    command = " ".join(process.cmdline())
    if "mistral_node.serve" in command:
        return "launcher"
    if "ward.py" in command:
        return "ward"
    if process.name().startswith("VLLM::Engine"):
        return "engine"
    return "API server" if "mistral_node.start" in command else "others"


def sample(launcher: psutil.Process, folder: Path) -> dict[str, dict[str, float]]:
    """Each figure of each process now; of processes with one name the sum."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("memory (MiB)", "files", "threads"), 0.0))
    for process in [launcher, *launcher.children(recursive=True)]:
        with suppress(psutil.Error):
            one = found[name_of(process)]
            one["memory (MiB)"] += process.memory_info().rss / 2**20
            one["files"] += process.num_fds()
            one["threads"] += process.num_threads()
    blocks = sum(file.lstat().st_blocks for file in folder.rglob("*") if not file.is_symlink())
    found["node's folder and log"] = {"disk (MiB)": blocks * 512 / 2**20}
    return found


def rise(times: list[float], values: list[float]) -> float:
    """How much the line that fits best rises over all of the time, fitted without its first quarter.

    Clients' connections come and go, so the line goes through the least value of each of five pieces of that time: a leak raises that, too.
    """
    start = times[-1] / 4
    kept = [(value, at) for at, value in zip(times, values, strict=True) if at >= start]
    each = max(min(12, len(kept) // 2), len(kept) // PIECES)
    least = [min(kept[first : first + each]) for first in range(0, len(kept) - each + 1, each)]
    slope, _ = statistics.linear_regression([at for _, at in least], [value for value, _ in least])
    return slope * times[-1]


def measure(minutes: float, folder: Path) -> tuple[list[float], list[dict[str, dict[str, float]]], Counter[str]]:
    """Times in seconds, samples, and what the clients did."""
    weights, port = prepare(folder), free_port()
    node = folder / "node"
    environ = os.environ | contract(node, weights, port) | {"MISTRALCTL_SERVE_USER": "", "MISTRALCTL_DTYPE": "float32"}
    with (node / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "mistral_node.serve"], env=environ, stdout=log, stderr=log)
    load, times, samples = Load(port), [], []
    try:
        while '"phase": "ready"' not in (node / "log").read_text():
            if process.poll() is not None:
                raise RuntimeError((node / "log").read_text()[-3000:])
            time.sleep(0.5)
        launcher, began = psutil.Process(process.pid), time.monotonic()
        for thread in load.threads:
            thread.start()
        while (at := time.monotonic() - began) < minutes * 60 and process.poll() is None:
            times.append(at)
            samples.append(sample(launcher, node))
            time.sleep(SAMPLE_SECONDS)
        if process.poll() is not None:
            raise RuntimeError(f"the launcher ended with {process.returncode}: {(node / 'log').read_text()[-3000:]}")
    finally:
        load.stop.set()
        for thread in load.threads:
            if thread.ident is not None:
                thread.join(60)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
    return times, samples, load.counts


def table(times: list[float], samples: list[dict[str, dict[str, float]]]) -> tuple[str, bool]:
    """In Markdown, and whether all is flat."""
    lines = [
        "| process | what | after a quarter | at the end | rise of the line | flat below | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    good = True
    for process in samples[-1]:
        for what, limit in LIMITS.items():
            values = [one.get(process, {}).get(what) for one in samples]
            if None in values:
                continue
            numbers = [float(value or 0.0) for value in values]
            grown = rise(times, numbers)
            good = good and grown < limit
            quarter = numbers[len(numbers) // 4]
            verdict = "flat" if grown < limit else "grows"
            lines.append(f"| {process} | {what} | {quarter:.1f} | {numbers[-1]:.1f} | {grown:+.2f} | {limit:.0f} | {verdict} |")
    return "\n".join(lines), good


def draw(times: list[float], samples: list[dict[str, dict[str, float]]], path: Path) -> None:
    """A plot for each figure, a line for each process."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(LIMITS), figsize=(14, 3.2), constrained_layout=True)
    for axis, what in zip(axes, LIMITS, strict=True):
        for process in samples[-1]:
            if what in samples[-1][process]:
                axis.plot([at / 60 for at in times], [one.get(process, {}).get(what) for one in samples], label=process)
        axis.set_title(what)
        axis.set_xlabel("minutes")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--plot", type=Path, help="PNG to draw; needs matplotlib")
    parser.add_argument("-o", "--output", type=Path, help="write the table to this file")
    options = parser.parse_args()
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed; pip install matplotlib")
    with tempfile.TemporaryDirectory() as name:
        times, samples, counts = measure(options.minutes, Path(name))
    text, good = table(times, samples)
    print(f"{times[-1] / 60:.1f} minutes, {len(times)} samples; requests: {dict(sorted(counts.items()))}\n\n{text}")
    if options.output:
        options.output.write_text(text + "\n")
    if options.plot:
        draw(times, samples, options.plot)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
