"""What the sliding window saves in the KV cache, by vLLM's own figures, and what smaller prefill chunks cost.

1. held: an engine with our class decodes behind prompts of 8k, 16k and 32k tokens; after each step vLLM's KV cache manager is
   asked which blocks the request holds. The model is tiny: the number of blocks of 128 tokens does not depend on it. Goal: at
   32k the window needs at most 1/7.5 of the blocks.
2. admitted: requests of 32768 tokens that vLLM says fit at once into one cache, for several chunk sizes
   (`max_num_batched_tokens`), by the function that prints "Maximum concurrency" in its log; with the cache spec of Mistral 7B,
   as our class declares it.
3. prefill: tokens per processor second of a whole decoder layer with Mistral 7B's dimensions, by chunk size, interleaved, always
   the same stretch of a prompt, behind the first window. On a GPU small chunks cost something else: each step reads all weights
   once. So `least_chunk` gives, by arithmetic, the chunk that computes as long as it reads the weights; far above it, size costs
   nothing.

    python benchmarks/kv_blocks.py [--quick] [-o json] [--plot kv_blocks.png]

Needs the node's environment; the plot needs matplotlib besides.
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
from typing import Any

import torch
from attention import CONFIG, WINDOW, Bench, engine_config

GOAL = 7.5
BLOCK = 128
DECODED = 6
CACHE_GIB = 6  # what an L4 leaves beside the weights: about 47k tokens
LAYERS_7B = 32
# From NVIDIA's data sheets: bfloat16 operations a second (dense), and bytes of memory a second. A weight has 2 bytes and costs
# 2 operations a token, so a chunk of operations / bytes tokens computes as long as it reads.
GPUS = {
    "L4": (121e12, 0.300e12), "A10G": (70e12, 0.600e12), "L40S": (362e12, 0.864e12), "A100": (312e12, 2.039e12),
    "H100": (989e12, 3.35e12),
}  # fmt: skip
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def held_by_one_request(lengths: list[int], window: int | None) -> dict[int, list[int]]:
    """Blocks held after each decoding step, by length of the prompt. Runs in a process of its own."""
    import vllm_mistral
    from vllm import LLM, SamplingParams

    vllm_mistral.register()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG | TINY | {"sliding_window": window, "vocab_size": 512}))
        llm: Any = LLM(
            folder, skip_tokenizer_init=True, load_format="dummy", enforce_eager=True, max_model_len=max(lengths) + 128,
            max_num_seqs=2, block_size=BLOCK, num_gpu_blocks_override=2 * (max(lengths) // BLOCK + 2),
            max_num_batched_tokens=2048,
            enable_prefix_caching=False, disable_log_stats=True,
        )  # fmt: skip
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        held: dict[int, list[int]] = {}
        for length in lengths:
            prompt: Any = {"prompt_token_ids": [(7 * i) % 500 + 3 for i in range(length)]}
            sampling = SamplingParams(temperature=0, max_tokens=DECODED + 2, ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request("one", prompt, sampling)
            counts: list[int] = []
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                for request in scheduler.running:
                    if request.num_computed_tokens > length:
                        [blocks] = scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
                        counts.append(sum(not block.is_null for block in blocks))
            held[length] = counts
        llm.llm_engine.engine_core.shutdown()
    return held


def held(lengths: list[int]) -> dict[str, dict[str, list[int]]]:
    """With the window and without, two processes at a time: they count and are not timed."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--threads", "1", "--worker", json.dumps([lengths, window])],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, window in (("window", WINDOW), ("none", None))
    }
    printed = {name: worker.communicate(timeout=900)[0] for name, worker in workers.items()}
    return {name: json.loads(text.splitlines()[-1]) for name, text in printed.items()}


