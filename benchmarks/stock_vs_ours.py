"""Our model class beside vLLM's stock Mistral class: tokens per CPU second, prefill and decode, several shapes.

Two engines, one with each class and the same random weights' sizes, each in a process of its own that sleeps while the other
works; samples alternate, the first of each pair by turns. The figure is CPU time, not wall time, so that a shared machine's
other work does not count. The ratio is the geometric mean over all pairs of (ours / stock), with a 95 % confidence interval by
bootstrap over the pairs. Goal: not below 0.99.

    python benchmarks/stock_vs_ours.py [--quick] [-o json]      # in the node's environment: make bench
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLASSES = {"ours": "MistralSWAForCausalLM", "stock": "MistralForCausalLM"}
# hidden, intermediate, layers, heads, key-value heads, window
SHAPES = {
    "small, window 256": (512, 1536, 8, 8, 2, 256),
    "SmolLM2-135M": (576, 1536, 30, 9, 3, None),
    "two layers of 7B": (4096, 14336, 2, 32, 8, 4096),
}
# prompts, tokens of each, new tokens of each
WORK = {"prefill": (4, 512, 1), "decode": (8, 16, 48)}


def config(shape: tuple[int, int, int, int, int, int | None]) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads, window = shape
    return {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": hidden, "vocab_size": 32000,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "sliding_window": window, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def work(folder: str, architecture: str) -> None:
    """The worker: one engine; for each line of JSON on standard input one sample as JSON on the protocol's descriptor."""
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not mix with the protocol
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, skip_tokenizer_init=True, load_format="dummy", enforce_eager=True, max_model_len=2048, max_num_seqs=8,
        hf_overrides={"architectures": [architecture]}, enable_prefix_caching=False, max_num_batched_tokens=2048,
        disable_log_stats=True,
    )  # fmt: skip
    [served] = llm.apply_model(lambda model: type(model).__name__)
    protocol.write(json.dumps({"class": served}) + "\n")
    protocol.flush()
    for line in sys.stdin:
        order = json.loads(line)
        generator = random.Random(order["seed"])
        prompts: list[Any] = [
            {"prompt_token_ids": [generator.randrange(3, 32000) for _ in range(order["length"])]} for _ in range(order["prompts"])
        ]
        sampling = SamplingParams(temperature=0, max_tokens=order["new"], ignore_eos=True, detokenize=False)
        wall, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.process_time() - cpu
        tokens = order["prompts"] * (order["length"] if order["new"] == 1 else order["new"])
        sample = {"cpu_seconds": round(seconds, 4), "wall_seconds": round(time.perf_counter() - wall, 4), "tokens": tokens}
        protocol.write(json.dumps(sample) + "\n")
        protocol.flush()


class Worker:
    """A worker process and its protocol."""

    def __init__(self, folder: Path, architecture: str) -> None:
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
        env = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, "--worker", str(folder), architecture]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        served = self.read()["class"]
        if served != architecture:
            raise SystemExit(f"{served} serves instead of {architecture}")

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit("a worker ended before its time; run it by hand: --worker FOLDER ARCHITECTURE")
        found: dict[str, Any] = json.loads(line)
        return found

    def sample(self, kind: str, seed: int) -> dict[str, Any]:
        prompts, length, new = WORK[kind]
        order = {"prompts": prompts, "length": length, "new": new, "seed": seed}
        if self.process.stdin:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean, by 2000 resamples (seeded)."""
    generator = random.Random(1)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(2000))
    return means[50], means[1949]


def measure(shape: str, rounds: int) -> list[dict[str, Any]]:
    """Pairs of samples for one shape."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config(SHAPES[shape])))
        workers = {which: Worker(folder, architecture) for which, architecture in CLASSES.items()}
        try:
            for kind in WORK:
                for worker in workers.values():  # once uncounted
                    worker.sample(kind, 0)
                for i in range(rounds):
                    order = list(workers) if i % 2 else list(reversed(workers))
                    samples = {which: workers[which].sample(kind, i + 1) for which in order}
                    found.append({"shape": shape, "work": kind, **samples})
        finally:
            for worker in workers.values():
                worker.end()
    return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one small shape, two pairs: proves that it runs")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    shapes, rounds = (list(SHAPES)[:1], 2) if options.quick else (list(SHAPES), 12)
    pairs = [pair for shape in shapes for pair in measure(shape, rounds)]
    logs: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        logs.setdefault((pair["shape"], pair["work"]), []).append(
            math.log(pair["stock"]["cpu_seconds"] / pair["ours"]["cpu_seconds"])
        )
    every = [value for values in logs.values() for value in values]
    low, high = (math.exp(bound) for bound in interval(every))
    ratio = math.exp(statistics.fmean(every))
    if options.output == "text":
        for (shape, kind), values in logs.items():
            bounds = [math.exp(bound) for bound in interval(values)]
            print(f"{shape:20} {kind:8} {math.exp(statistics.fmean(values)):.4f}  [{bounds[0]:.4f}, {bounds[1]:.4f}]")
        print(f"ours / stock, tokens per CPU second: {ratio:.4f}  95 % [{low:.4f}, {high:.4f}]  (goal: not below 0.99)")
        return
    result = {"name": "stock_vs_ours", "ratio": round(ratio, 4), "goal": 0.99, "interval": [round(low, 4), round(high, 4)]}
    print(json.dumps({**result, "samples": pairs}))


if __name__ == "__main__":
    main()
