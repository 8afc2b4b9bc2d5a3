"""What a machine with an NVIDIA GPU shows with torch alone: no vLLM, no network, no weights, less than five minutes.

    make gpu-check                                      # or: python benchmarks/gpu_check.py [--output FOLDER]
    python benchmarks/gpu_check.py --small --device cpu # the same program, small, without a GPU

It runs `vllm_mistral/reference.py` from this checkout on the GPU, with random weights:

- equal: log-probabilities at every position of a ragged batch in chunks, beside the same on the CPU in one piece. float32, TF32 off.
- canary: the figures that a deployment is checked by, made on the CPU in float32, asked of the GPU in float32 and in bfloat16; and with
  a wrong window, which has to differ.
- attention: a layer of Mistral 7B over 16k and 32k tokens with the window 4096 and without, by CUDA events. A prompt of L tokens has
  L^2/2 pairs of query and key, and W L - W^2/2 with a window W; a decoded token L, and W: `pairs` is how many times fewer.
- blocks: what the reference's paged cache really holds at most while it computes a prompt, and what `blocks_held` bounds it by.

FOLDER (build/gpu-check) gets gpu-check.json and gpu-check.md, the table that docs/real-runs.md takes. Exit code: 0 if every figure is
within its limit, 1 if not, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "model" / part) for part in ("plugin", "contract")]
EQUAL_LIMIT = 1e-4


class CannotRun(Exception):
    """What is missing, in one line."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large each part is. The model's layers have in turn the window and none; `lengths` are of its ragged batch."""

    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    window: int
    lengths: tuple[int, ...]
    chunk: int
    attention_heads: tuple[int, int, int]  # query heads, key-value heads, head_dim
    attention_window: int
    attention_chunk: int
    attention_lengths: tuple[int, ...]
    rounds: int


FULL = Sizes(1024, 8, 2, 128, 512, (3000, 1, 511, 512, 513, 1700), 384, (32, 8, 128), 4096, 2048, (16384, 32768), 5)
SMALL = Sizes(128, 4, 2, 32, 96, (300, 1, 95, 96, 97, 180), 64, (8, 2, 32), 128, 64, (512, 1024), 3)


def nvidia_smi() -> dict[str, str]:
    """The first GPU by nvidia-smi; empty where there is none or it does not answer."""
    asked = ("name", "driver_version", "memory.total", "vbios_version", "power.limit", "clocks.max.sm", "pcie.link.gen.max")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = said.splitlines()[0].split(", ") if said else []
    return dict(zip(asked, values, strict=True)) if len(values) == len(asked) else {}


def machine(device: str) -> dict[str, Any]:
    """What this ran on; CannotRun where torch or the device is missing or does not compute."""
    try:
        import torch
    except ImportError as error:
        raise CannotRun(f"torch cannot be imported ({error}); python -m pip install torch, or name a Python that has it: "
                        "make gpu-check PYTHON=...") from error  # fmt: skip
    smi = nvidia_smi()
    if device == "cuda":
        if torch.version.cuda is None:
            raise CannotRun(f"torch {torch.__version__} of {sys.executable} is built without CUDA; install a build with it")
        if not torch.cuda.is_available():
            driver = f"driver {smi['driver_version']}" if smi else "nvidia-smi shows no GPU"
            raise CannotRun(f"torch {torch.__version__} (CUDA {torch.version.cuda}) reaches no GPU: {driver}")
    try:
        torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CannotRun(f"torch {torch.__version__} does not compute on {device}: {str(error).splitlines()[0]}") from error
    found: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "platform": platform.platform(), "cpu_threads": torch.get_num_threads(), "nvidia_smi": smi,
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1), "gpus": torch.cuda.device_count(),
        }  # fmt: skip
    return found


def random_weights(config: Any) -> dict[str, Any]:
    """float32, large enough for the distant past to matter."""
    import torch

    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in config.shapes().items():
        wide = torch.randn(shape, generator=generator)
        scale = 0.15 if "embed" in name or "head" in name else 1.6 / shape[-1] ** 0.5
        weights[name] = 1 + wide / 10 if "norm" in name else wide * scale
    return weights


def model_config(sizes: Sizes, **changed: Any) -> Any:
    from vllm_mistral.reference import ModelConfig

    windows = (sizes.window, None, sizes.window, sizes.window)
    config = ModelConfig(
        vocab_size=4096, hidden_size=sizes.hidden, intermediate_size=2 * sizes.hidden, num_hidden_layers=len(windows),
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_value_heads, head_dim=sizes.head_dim, rms_norm_eps=1e-5,
        rope_theta=1e4, max_position_embeddings=8192, tie_word_embeddings=False, windows=windows, eos_token_ids=(2,),
    )  # fmt: skip
    return dataclasses.replace(config, **changed)


