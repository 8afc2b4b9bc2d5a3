"""Training itself: trl's SFTTrainer with rows of token ids, checkpoints that are sealed, and a result that is.

A process for each device: `RANK`, `WORLD_SIZE` and `LOCAL_RANK` say which. Imports torch and trl, which takes seconds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
import transformers
from mistral_weights.seal import seal, sealed
from peft import LoraConfig, prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from mistral_tune import log, model
from mistral_tune.checkpoints import Checkpoints
from mistral_tune.data import Learnt, Packing, learnt, packing
from mistral_tune.errors import Interrupted, TuneError
from mistral_tune.job import Job
from mistral_tune.processes import TOGETHER
from mistral_tune.store import Store
from mistral_tune.training_files import HISTORY

DROPOUT = 0.05
WARM_UP = 0.03  # of all steps


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is."""

    rank: int
    processes: int
    device: str

    @classmethod
    def here(cls, wanted_device: str) -> Place:
        """Return the place that the environment tells of."""
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if wanted_device == "cuda" else "cpu"
        return cls(rank, processes, device)

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


class Keeper(TrainerCallback):
    """Says when a checkpoint is due: after minutes, at the end of an epoch, on SIGTERM; seals it when it is written; tells of progress."""

    def __init__(self, checkpoints: Checkpoints, place: Place, tokens: float) -> None:
        self.checkpoints, self.place = checkpoints, place
        self.tokens = tokens  # of a step
        self.asked_to_end = False
        self.saved_at = self.began = time.monotonic()
        self.first_step = 0
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_end = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.first_step, self.began = state.global_step, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        due = time.monotonic() - self.saved_at >= 60 * self.checkpoints.job.wanted.save_minutes
        due, end = self._agreed(due, self.asked_to_end)
        if due or end:
            control.should_save = True
        if end:
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        ends = control.should_training_stop and state.global_step < state.max_steps  # its checkpoint was made in on_step_end
        control.should_save = not ends
        control.should_evaluate = control.should_evaluate and not ends

    def _agreed(self, *flags: bool) -> tuple[bool, ...]:
        """Return what any process says."""
        if self.place.processes == 1:
            return flags
        said = torch.tensor([float(flag) for flag in flags], device=self.place.device)
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
        return tuple(bool(value) for value in said.tolist())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.saved_at = time.monotonic()
        if self.place.processes > 1:
            torch.distributed.barrier()  # every process has written its part
        if self.place.first:
            self.checkpoints.keep(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        entry = state.log_history[-1] if state.log_history else {}
        if "loss" not in entry:
            return
        if not math.isfinite(entry["loss"]):
            raise TuneError(f"the loss of step {state.global_step} is not a number; try a lower --learning-rate")
        if self.place.first:
            done = state.global_step - self.first_step
            seconds = time.monotonic() - self.began
            log.progress(
                self.checkpoints.job.run_dir,
                step=state.global_step, steps=state.max_steps, loss=round(entry["loss"], 4),
                tokens_per_second=round(done * self.tokens / seconds, 1) if seconds else 0.0,
                left_seconds=round((state.max_steps - state.global_step) * seconds / done) if done else None,
            )  # fmt: skip


class Trainer(SFTTrainer):
    """trl's trainer, whose evaluations leave no trace in the random state: a run that goes on behind one is the run that made it."""

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            return super().evaluate(*arguments, **options)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write no card beside a checkpoint: what is published has its own."""


def train(job: Job) -> bool:
    """Train, from the newest whole checkpoint if there is one, until the sealed result is there; False if it was there before.

    Interrupted if the run was asked to end: a checkpoint of that step is sealed and uploaded.
    """
    wanted = job.wanted
    place = Place.here(wanted.device)
    done = sealed(job.result)
    if done is not None and done.manifest.revision == job.identity and (job.begun.exists() or not wanted.restart):
        return False
    transformers.utils.logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    folder = model.base_folder(job)
    found = learnt(job, folder)
    packed = packing(found.longest, wanted.max_length, wanted.batch_tokens, place.processes)
    checkpoints = Checkpoints(job, Store.of(job))
    resumed = _prepare(checkpoints, place)
    trainer = _trainer(job, place, found, packed, folder)
    steps = math.ceil(len(trainer.train_dataset) / (packed.accumulated * place.processes))
    keeper = Keeper(checkpoints, place, found.tokens / steps)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(keeper)
    if place.first:
        log.line(
            f"{wanted.method}: {len(found.rows)} examples with {found.tokens} tokens in {len(trainer.train_dataset)} rows of at most "
            f"{packed.length}, {wanted.epochs} epochs of {steps} steps"
            + (f"; goes on at step {resumed.name.rpartition('-')[2]}" if resumed else "")
        )
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if place.first:
        checkpoints.wait()
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"asked to end at step {trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on from there"
        )
    _keep_result(job, trainer, place)
    return True


def _prepare(checkpoints: Checkpoints, place: Place) -> Path | None:
    """Return the checkpoint to go on from. The first process looks, brings and clears; the others are told."""
    run = os.environ.get(TOGETHER) or os.environ.get("MASTER_PORT", "0")
    told = checkpoints.job.folder / f"resume-{run}.json"
    if place.processes > 1 and not place.first:
        while not told.exists():
            time.sleep(0.2)
        return _path(json.loads(told.read_text("utf-8")))
    found = checkpoints.begin()
    if place.processes > 1:
        for earlier in checkpoints.job.folder.glob("resume-*"):
            earlier.unlink()
        told.with_suffix(".new").write_text(json.dumps(str(found) if found else None), "utf-8")
        told.with_suffix(".new").replace(told)
    return found


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _trainer(job: Job, place: Place, found: Learnt, packed: Packing, folder: Path) -> Any:
    """Return the trainer of a method."""
    wanted = job.wanted
    dtype = model.DTYPES[wanted.dtype]
    mixed = wanted.device == "cuda" or wanted.method == "full"
    options: dict[str, Any] = {}
    adapter = None
    if wanted.method == "full":  # masters in float32 (trl#5138); computed in `dtype`
        if place.processes > 1:
            options["fsdp"] = "full_shard"
            options["fsdp_config"] = _sharded()
        base = model.load(folder, wanted.sliding_window, torch.float32, "cpu" if place.processes > 1 else place.device)
    else:
        base = model.load(
            folder, wanted.sliding_window, dtype, place.device, model.four_bits(dtype) if wanted.method == "qlora" else None
        )
        adapter = LoraConfig(
            r=wanted.rank, lora_alpha=2 * wanted.rank, lora_dropout=DROPOUT, target_modules=list(model.TARGETS), bias="none",
            task_type="CAUSAL_LM", base_model_name_or_path=wanted.base, revision=wanted.base_revision or None,
        )  # fmt: skip
        if wanted.method == "qlora":
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
            # bitsandbytes packs weights anew at the first evaluation on a CPU: a run that goes on would round otherwise.
            for module in base.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
    settings = SFTConfig(
        output_dir=str(job.checkpoints), num_train_epochs=wanted.epochs, learning_rate=wanted.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=WARM_UP, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        gradient_accumulation_steps=packed.accumulated, max_length=packed.length, packing=True, packing_strategy="bfd",
        seed=wanted.seed, data_seed=wanted.seed, save_strategy="no", save_total_limit=2, eval_strategy="epoch", logging_steps=1,
        logging_nan_inf_filter=False, disable_tqdm=True, use_cpu=wanted.device == "cpu", bf16=mixed and wanted.dtype == "bfloat16",
        fp16=mixed and wanted.dtype == "float16", gradient_checkpointing=wanted.device == "cuda", report_to=_reports(),
        ddp_find_unused_parameters=False, dataloader_num_workers=0, **options,
    )  # fmt: skip
    trainer = Trainer(
        model=base, args=settings, processing_class=_no_tokenizer(), peft_config=adapter, train_dataset=_rows(found.rows),
        eval_dataset=_rows(found.held_out),
    )  # fmt: skip
    for parameter in trainer.model.parameters():  # trl keeps a QLoRA adapter in bfloat16, in which small updates are lost
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _sharded() -> dict[str, Any]:
    """Return how FSDP2 shards a model: each layer by itself of those that the model says are not to be split, checkpoints in shards."""
    return {
        "fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False, "reshard_after_forward": True,
    }  # fmt: skip


def _reports() -> list[str]:
    """Return whom the Trainer reports to: W&B if its key is set, nobody else. TensorBoard's files are made of the whole history at the end."""
    if not os.environ.get("WANDB_API_KEY"):
        return []
    if find_spec("wandb") is None:
        log.line("WANDB_API_KEY is set and the package wandb is not installed: nothing is reported there")
        return []
    return ["wandb"]


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token: the rows are token ids already, and trl asks for no more than a token to pad with."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>")  # noqa: S106


def _rows(examples: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": [list(one.input_ids) for one in examples], "labels": [list(one.labels) for one in examples]}
    )


def _keep_result(job: Job, trainer: Any, place: Place) -> None:
    """Write the sealed result; of the adapter its plain files alone, of all weights what transformers writes."""
    partial = job.result.with_name(".result.partial")
    if place.first:
        shutil.rmtree(partial, ignore_errors=True)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(partial))
    if not place.first:
        return
    for path in partial.iterdir():
        if path.suffix != ".safetensors" and path.name not in (
            "adapter_config.json",
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
        ):
            path.unlink()
    (partial / HISTORY).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", "utf-8")
    seal(partial, job.wanted.out, job.identity)
    shutil.rmtree(job.result, ignore_errors=True)
    partial.rename(job.result)