def admitted(chunk: int, window: int | None, max_model_len: int, asynchronous: bool) -> dict[str, Any]:
    """vLLM's own figures for Mistral 7B with `CACHE_GIB` of cache. Scheduled asynchronously, its default on a GPU, two steps
    are in flight, and blocks come back one step later."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_max_concurrency_for_kv_cache_config

    kinds = ["sliding_attention" if window else "full_attention"]
    options = {"max_model_len": max_model_len, "max_num_batched_tokens": chunk}
    with engine_config(kinds, **options) as vllm_config:
        vllm_config.scheduler_config.async_scheduling = asynchronous  # which the CPU platform switches off
        bench = Bench(vllm_config, 256, 256, whole_layers=False)
        attention = bench.sequences[0].layer.self_attn.attn
        spec = attention.get_kv_cache_spec(vllm_config)
        vllm_config.cache_config.kv_cache_layout = attention.attn_backend.supported_kv_cache_layouts()[0].name
        specs = {f"model.layers.{i}.self_attn.attn": spec for i in range(LAYERS_7B)}
        [cache] = get_kv_cache_configs(vllm_config, [specs], [CACHE_GIB << 30])
        concurrency = get_max_concurrency_for_kv_cache_config(vllm_config, cache)
        return {
            "chunk": chunk, "window": window, "async_scheduling": asynchronous, "spec": type(spec).__name__,
            "blocks": cache.num_blocks,
            "block_size": spec.block_size,
            "max_in_flight_tokens": vllm_config.max_in_flight_tokens, "max_concurrency": round(concurrency, 2),
            "blocks_per_request": round(cache.num_blocks / concurrency),
        }  # fmt: skip


def prefill(chunks: list[int], stretch: int, rounds: int) -> dict[int, list[tuple[float, float]]]:
    """Seconds (wall, processor) for `stretch` tokens behind the first window through one decoder layer, for each chunk size."""
    samples: dict[int, list[tuple[float, float]]] = {chunk: [] for chunk in chunks}
    longest = WINDOW + stretch
    with engine_config(["sliding_attention"], max_model_len=longest, max_num_batched_tokens=max(chunks)) as vllm_config:
        bench = Bench(vllm_config, longest, max(chunks), whole_layers=True)
        bench.forward(slice(0, 1), 0, 128)
        for round_ in range(rounds):
            for chunk in chunks if round_ % 2 else chunks[::-1]:
                bench.restart()
                bench.metadata(bench.sequences[0], 0, WINDOW)
                taken = [bench.forward(slice(0, 1), start, start + chunk) for start in range(WINDOW, longest, chunk)]
                samples[chunk].append((sum(wall for wall, _ in taken), sum(cpu for _, cpu in taken)))
    return samples


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    lengths = [int(length) for length in report["held"]["window"]]
    for shift, (name, colour) in enumerate((("none", "#b0413e"), ("window", "#2a6f97"))):
        label = f"window {WINDOW}" if name == "window" else "no window"
        tops = [max(counts) for counts in report["held"][name].values()]
        bars = left.bar([i + 0.4 * shift for i in range(len(lengths))], tops, 0.4, color=colour, label=label)
        left.bar_label(bars)
        rows = [
            row
            for row in report["admitted"]
            if row["window"] == (WINDOW if name == "window" else None) and row["async_scheduling"] == (name == "window")
        ]
        middle.plot([row["chunk"] for row in rows], [row["max_concurrency"] for row in rows], "o-", color=colour, label=label)
    left.set_xticks([i + 0.2 for i in range(len(lengths))], [f"{length // 1024}k" for length in lengths])
    left.set_title(f"blocks of {BLOCK} held while decoding")
    left.set_xlabel("tokens of the prompt")
    middle.set_title(f"requests of 32k at once, {CACHE_GIB} GiB, asynchronous")
    relative = report["prefill"]["relative_speed"]
    right.plot([int(chunk) for chunk in relative], list(relative.values()), "o-", color="#2a6f97")
    right.set_title("prefill speed (1: chunks of 2048)")
    for axis in (middle, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("max_num_batched_tokens")
        axis.set_ylim(bottom=0)
    for axis in (left, middle):
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few sizes, one round: proves that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="PNG to draw; needs matplotlib")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        lengths, window = json.loads(options.worker)
        print(json.dumps(held_by_one_request(lengths, window)))
        return
    began = time.perf_counter()
    lengths = [8192, 16384, 32768]
    chunks = [512, 2048] if options.quick else [512, 1024, 2048, 4096, 8192]
    stretch, rounds = (2048, 1) if options.quick else (8192, options.rounds)
    counts = held(lengths)
    ratios = {length: round(max(counts["none"][length]) / max(counts["window"][length]), 3) for length in counts["window"]}
    kinds = [(WINDOW, False), (WINDOW, True), (None, False)]
    figures = [admitted(chunk, window, 32768, asynchronous) for window, asynchronous in kinds for chunk in chunks]
    samples = prefill(chunks, stretch, rounds)
    speed = {chunk: stretch / statistics.median(cpu for _, cpu in taken) for chunk, taken in samples.items()}
    wall_speed = {chunk: stretch / statistics.median(wall for wall, _ in taken) for chunk, taken in samples.items()}
    report = {
        "name": "kv_blocks", "ratio": ratios["32768"], "goal": GOAL,
        "what": f"KV blocks held while decoding behind 32768 tokens: no window / window {WINDOW}",
        "quick": options.quick, "held": counts, "ratios": ratios, "admitted": figures, "cache_gib": CACHE_GIB,
        "prefill": {
            "tokens": stretch, "threads": options.threads, "rounds": rounds,
            "tokens_per_cpu_second": {str(chunk): round(value, 1) for chunk, value in speed.items()},
            "relative_speed": {str(chunk): round(value / speed[2048], 3) for chunk, value in speed.items()},
            "relative_speed_wall": {str(chunk): round(value / wall_speed[2048], 3) for chunk, value in wall_speed.items()},
            "samples": {str(chunk): [[round(v, 4) for v in sample] for sample in taken] for chunk, taken in samples.items()},
        },
        "least_chunk": {gpu: round(operations / memory) for gpu, (operations, memory) in GPUS.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    if options.plot:
        draw(report, options.plot)
    if options.output == "json":
        print(json.dumps(report))
        return
    print(f"blocks of {BLOCK} tokens held while decoding: no window / window {WINDOW}")
    for length, ratio in ratios.items():
        print(f"  {length:>6} tokens: {max(counts['none'][length]):4d} / {max(counts['window'][length]):3d} = {ratio:.2f}")
    print(
        f"requests of 32768 tokens at once in {CACHE_GIB} GiB of cache, by vLLM's own figures; prefill speed of each chunk size"
    )
    for row in figures:
        about = f"window {row['window']}{', asynchronous' * row['async_scheduling']}" if row["window"] else "no window"
        relative = report["prefill"]["relative_speed"][str(row["chunk"])]
        measured = "" if row["async_scheduling"] or not row["window"] else f", prefill {relative:.2f} of that with 2048"
        print(
            f"  {about:25} chunk {row['chunk']:5d}: {row['max_concurrency']:6.2f} ({row['blocks_per_request']} blocks each of "
            f"{row['blocks']}, up to {row['max_in_flight_tokens']} tokens in flight){measured}"
        )
    print(f"chunk that computes as long as it reads the weights, by arithmetic: {report['least_chunk']}")
    print(f"{report['what']} = {report['ratio']}; goal at least {GOAL}")


if __name__ == "__main__":
    main()
