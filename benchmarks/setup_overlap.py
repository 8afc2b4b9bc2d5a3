"""How much of a node's setup the pull of the weights costs: beside the installation of vLLM, against one after the other.

Both are real: model/node/setup.sh installs vLLM for the CPU into a fresh folder with an empty cache, as on a new machine,
and pulls weights, with every range checked, from an HTTP server that gives a fixed number of bytes a second, as a far store does. Three runs a round,
in turns, each by the phases that the node itself logs:

    vLLM alone       the weights are there already
    weights alone    vLLM is there already
    together         neither is there: from the first start to the last end

The ratio is `together` over the sum of the two others. Its lower bound is the longer one's share of that sum, 0.5 where both
take equally long; so the store's rate is chosen, by a run that does not count, such that they do (--rate fixes it instead), and
`hidden` says it without that choice: which part of the shorter one was hidden behind the longer one (1: all of it).

    python benchmarks/setup_overlap.py [--quick] [-o json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from mistralctl import phases, tasks
from mistralctl.runtime import local

GOAL = 0.65
NAME = "model-00001-of-00001.safetensors"
PIECE = 256 * 2**10


@dataclass(frozen=True)
class Sample:
    """One round, seconds: each of the two by itself, and both at once."""

    vllm_alone: float
    weights_alone: float
    together: float

    @property
    def ratio(self) -> float:
        return self.together / (self.vllm_alone + self.weights_alone)

    @property
    def hidden(self) -> float:
        return (self.vllm_alone + self.weights_alone - self.together) / min(self.vllm_alone, self.weights_alone)


class Bucket:
    """Bytes that may still be sent, at a fixed rate for all connections together."""

    def __init__(self, rate: float) -> None:
        self.rate, self.lock, self.free = rate, threading.Lock(), time.monotonic()

    def take(self, size: int) -> None:
        with self.lock:
            now = time.monotonic()
            self.free = max(self.free, now - 0.05) + size / self.rate
            wait = self.free - now
        if wait > 0:
            time.sleep(wait)


@contextmanager
def s3(folder: Path, bucket: Bucket) -> Iterator[str]:
    """A server that speaks as much of S3 as a pull needs: the list, and ranges of objects."""
    etags = {path.name: f'"{hashlib.md5(path.name.encode()).hexdigest()}"' for path in folder.iterdir()}  # noqa: S324

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing to say."""

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            name = url.path.rsplit("/", 1)[-1]
            if "list-type" in parse_qs(url.query):
                rows = "".join(
                    f"<Contents><Key>set/{n}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{e}</ETag>"
                    f"<Size>{(folder / n).stat().st_size}</Size></Contents>"
                    for n, e in etags.items()
                )
                body = (
                    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>weights</Name>'
                    f"<Prefix>set/</Prefix><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
                ).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            size = (folder / name).stat().st_size
            first, last = 0, size - 1
            asked = self.headers.get("Range", "")
            if asked:
                start, _, stop = asked.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(stop), last)
            self.send_response(206 if asked else 200)
            self.send_header("ETag", etags[name])
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            with (folder / name).open("rb") as source:
                source.seek(first)
                left = last - first + 1
                while left:
                    piece = source.read(min(PIECE, left))
                    bucket.take(len(piece))
                    self.wfile.write(piece)
                    left -= len(piece)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def make_set(folder: Path, size: int) -> None:
    """One file of noise, and the manifest that a mirror has; made by the weights tool from a folder."""
    source = folder.with_name("noise")
    source.mkdir()
    dice = random.Random(1)
    with (source / NAME).open("wb") as sink:
        for _ in range(size // 2**20):
            sink.write(dice.randbytes(2**20))
    (source / "config.json").write_text("{}")
    subprocess.run(
        [sys.executable, "-m", "mistralctl", "weights", "pull", f"file://{source}", str(folder)], check=True, capture_output=True
    )
    shutil.rmtree(source)


def task_for(home: Path) -> tasks.Task:
    """The task of `up --cloud local` in that home folder, its files in place."""
    command = ["up", "smollm2-135m-instruct", "--cloud", "local", "--weights", "s3://weights/set", "--dry-run", "-o", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "mistralctl", *command], env=os.environ | {"MISTRALCTL_HOME": str(home)}, capture_output=True,
        check=True,
    )  # fmt: skip
    task: tasks.Task = json.loads(done.stdout)
    Path(task["envs"]["MISTRALCTL_NODE_DIR"]).mkdir(parents=True, exist_ok=True)
    local.place_files(task)
    return task


