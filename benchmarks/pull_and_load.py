"""Which way of writing a pull should choose when vLLM loads the weights next: past the page cache, or through it.

    python benchmarks/pull_and_load.py [--quick] [-o json]

A checkpoint of Mistral's shape (2 GiB in four files; --quick: 0.5 GiB) is pulled from an nginx on loopback, every range
checked, and loaded by the real vLLM in a process of its own, as on a node; the two ways take turns, the figures are medians.
`load` is what vLLM itself logs for the loading of the weights, `engine` the whole start of its engine, in which that is.
What counts is pull + load. The figure is its ratio, past the cache over through it: above 1, through it is better.

It runs in the environment of mistral_weights; --python is the one with vLLM (default: .venv-node of this checkout).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import weights_pull

WAYS = {"past the page cache": [], "through the page cache": ["--keep-cached"]}
PAST, THROUGH = WAYS

_MAKE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
wide, inner, heads, kv, words, head, parts = 2048, 7168, 16, 4, 32000, 128, 4
shapes = {"model.embed_tokens.weight": (words, wide), "lm_head.weight": (words, wide), "model.norm.weight": (wide,)}
for n in range(layers):
    shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in {
        "self_attn.q_proj": (heads * head, wide), "self_attn.k_proj": (kv * head, wide), "self_attn.v_proj": (kv * head, wide),
        "self_attn.o_proj": (wide, heads * head), "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner), "input_layernorm": (wide,), "post_attention_layernorm": (wide,)}.items()}
names = list(shapes)
index = {}
for part in range(parts):
    file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
    held = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02) for name in names[part::parts]}
    save_file(held, folder / file, metadata={"format": "pt"})
    index |= dict.fromkeys(held, file)
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
(folder / "config.json").write_text(json.dumps({
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": wide, "intermediate_size": inner,
    "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head, "num_hidden_layers": layers, "vocab_size": words,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "hidden_act": "silu"}))
"""
_LOAD = """
import sys, time
from vllm import LLM
begun = time.monotonic()
LLM(sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=1)
print("engine", time.monotonic() - begun)
"""


@dataclass(frozen=True)
class Sample:
    """One pull and the load that followed, seconds."""

    way: str
    pull: float
    load: float
    engine: float

    @property
    def both(self) -> float:
        return self.pull + self.load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="0.5 GiB, one round")
    parser.add_argument("--rounds", type=int, default=0, help="how often each way runs (3; quick: 1)")
    parser.add_argument("--folder", type=Path, help="where to write: the disk to measure (default: the temporary folder)")
    parser.add_argument("--python", type=Path, default=Path(__file__).parent.parent / ".venv-node" / "bin" / "python")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pull-and-load-", dir=options.folder)))
        size = make(room, options.python, layers=2 if options.quick else 16)
        weights_pull.environment(stack.enter_context(weights_pull.nginx(room)))
        rounds = range((options.rounds or (1 if options.quick else 3)) + 1)  # the first counts for nothing: it warms
        samples = [(n, run(room, way, options.python)) for n in rounds for way in WAYS]
    report([sample for n, sample in samples if n], size, options)
    return 0


def make(room: Path, python: Path, layers: int) -> int:
    """The checkpoint, with our manifest, where nginx serves it; its size in bytes."""
    from mistral_weights.pull import Pull, pull

    made = room / "made"
    made.mkdir()
    subprocess.run([python, "-c", _MAKE, made, str(layers)], check=True)
    size = pull(Pull(f"file://{made}", room / "www" / "weights" / "set", direct=False)).bytes
    shutil.rmtree(made)
    return size


def run(room: Path, way: str, python: Path) -> Sample:
    folder = room / "set"
    os.sync()
    begun = time.monotonic()
    pull = [sys.executable, "-m", "mistral_weights", "pull", "s3://weights/set", str(folder), "-o", "json", *WAYS[way]]
    subprocess.run(pull, check=True, stdout=subprocess.DEVNULL)
    pulled = time.monotonic() - begun
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", _LOAD, folder], env=os.environ | own, capture_output=True, text=True, check=False, cwd=room
    )
    said = done.stdout + done.stderr
    load, engine = re.search(r"Loading weights took ([\d.]+) seconds", said), re.search(r"^engine ([\d.]+)$", said, re.MULTILINE)
    if load is None or engine is None:
        raise RuntimeError(f"vLLM did not load it: {said[-2000:]}")
    shutil.rmtree(folder)
    return Sample(way, pulled, float(load[1]), float(engine[1]))


def report(samples: list[Sample], size: int, options: argparse.Namespace) -> None:
    def median(way: str, part: str) -> float:
        return statistics.median(getattr(sample, part) for sample in samples if sample.way == way)

    ratio = median(PAST, "both") / median(THROUGH, "both")
    if options.output == "json":
        body = {"name": "pull_and_load", "ratio": round(ratio, 3), "bytes": size, "quick": options.quick,
                "medians": {way: {part: round(median(way, part), 3) for part in ("pull", "load", "both", "engine")} for way in WAYS},
                "samples": [asdict(sample) for sample in samples]}  # fmt: skip
        print(json.dumps(body))
        return
    print(f"{size / 2**20:.0f} MiB; medians of {len(samples) // len(WAYS)}, seconds")
    print(f"{'':26}{'pull':>8}{'load':>8}{'both':>8}{'engine':>8}")
    for way in WAYS:
        print(f"{way:26}" + "".join(f"{median(way, part):8.2f}" for part in ("pull", "load", "both", "engine")))
    better = THROUGH if ratio > 1 else PAST
    print(f"past over through: {ratio:.2f}: {better} is better")


if __name__ == "__main__":
    sys.exit(main())
