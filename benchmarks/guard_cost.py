"""What guard and TLS cost: requests per second and time to the first token, beside bare vLLM with the same model and flags.

Two servers run at once, one of them as the launcher starts it for --public; samples alternate, the first of each pair by turns.
The ratios are geometric means over all pairs, guarded to bare for requests per second and bare to guarded for the time to the first
token, so that below 1 is a cost, with a 95 % confidence interval by bootstrap over the pairs. The client's part of TLS is in it, on
the same processors. Goal: not wholly below 0.98.

    python benchmarks/guard_cost.py [--quick] [-o json]      # in the node's environment: make bench
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_contract import files, keys
from mistral_node import tls
from mistral_node.contract import read
from mistral_node.engines import vllm
from startup import contract, free_port, prepare

KEY = "a-key-of-this-benchmark"
GOAL = 0.98
CLIENTS, TOKENS = 4, 16


@dataclass
class Server:
    """Where one of them is; `context` for the one that speaks TLS."""

    port: int
    context: ssl.SSLContext | None

    def connect(self) -> http.client.HTTPConnection:
        if self.context is not None:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=120, context=self.context)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(self, connection: http.client.HTTPConnection, tokens: int, stream: bool) -> float:
        """One completion; seconds to the first piece of its body."""
        body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True, "stream": stream}  # fmt: skip
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        answer.readline()
        first = time.perf_counter() - began
        rest = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {rest[:300]!r}")
        return first

    def healthy(self) -> bool:
        connection = self.connect()
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def requests_per_second(self, each: int) -> float:
        """By CLIENTS at once, each with a connection that it keeps."""
        connections = [self.connect() for _ in range(CLIENTS)]

        def client(connection: http.client.HTTPConnection) -> None:
            for _ in range(each):
                self.ask(connection, TOKENS, stream=False)
            connection.close()

        with ThreadPoolExecutor(CLIENTS) as pool:
            began = time.perf_counter()
            list(pool.map(client, connections))  # a request that failed fails here
        return CLIENTS * each / (time.perf_counter() - began)

    def first_token(self, times: int) -> float:
        """Seconds, the median of requests one after the other on one connection."""
        connection = self.connect()
        found = statistics.median(self.ask(connection, 2, stream=True) for _ in range(times))
        connection.close()
        return found


@contextmanager
def both(folder: Path) -> Iterator[dict[str, Server]]:
    """Both servers, ready; ended afterwards."""
    weights = prepare(folder)
    ports = free_port(), free_port()
    changed = {
        "MISTRALCTL_TLS": "self-signed",
        "MISTRALCTL_SERVE_USER": "",
        "MISTRALCTL_DTYPE": "float32",
        "MISTRALCTL_KEYS": keys.Keys(1, (keys.make(KEY, "benchmark", 1.0),)).dump(),
        "MISTRALCTL_SECRETS": '["address"]',
    }
    envs = contract(folder / "node", weights, ports[0]) | changed
    run_dir = folder / "node" / "run" / "startup"
    secrets = run_dir / "secrets.json"
    secrets.touch(mode=0o600)
    secrets.write_text(json.dumps({"address": "127.0.0.1"}))
    wanted = read(envs | {"MISTRALCTL_TLS": "", "MISTRALCTL_PORT": str(ports[1])})
    arguments = vllm.arguments(wanted, weights)
    at = arguments.index("--middleware")
    del arguments[at : at + 2]
    bare = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    commands = [([sys.executable, "-m", "mistral_node.serve"], os.environ | envs), (bare, vllm.environment(wanted, os.environ))]
    processes = []
    with (folder / "log").open("wb") as log:
        for command, env in commands:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        servers = {"bare": Server(ports[1], None)}
        deadline = time.monotonic() + 300
        while len(servers) < 2 or not all(server.healthy() for server in servers.values()):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise RuntimeError((folder / "log").read_text()[-3000:])
            certificate = run_dir / "shared" / files.CERTIFICATE.name
            if len(servers) < 2 and certificate.exists():
                servers["guarded"] = Server(ports[0], tls.trusting(certificate.read_text()))
            time.sleep(0.5)
        yield servers
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % confidence interval."""
    logs = [math.log(ratio) for ratio in ratios]
    generator = random.Random(7)
    means = sorted(statistics.fmean(generator.choices(logs, k=len(logs))) for _ in range(4000))
    return math.exp(statistics.fmean(logs)), math.exp(means[100]), math.exp(means[-101])


def measure(servers: dict[str, Server], pairs: int, each: int) -> dict[str, Any]:
    """Both figures of both servers, their ratios, and whether the goal was met."""
    samples: dict[str, dict[str, list[float]]] = {what: {"bare": [], "guarded": []} for what in ("requests", "first")}
    for server in servers.values():
        server.requests_per_second(2)
        server.first_token(3)
    for pair in range(pairs):
        order = ("bare", "guarded") if pair % 2 else ("guarded", "bare")
        for name in order:
            samples["requests"][name].append(servers[name].requests_per_second(each))
        for name in order:
            samples["first"][name].append(servers[name].first_token(4 * each))
    requests = interval([a / b for a, b in zip(samples["requests"]["guarded"], samples["requests"]["bare"], strict=True)])
    first = interval([b / a for a, b in zip(samples["first"]["guarded"], samples["first"]["bare"], strict=True)])
    middle = {what: {name: statistics.median(values) for name, values in found.items()} for what, found in samples.items()}
    return {
        "pairs": pairs, "requests_per_second": middle["requests"], "first_token_seconds": middle["first"],
        "ratio_requests": requests, "ratio_first_token": first, "goal": GOAL,
        "met": requests[2] >= GOAL and first[2] >= GOAL,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, both(Path(folder)) as servers:
        found = measure(servers, 8 if options.quick else 24, 4)
    if options.output == "json":
        print(json.dumps(found))
        return 0
    print(f"{'':22} {'bare':>9} {'guarded':>9}  ratio (95 %)")
    for title, values, ratio, scale in (
        ("requests per second", "requests_per_second", "ratio_requests", 1),
        ("first token, ms", "first_token_seconds", "ratio_first_token", 1000),
    ):
        one = found[values]
        mean, low, high = found[ratio]
        print(f"{title:22} {one['bare'] * scale:9.2f} {one['guarded'] * scale:9.2f}  {mean:.3f} ({low:.3f} to {high:.3f})")
    print(f"goal: not wholly below {GOAL}: {'met' if found['met'] else 'MISSED'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
