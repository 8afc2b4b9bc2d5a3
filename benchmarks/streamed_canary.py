"""The canary's figures computed from weights on the disk, beside the same from weights in memory: difference, memory, time.

A checkpoint of random bfloat16 weights with Mistral 7B's dimensions and few layers is written to a temporary folder. Then a process each
makes its figures: streamed (`--canary --stream`); with all weights in memory and steps of the same size, which must give the same bits;
and as `--canary` alone does, in smaller steps, which rounds otherwise. Peak memory is the process's own (VmHWM, mapped files included).

A layer's seconds are those of all passes that one candidate of the figures takes (a prompt, seven tokens, the prompt once more in
bfloat16; at most four candidates are tried): processor time over the number of threads, so that a shared machine's other work does not
count. What 32 layers would take is that times 32, and what is not in a layer once; their memory is this and the keys and values of more layers.

    python benchmarks/streamed_canary.py [--quick] [--layers 2] [--threads 2] [-o json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model" / "plugin"))

import torch
from safetensors.torch import save_file
from vllm_mistral.reference import PREFILL_CHUNK, STREAM_CHUNK, Engine, Mistral, make_canary, parse_config

CONFIG = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "sliding_window": 4096,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
QUICK = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2,
         "max_position_embeddings": 1024, "sliding_window": 96}  # fmt: skip
LAYERS_OF_7B = 32
CHUNKS = {"streamed": STREAM_CHUNK, "in memory": STREAM_CHUNK, "in memory, small steps": PREFILL_CHUNK}
DISK_MB_PER_S = 200


def write(folder: Path, config: dict[str, Any]) -> int:
    """A folder with a file a layer; its bytes."""
    generator, index = torch.Generator().manual_seed(0), dict[str, str]()
    shapes = parse_config(config, False).shapes()
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {}
        for name in names:
            wide = torch.randn(shapes[name], generator=generator)
            scaled = 1 + wide / 10 if "norm" in name else wide * (1.6 / shapes[name][1] ** 0.5)
            tensors[name] = scaled.bfloat16()
        save_file(tensors, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def one_way(folder: Path, way: str, tokens: int | None) -> dict[str, Any]:
    """What one process finds."""
    model = Mistral.load(folder, widen=False, stream=way == "streamed")
    ends: list[tuple[int, float]] = []
    model.computed = lambda layer: ends.append((layer, time.process_time()))
    began, processor = time.perf_counter(), time.process_time()
    canary = make_canary(Engine(model, max_num_batched_tokens=CHUNKS[way]), tokens)
    seconds, processor = time.perf_counter() - began, (time.process_time() - processor) / torch.get_num_threads()
    inside = sum(end - before for (_, before), (layer, end) in itertools.pairwise(ends) if layer > 0)
    passes = sum(layer == 0 for layer, _ in ends)
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "canary": canary, "seconds": seconds, "processor_seconds": processor, "passes": passes, "peak_mib": peak / 1024,
        "layer_seconds": inside / (model.config.num_hidden_layers - 1) / torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a small model: proves that it runs")
    parser.add_argument("--layers", type=int, help="at least 2; default: 2, quick 5")
    parser.add_argument("--tokens", type=int, help="of the canary's prompt; default: as --canary has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=CHUNKS, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(one_way(options.folder, options.way, options.tokens)))
        return
    layers = options.layers or (5 if options.quick else 2)
    tokens = options.tokens or (128 if options.quick else None)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG | (QUICK if options.quick else {}) | {"num_hidden_layers": layers}
        size = write(Path(folder), config)
        for way in CHUNKS:
            command = [sys.executable, __file__, "--folder", folder, "--way", way, "--threads", str(options.threads)]
            command += ["--tokens", str(tokens)] if tokens else []
            found[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    streamed, figures = found["streamed"], found["streamed"]["canary"]["logprobs"]
    differences = {
        way: max(abs(a - b) for a, b in zip(figures, one["canary"]["logprobs"], strict=True)) for way, one in found.items()
    }
    same = streamed["canary"] == found["in memory"]["canary"]
    candidates = streamed["passes"] // 9
    layer = streamed["layer_seconds"] / candidates
    whole = layer * LAYERS_OF_7B + (streamed["processor_seconds"] - streamed["layer_seconds"] * layers) / candidates
    per_layer = size / layers if options.quick else 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    tokens = len(streamed["canary"]["prompt_token_ids"]) + 8
    head = config["num_key_value_heads"] * config["head_dim"]
    peak = streamed["peak_mib"] + (LAYERS_OF_7B - layers) * 2 * tokens * head * 4 / 2**20
    reading = 9 * per_layer * LAYERS_OF_7B / (DISK_MB_PER_S * 1e6)
    report = {
        "name": "streamed-canary", "quick": options.quick, "layers": layers, "threads": options.threads,
        "weights_mib": size / 2**20, "prompt_tokens": len(streamed["canary"]["prompt_token_ids"]), "same_bits": same,
        "differences": differences, "peak_mib": {way: one["peak_mib"] for way, one in found.items()},
        "seconds": {way: one["seconds"] for way, one in found.items()},
        "processor_seconds": {way: one["processor_seconds"] for way, one in found.items()}, "candidates": candidates,
        "layer_seconds": layer, "seconds_32_layers": whole, "peak_mib_32_layers": peak, "reading_seconds_32_layers": reading,
    }  # fmt: skip
    if options.output == "json":
        print(json.dumps(report))
        return
    print(f"{layers} layers, {report['weights_mib']:.0f} MiB of bfloat16 weights, a prompt of {report['prompt_tokens']} tokens, "
          f"{options.threads} threads, {candidates} candidates")  # fmt: skip
    for way, one in found.items():
        time_ = f"{one['processor_seconds']:6.1f} s (wall {one['seconds']:.1f})"
        print(f"  {way:24} peak {one['peak_mib']:6.0f} MiB, {time_}, largest difference {differences[way]:.1e}")
    print(f"  streamed and in memory with the same steps: {'the same bits' if same else 'NOT the same bits'}")
    print(f"  a layer: {layer:.1f} s a candidate; 32 layers: {peak:.0f} MiB, {whole / 60:.0f} min, and {reading / 60:.0f} min where nothing of the "
          f"weights stays in memory and the disk reads {DISK_MB_PER_S} MB/s")  # fmt: skip


if __name__ == "__main__":
    main()
