"""What our wrapper costs: tokens a second of mistral_tune's training beside bare trl's, in turns, in one process.

Both train the same LoRA on the same packed rows with the same settings, evaluate and write a checkpoint after each epoch. Bare trl's are the stock
Trainer's; ours are sealed (every byte hashed and synced) and uploaded to a folder by a process of its own. What is measured is the processor time of
this process in `Trainer.train`, which others on the machine do not change as they change the time on the clock. The ratio is of medians.

    python benchmarks/finetune.py [--quick] [-o json]      # in the environment that trains: .venv-tune
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT / "model" / part) for part in ("contract", "weights", "chats", "plugin", "node", "tune")]
sys.path[:0] = [*SOURCES, str(ROOT / "tests" / "tune")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(SOURCES)}

import tiny_model  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from mistral_tune import data, model, training  # noqa: E402
from peft import LoraConfig  # noqa: E402
from runs import Run  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

TOLD = {"sliding_window": "", "epochs": "4", "batch_tokens": "1024", "max_length": "512", "learning_rate": "0.001", "rank": "16"}
GOAL = 0.98


class Clock:
    """Takes the processor time of every `Trainer.train` of this process."""

    def __init__(self) -> None:
        self.seconds = 0.0
        plain = transformers.Trainer.train

        def timed(trainer: Any, *arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return plain(trainer, *arguments, **options)
            finally:
                self.seconds = time.process_time() - began

        transformers.Trainer.train = timed


def ours(run: Run) -> None:
    """Train with mistral_tune."""
    training.train(run.job())


def bare(run: Run, folder: Path) -> None:
    """Train with trl alone: the rows of the same encoder, stock checkpoints."""
    job = run.job()
    found = data.learnt(job, folder)
    packed = data.packing(found.longest, job.wanted.max_length, job.wanted.batch_tokens, 1)
    settings = SFTConfig(
        output_dir=str(run.folder / "bare"), num_train_epochs=job.wanted.epochs, learning_rate=job.wanted.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=training.WARM_UP, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        gradient_accumulation_steps=packed.accumulated, max_length=packed.length, packing=True, packing_strategy="bfd", seed=1, data_seed=1,
        save_strategy="epoch", save_total_limit=2, eval_strategy="epoch", logging_steps=1, disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[],
    )  # fmt: skip
    adapter = LoraConfig(
        r=job.wanted.rank, lora_alpha=2 * job.wanted.rank, lora_dropout=training.DROPOUT, target_modules=list(model.TARGETS), task_type="CAUSAL_LM"
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model.load(folder, None, torch.float32, "cpu"), args=settings, processing_class=training._no_tokenizer(), peft_config=adapter,
        train_dataset=training._rows(found.rows), eval_dataset=training._rows(found.held_out),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def main() -> None:
    """Print tokens a second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two turns of a smaller model")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    turns = 2 if options.quick else 5
    clock = Clock()
    found: dict[str, list[float]] = {"ours": [], "bare trl": []}
    with tempfile.TemporaryDirectory(prefix="mistralctl-bench-") as scratch:
        node = Path(scratch)
        folder = tiny_model.write(
            node / "weights" / "tiny", layers=2 if options.quick else 8, width=192 if options.quick else 512
        )
        for turn in range(turns + 1):  # the first warms both
            for name in found if turn % 2 else reversed(found):
                run = Run(node, f"{name.split()[0]}-{turn}", told=TOLD)
                tokens = data.learnt(run.job(), folder).tokens * int(TOLD["epochs"])
                ours(run) if name == "ours" else bare(run, folder)
                gc.collect()
                if turn:
                    found[name].append(tokens / clock.seconds)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    ratio = medians["ours"] / medians["bare trl"]
    if options.output == "json":
        print(json.dumps({"tokens_per_second": found, "medians": medians, "ratio": ratio, "goal": GOAL}, indent=1))
    else:
        for name, rates in found.items():
            print(
                f"{name:9} {medians[name]:9.1f} tokens a processor second  (from {min(rates):.1f} to {max(rates):.1f}, {len(rates)} turns)"
            )
        print(f"ratio     {ratio:9.3f}                   (goal: at least {GOAL})")


if __name__ == "__main__":
    main()