def equality(device: str, sizes: Sizes) -> list[dict[str, Any]]:
    """The device in chunks and blocks beside the CPU in one piece; and the canary's figures."""
    import torch
    from mistral_contract.figures import TOLERANCE
    from vllm_mistral.reference import Engine, Mistral, Sampling, make_canary

    checks: list[dict[str, Any]] = []

    def note(what: str, found: float, limit: float, within: bool = True) -> None:
        checks.append({"what": what, "found": found, "limit": limit, "within": within, "ok": (found <= limit) == within})

    batch = [[3 + (7 * i * i + 13 * n) % 4000 for i in range(n)] for n in sizes.lengths]
    one_kind = (sizes.window,) * 4
    for what, changed in {
        "window in three of four layers": {},
        "window in all layers, tied embeddings": {"windows": one_kind, "tie_word_embeddings": True},
        "no window, rope theta 1e6": {"windows": (None,) * 4, "rope_theta": 1e6},
    }.items():
        config = model_config(sizes, **changed)
        weights = random_weights(config)
        there = Mistral(config, {name: w.to(device) for name, w in weights.items()})
        whole = Engine(Mistral(config, weights), 16, sum(sizes.lengths))
        parts = Engine(there, 7, sizes.chunk)
        worst = max(
            float((a - b.cpu()).abs().max()) for a, b in zip(whole.score(batch), parts.score(batch), strict=True)
        )  # fmt: skip
        note(f"float32, every position, {len(batch)} ragged prompts, chunks of {sizes.chunk}: {what}", worst, EQUAL_LIMIT)
        sampling = Sampling(max_tokens=12)
        on_cpu, on_device = whole.generate(batch, sampling), parts.generate(batch, sampling)
        worst = max(
            (abs(a - b) for x, y in zip(on_cpu, on_device, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)),
            default=0.0,
        )
        note(f"float32, 12 generated tokens each: {what}", worst, EQUAL_LIMIT)

    config = model_config(sizes, windows=one_kind)
    weights = random_weights(config)
    canary = make_canary(Engine(Mistral(config, weights)), sizes.window * 5 // 4)
    prompt, forced = canary["prompt_token_ids"], canary["forced_token_ids"]

    def moved(dtype: torch.dtype, **wrong: Any) -> float:
        there = {name: w.to(device, dtype) for name, w in weights.items()}
        engine = Engine(Mistral(dataclasses.replace(config, **wrong), there, dtype), 16, sizes.chunk)
        [rows] = engine.score([prompt + forced], last=len(forced) + 1)
        got = rows[:-1].gather(1, torch.tensor(forced, device=device)[:, None])[:, 0].cpu()
        return float((got - torch.tensor(canary["logprobs"])).abs().max())

    note("canary, float32", moved(torch.float32), EQUAL_LIMIT)
    note("canary, bfloat16", moved(torch.bfloat16), TOLERANCE["bfloat16"])
    note("canary, bfloat16, window off", moved(torch.bfloat16, windows=(None,) * 4), TOLERANCE["bfloat16"], within=False)
    return checks


def timed(device: str, work: Callable[[], Any]) -> float:
    """Milliseconds: CUDA events around the work, on a CPU the clock."""
    import torch

    if device != "cuda":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def attention_times(device: str, sizes: Sizes) -> tuple[str, list[dict[str, Any]]]:
    """One layer's attention with the window and without, taken in turns; the dtype and a row for each length and phase."""
    import torch
    from vllm_mistral.reference import attention

    native = device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    dtype = torch.bfloat16 if native else torch.float16 if device == "cuda" else torch.float32
    (heads, groups, head_dim), window, chunk = sizes.attention_heads, sizes.attention_window, sizes.attention_chunk
    longest = max(sizes.attention_lengths)
    torch.manual_seed(0)
    key, value = (torch.randn(longest, groups, head_dim, dtype=dtype, device=device) for _ in range(2))
    query = torch.randn(chunk, heads, head_dim, dtype=dtype, device=device)

    def prefill(length: int, window: int | None) -> None:
        for start in range(0, length, chunk):
            first = 0 if window is None else max(0, start - window + 1)
            attention(query, key[first : start + chunk], value[first : start + chunk], window)

    def decode(length: int, window: int | None) -> None:
        first = 0 if window is None else length - window
        attention(query[:1], key[first:length], value[first:length], window)

    rows = []
    for phase, work in (("prefill", prefill), ("decode", decode)):
        for length in sizes.attention_lengths:
            pairs = length**2 / (2 * window * length - window**2) if phase == "prefill" else length / window
            repeats = sizes.rounds if phase == "prefill" else 20 * sizes.rounds
            taken: dict[int | None, list[float]] = {window: [], None: []}
            with torch.inference_mode():
                for round_ in range(repeats + 1):
                    for which in (window, None) if round_ % 2 else (None, window):
                        milliseconds = timed(device, lambda which=which, length=length, work=work: work(length, which))  # type: ignore[misc]
                        if round_:  # the first round warms up
                            taken[which].append(milliseconds)
            none, windowed = statistics.median(taken[None]), statistics.median(taken[window])
            rows.append({
                "phase": phase, "tokens": length, "none_ms": none, "window_ms": windowed, "ratio": none / windowed, "pairs": pairs,
            })  # fmt: skip
    return str(dtype).removeprefix("torch."), rows


def blocks(device: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Blocks that are not in the pool, at most, while a prompt is computed, by a layer with the window and one without."""
    from vllm_mistral.reference import Engine, Mistral, blocks_held

    window, chunk = sizes.attention_window, sizes.attention_chunk
    config = model_config(
        SMALL, num_hidden_layers=2, windows=(window, None), max_position_embeddings=2 * max(sizes.attention_lengths)
    )
    model = Mistral(config, {name: w.to(device) for name, w in random_weights(config).items()})
    rows = []
    for length in sizes.attention_lengths:
        engine, held = Engine(model, 16, chunk), [0, 0]

        def look(layer: int, engine: Engine = engine, held: list[int] = held) -> None:
            held[:] = [max(most, cache.key.shape[1] - len(cache.pool)) for most, cache in zip(held, engine.caches, strict=True)]

        model.computed = look
        engine.score([[3 + i % 4000 for i in range(length)]], last=1)
        bounds = [blocks_held(which, chunk, 16, length) for which in (window, None)]
        rows.append({
            "tokens": length, "window": held[0], "none": held[1], "window_bound": bounds[0], "none_bound": bounds[1],
            "ok": 0 < held[0] <= bounds[0] and held[1] == bounds[1],
        })  # fmt: skip
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as docs/real-runs.md has it."""
    on = report["machine"]
    smi = on["nvidia_smi"]
    card = on.get("gpu", on["device"]) + (f", {on['memory_gib']} GiB, capability {on['capability']}" if "gpu" in on else "")
    lines = [
        f"### {on.get('gpu', on['device'])}, {report['date']}{' (small)' if report['small'] else ''}",
        "",
        "| | |",
        "|---|---|",
        f"| card | {card} |",
        f"| driver | {smi.get('driver_version', 'none')} |",
        f"| torch, CUDA | {on['torch']}, {on['cuda'] or 'none'} |",
        f"| host | {on['platform']}, Python {on['python']} |",
        f"| commit, seconds | {report['commit']}, {report['seconds']:.0f} |",
        "",
        "| equal to the CPU | largest difference | limit | |",
        "|---|---|---|---|",
    ]
    for check in report["equality"]:
        limit = f"{'at most' if check['within'] else 'more than'} {check['limit']:g}"
        lines.append(f"| {check['what']} | {check['found']:.1e} | {limit} | {'ok' if check['ok'] else '**no**'} |")
    lines += ["", f"| attention, {report['dtype']} | no window, ms | window, ms | ratio | pairs |", "|---|---|---|---|---|"]
    for row in report["attention"]:
        what = f"{row['phase']}, {row['tokens']} tokens"
        lines.append(f"| {what} | {row['none_ms']:.3f} | {row['window_ms']:.3f} | {row['ratio']:.2f} | {row['pairs']:.2f} |")
    lines += ["", "| blocks of 16 tokens held | window (bound) | no window (bound) | |", "|---|---|---|---|"]
    for row in report["blocks"]:
        held = f"{row['window']} ({row['window_bound']}) | {row['none']} ({row['none_bound']})"
        lines.append(f"| prompt of {row['tokens']} tokens | {held} | {'ok' if row['ok'] else '**no**'} |")
    return "\n".join(lines) + "\n"


def commit() -> str:
    try:
        said = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()


def check(device: str, small: bool) -> dict[str, Any]:
    sizes, began, on = SMALL if small else FULL, time.perf_counter(), machine(device)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    equal = equality(device, sizes)
    dtype, times = attention_times(device, sizes)
    held = blocks(device, sizes)
    return {
        "name": "gpu-check", "schema": 1, "small": small, "date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit(),
        "machine": on, "equality": equal, "dtype": dtype, "attention": times, "blocks": held,
        "ok": all(row["ok"] for row in [*equal, *held]), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="seconds on a CPU: proves that it runs")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "gpu-check", metavar="FOLDER", help="for the JSON and the table"
    )
    options = parser.parse_args()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        report = check(options.device, options.small)
        table = markdown(report)
        (options.output / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.output / "gpu-check.md").write_text(table)
    except (CannotRun, OSError) as error:
        sys.stderr.write(f"gpu-check: {error}\n")
        return 2
    print(
        table
        + f"\n{options.output / 'gpu-check.md'} and gpu-check.json are written: {'ok' if report['ok'] else 'NOT within limits'}"
    )
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
