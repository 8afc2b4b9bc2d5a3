"""What the sliding window saves in attention: vLLM's own CPU kernel, window 4096 beside no window, in one run.

Our class builds two decoder layers with the head shapes of Mistral 7B (32 query heads, 8 key-value heads, 128 wide), one with
the window, one without (`layer_types`), and this program calls their attention through vLLM's `Attention` layer and backend with
a paged cache: blocks behind the window are recycled and their entries in the block table become the null block, as in vLLM's
scheduler. A prompt goes through in chunks. A chunk at one position costs the same in every prompt that is long enough, so each
position is measured once a round, the two layers one right after the other; a prompt's time is the sum of its chunks' medians.

Figures are processor time of one thread, so that a shared machine's other work does not count; wall time stands beside it.
Products of queries and keys alone allow a ratio of L^2/2 / (W L - W^2/2) for a prompt of L tokens, 2.29 at 16k and 4.27 at 32k:
`arithmetic` in the output. More than that can only come from caches that hold a window's keys, but not a prompt's.

    python benchmarks/attention.py [--quick] [--end-to-end] [--no-amx] [-o json] [--plot attention.png]

`--end-to-end` measures whole decoder layers (dummy weights) instead: there the matrices, which no window makes smaller, dilute
the ratio. Needs the node's environment; the plot needs matplotlib besides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model" / "plugin"))

import torch
from vllm_mistral.reference import RECYCLED, BlockTable, blocks_held

WINDOW = 4096
CHUNK = 2048
GOAL = 2.5
FLAT_GOAL = 1.2
NULL_BLOCK = 0
CONFIG = {
    "architectures": ["MistralSWAForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "sliding_window": WINDOW, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@contextlib.contextmanager
def engine_config(layer_types: list[str], **options: Any) -> Iterator[Any]:
    """vLLM's configuration of a model with Mistral 7B's dimensions, and its parallel state for one process."""
    import vllm_mistral
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    vllm_mistral.register()
    current_platform.import_kernels()
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # asks Linux for the tiles of newer processors, as oneDNN's matrices do in a whole model
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG | {"num_hidden_layers": len(layer_types), "layer_types": layer_types}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        given: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "enforce_eager": True,
            "block_size": 128,
        }
        vllm_config = EngineArgs(model=folder, **(given | options)).create_engine_config()
        with set_current_vllm_config(vllm_config):
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            try:
                yield vllm_config
            finally:
                cleanup_dist_env_and_memory()


@dataclass
class Sequence:
    """One sequence in one layer: its block table in a pool that is as large as the layer needs and no larger."""

    layer: Any
    table: BlockTable
    builder: Any


class Bench:
    """Decoder layers of our class, each with its own paged cache, called without a model runner."""

    def __init__(self, vllm_config: Any, longest: int, chunk: int, whole_layers: bool) -> None:
        from vllm.model_executor.model_loader.utils import process_weights_after_loading
        from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight
        from vllm.v1.worker.utils import bind_kv_cache_to_layers
        from vllm_mistral.model import MistralLayer

        self.vllm_config = vllm_config
        self.dtype = vllm_config.model_config.dtype
        block_size = vllm_config.cache_config.block_size
        kinds = vllm_config.model_config.hf_text_config.layer_types
        self.sequences: list[Sequence] = []
        with torch.device("cpu"):
            default = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            layers = torch.nn.ModuleList(MistralLayer(vllm_config, f"model.layers.{i}") for i in range(len(kinds)))
            torch.set_default_dtype(default)
        if whole_layers:
            for parameter in layers.parameters():
                initialize_single_dummy_weight(parameter)
            process_weights_after_loading(layers, vllm_config.model_config, torch.device("cpu"))
        caches: dict[str, torch.Tensor] = {}
        layer: Any
        for layer in layers:
            attention = layer.self_attn.attn
            attention.process_weights_after_loading(self.dtype)
            spec = attention.get_kv_cache_spec(vllm_config)
            blocks = blocks_held(attention.sliding_window, chunk, block_size, longest)
            caches[attention.layer_name] = torch.zeros(
                1 + blocks, spec.num_kv_heads, block_size, 2 * spec.head_size, dtype=self.dtype
            )
            builder = attention.attn_backend.get_builder_cls()(spec, [attention.layer_name], vllm_config, torch.device("cpu"))
            table = BlockTable(list(range(blocks, NULL_BLOCK, -1)), block_size, attention.sliding_window)
            self.sequences.append(Sequence(layer, table, builder))
        bind_kv_cache_to_layers(caches, vllm_config.compilation_config.static_forward_context)
        self.layers = layers

    def metadata(self, sequence: Sequence, start: int, end: int) -> tuple[Any, torch.Tensor]:
        """Recycles and allocates blocks for tokens `start` .. `end` - 1, and says where they are as vLLM's runner does."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        table = sequence.table
        table.advance(start, end)
        blocks = [NULL_BLOCK if block == RECYCLED else block for block in table.blocks]
        slots = torch.tensor(table.slot_mapping(start, end), dtype=torch.int64)
        bounds = torch.tensor([0, end - start], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=bounds, query_start_loc_cpu=bounds, seq_lens=torch.tensor([end], dtype=torch.int32), num_reqs=1,
            num_actual_tokens=end - start, max_query_len=end - start, max_seq_len=end,
            block_table_tensor=torch.tensor([blocks], dtype=torch.int32), slot_mapping=slots,
        )  # fmt: skip
        return sequence.builder.build(0, common), slots

    @torch.inference_mode()
    def attend(self, which: int, start: int, end: int) -> tuple[float, float]:
        """Seconds (wall, processor) for the attention of these tokens in one layer, writing their keys included."""
        from vllm.forward_context import set_forward_context

        sequence = self.sequences[which]
        attention = sequence.layer.self_attn.attn
        query, key, value = (torch.randn(end - start, heads * 128, dtype=self.dtype) for heads in (32, 8, 8))
        wall, cpu = time.perf_counter(), time.process_time()
        metadata, slots = self.metadata(sequence, start, end)
        name = attention.layer_name
        with set_forward_context({name: metadata}, self.vllm_config, num_tokens=end - start, slot_mapping={name: slots}):
            attention(query, key, value)
        return time.perf_counter() - wall, time.process_time() - cpu

    @torch.inference_mode()
    def forward(self, which: slice, start: int, end: int) -> tuple[float, float]:
        """The same of whole decoder layers, one behind the other."""
        from vllm.forward_context import set_forward_context

        hidden = torch.randn(end - start, 4096, dtype=self.dtype)
        positions = torch.arange(start, end)
        residual = None
        wall, cpu = time.perf_counter(), time.process_time()
        facts = [(s.layer.self_attn.attn.layer_name, *self.metadata(s, start, end)) for s in self.sequences[which]]
        metadata, slots = {name: m for name, m, _ in facts}, {name: s for name, _, s in facts}
        with set_forward_context(metadata, self.vllm_config, num_tokens=end - start, slot_mapping=slots):
            for sequence in self.sequences[which]:
                hidden, residual = sequence.layer(positions, hidden, residual)
        return time.perf_counter() - wall, time.process_time() - cpu

    def restart(self) -> None:
        for sequence in self.sequences:
            sequence.table.recycle(len(sequence.table.blocks))
            sequence.table.blocks.clear()

    def pretend(self, position: int) -> None:
        """Block tables of sequences that have come to this position, with whatever lies in the blocks."""
        for sequence in self.sequences:
            table = sequence.table
            first = table.first_block(position)
            table.blocks = [RECYCLED] * first + list(range(1, position // table.block_size + 2 - first))


Samples = dict[str, dict[int, list[tuple[float, float]]]]


def measure(lengths: list[int], chunk: int, rounds: int, decodes: int, layers: int) -> dict[str, Samples]:
    """Samples (wall, processor seconds) of prefill chunks by their first position, and of one decoded token by its position."""
    kinds = ["sliding_attention"] * max(1, layers) + ["full_attention"] * max(1, layers)
    samples: dict[str, Samples] = {phase: {"window": {}, "none": {}} for phase in ("prefill", "decode")}
    with engine_config(kinds, max_model_len=max(lengths) + chunk, max_num_batched_tokens=chunk) as vllm_config:
        bench = Bench(vllm_config, max(lengths) + chunk, chunk, whole_layers=layers > 0)

        def run(name: str, start: int, end: int) -> tuple[float, float]:
            if layers:
                return bench.forward(slice(0, layers) if name == "window" else slice(layers, None), start, end)
            return bench.attend(0 if name == "window" else 1, start, end)

        for warm in ("window", "none"):
            run(warm, 0, chunk)
        for round_ in range(rounds):
            bench.restart()
            for start in range(0, max(lengths), chunk):
                for name in ("window", "none") if (round_ + start // chunk) % 2 else ("none", "window"):
                    samples["prefill"][name].setdefault(start, []).append(run(name, start, start + chunk))
        for round_ in range(rounds * decodes + 1):
            for length in lengths:
                bench.pretend(length)
                for name in ("window", "none") if round_ % 2 else ("none", "window"):
                    sample = run(name, length, length + 1)
                    if round_:  # the first round warms up
                        samples["decode"][name].setdefault(length, []).append(sample)
    return samples


def medians(samples: dict[int, list[tuple[float, float]]], clock: int) -> dict[int, float]:
    return {position: statistics.median(sample[clock] for sample in taken) for position, taken in samples.items()}


def summary(samples: dict[str, Samples], lengths: list[int], chunk: int) -> dict[str, Any]:
    """Ratios none / window, by the wall clock and by processor time."""
    result: dict[str, Any] = {"prefill": {}, "decode": {}, "flat": {}}
    for clock, unit in enumerate(("wall", "cpu")):
        prefill = {name: medians(samples["prefill"][name], clock) for name in ("window", "none")}
        decode = {name: medians(samples["decode"][name], clock) for name in ("window", "none")}
        for length in lengths:
            window, none = (sum(t for start, t in prefill[name].items() if start < length) for name in ("window", "none"))
            last = length - chunk
            reach = min(length, WINDOW)
            arithmetic = round(length**2 / (2 * reach * length - reach**2), 3)
            result["prefill"].setdefault(str(length), {"arithmetic": arithmetic})[unit] = {
                "window_s": round(window, 4), "none_s": round(none, 4), "ratio": round(none / window, 3),
                "last_chunk_ratio": round(prefill["none"][last] / prefill["window"][last], 3),
            }  # fmt: skip
            window, none = decode["window"][length], decode["none"][length]
            result["decode"].setdefault(str(length), {})[unit] = {
                "window_ms": round(window * 1e3, 4), "none_ms": round(none * 1e3, 4), "ratio": round(none / window, 3),
            }  # fmt: skip
        beyond = [t for start, t in prefill["window"].items() if start >= WINDOW]
        decoded = [t for position, t in decode["window"].items() if position >= WINDOW]
        result["flat"][unit] = {
            "prefill": round(max(beyond) / min(beyond), 3) if beyond else None,
            "decode": round(max(decoded) / min(decoded), 3) if decoded else None,
        }
    return result


def draw(samples: dict[str, Samples], path: Path, chunk: int, what: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name, colour, label in (("none", "#b0413e", "no window"), ("window", "#2a6f97", f"window {WINDOW}")):
        for axis, phase, scale in ((axes[0], "prefill", 1e3 / chunk), (axes[1], "decode", 1e3)):
            points = medians(samples[phase][name], 1)
            x = [position + (chunk if phase == "prefill" else 0) for position in points]
            axis.plot(x, [t * scale for t in points.values()], "o-", color=colour, label=label, markersize=4)
            axis.set_title(f"{phase}: {what}")
            axis.set_xlabel("tokens of the sequence so far")
            axis.set_ylabel("processor ms per token")
            axis.set_ylim(bottom=0)
            axis.axvline(WINDOW, color="#999999", linewidth=0.8, linestyle=":")
            axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="short prompts, one round: proves that it runs")
    parser.add_argument("--end-to-end", action="store_true", help="whole decoder layers instead of attention alone")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of --end-to-end")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="PNG to draw; needs matplotlib")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument("--no-amx", action="store_true", help="vLLM's vector kernel also where the processor has AMX")
    options = parser.parse_args()
    if options.no_amx:
        torch.cpu._is_amx_tile_supported = lambda: False  # what vLLM chooses its kernel by
    kernel = "AMX" if torch.cpu._is_amx_tile_supported() else "vector"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers = (1 if options.quick else options.layers) if options.end_to_end else 0
    lengths = [4096, 8192] if options.quick else [4096, 8192, 16384] + ([] if options.end_to_end else [32768])
    rounds, decodes = (1, 5) if options.quick else (options.rounds, 30)
    began = time.perf_counter()
    samples = measure(lengths, CHUNK, rounds, decodes, layers)
    found = summary(samples, lengths, CHUNK)
    judged = str(16384 if 16384 in lengths else lengths[-1])
    ratio, flat = found["prefill"][judged]["cpu"]["ratio"], found["flat"]["cpu"]
    what = f"{layers} decoder layers" if layers else "attention"
    if options.plot:
        draw(samples, options.plot, CHUNK, what)
    report = {
        "name": "attention-end-to-end" if layers else "attention", "ratio": ratio, "goal": None if layers else GOAL,
        "arithmetic": None if layers else found["prefill"][judged]["arithmetic"],
        "what": f"time of a prompt of {judged} tokens, {what}: no window / window {WINDOW}", "flat": flat, "flat_goal": FLAT_GOAL,
        "quick": options.quick, "rounds": rounds, "chunk": CHUNK, "threads": options.threads, "layers": layers,
        "kernel": kernel,
        "seconds": round(time.perf_counter() - began, 1), **{phase: found[phase] for phase in ("prefill", "decode")},
        "flat_by_clock": found["flat"],
        "samples": {
            f"{phase}, {name}": {str(at): [[round(value, 6) for value in sample] for sample in taken] for at, taken in by.items()}
            for phase, both in samples.items() for name, by in both.items()
        },
    }  # fmt: skip
    if options.output == "json":
        print(json.dumps(report))
        return
    print(f"{what}, {kernel} kernel: processor time without the window / with window {WINDOW} = ratio (by the wall clock)")
    for phase, digits, key in (("prefill", 2, "s"), ("decode", 3, "ms")):
        for length in lengths:
            wall, cpu = found[phase][str(length)]["wall"], found[phase][str(length)]["cpu"]
            none, window = (f"{cpu[f'{name}_{key}']:.{digits}f}" for name in ("none", "window"))
            limit = f", arithmetic {found[phase][str(length)]['arithmetic']}" if phase == "prefill" and not layers else ""
            print(
                f"  {phase} {length:6d} tokens: {none:>8} {key} / {window:>8} {key} = {cpu['ratio']:.2f} "
                f"({wall['ratio']:.2f}){limit}"
            )
    print(
        f"  beyond the window, dearest / cheapest: chunk {flat['prefill']}, decode {flat['decode']} (flat: at most {FLAT_GOAL})"
    )
    print(f"  {report['what']} = {ratio:.2f}" + ("" if layers else f"; goal at least {GOAL}"))


if __name__ == "__main__":
    main()