def setup(task: tasks.Task, variables: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Runs the task's `setup`; phase -> (start, end)."""
    env = local.environment(task, os.environ | variables)
    done = subprocess.run(["bash", "-c", task["setup"]], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"setup failed: {done.stderr[-2000:]}")
    found: dict[str, tuple[float, float]] = {}
    for event in filter(None, map(phases.parse, done.stdout.splitlines())):
        start = found.get(event.phase, (event.at, event.at))[0]
        found[event.phase] = (start, event.at)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--mib", type=int, default=512, help="size of the weights")
    parser.add_argument(
        "--rate", type=int, default=0, help="MiB per second that the store gives (0: so that both take equally long)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="how many rounds (5; quick: 1)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    samples = []
    with tempfile.TemporaryDirectory(prefix="setup-overlap-") as room:
        source = Path(room) / "set"
        make_set(source, options.mib * 2**20)
        bucket = Bucket(options.rate * 2**20 or 2**30)
        with s3(source, bucket) as url:
            cache = Path(room) / "cache"
            variables = {
                "UV_CACHE_DIR": str(cache), "AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            }  # fmt: skip
            task = task_for(Path(room) / "home")
            node = Path(task["envs"]["MISTRALCTL_NODE_DIR"])
            environment = node / "envs" / task["envs"]["MISTRALCTL_ENV_ID"]
            weights = node / "weights" / task["envs"]["MISTRALCTL_WEIGHTS_ID"]
            setup(task, variables)  # once uncounted: the small environment of the weights tool
            size = options.mib * 2**20

            def without(*paths: Path) -> dict[str, tuple[float, float]]:
                for path in paths:
                    shutil.rmtree(path)
                if environment in paths:
                    shutil.rmtree(cache)
                os.sync()
                return setup(task, variables)

            if not options.rate:
                start, end = without(environment)["environment"]
                bucket.rate = size / (end - start)
            for _ in range(options.rounds or (1 if options.quick else 5)):
                vllm, pull, both = without(environment), without(weights), without(environment, weights)
                samples.append(
                    Sample(
                        round(vllm["environment"][1] - vllm["environment"][0], 2),
                        round(pull["weights"][1] - pull["weights"][0], 2),
                        round(max(end for _, end in both.values()) - min(start for start, _ in both.values()), 2),
                    )
                )
    ratio = statistics.median(sample.ratio for sample in samples)
    hidden = statistics.median(sample.hidden for sample in samples)
    rate = round(bucket.rate / 2**20, 1)
    medians = {key: statistics.median(asdict(sample)[key] for sample in samples) for key in asdict(samples[0])}
    if options.output == "json":
        body = {
            "name": "setup_overlap",
            "ratio": round(ratio, 3),
            "goal": GOAL,
            "hidden": round(hidden, 3),
            "quick": options.quick,
            "mib": options.mib,
            "rate_mib": rate,
            "medians": medians,
            "samples": [asdict(sample) for sample in samples],
        }
        print(json.dumps(body))
        return
    print(f"{options.mib} MiB of weights at {rate} MiB/s beside vLLM for the CPU; medians of {len(samples)}")
    for name, seconds in medians.items():
        print(f"{name.replace('_', ' '):16}{seconds:8.2f} s")
    print(f"together / one after the other: {ratio:.2f} (goal: at most {GOAL}); hidden: {hidden:.2f} of the shorter one")


if __name__ == "__main__":
    main()
