"""The base model for training and for figures: read from the folder that was pulled, with the window that serving has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mistral_contract import adapters
from mistral_node import weights
from mistral_node.contract import LaunchError
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from mistral_tune.errors import TuneError
from mistral_tune.job import Job

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# All linear layers: what vLLM serves, and what QLoRA (arXiv 2305.14314) found to be needed.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_folder(job: Job) -> Path:
    """Return the folder that is trained and served: the weights as pulled, or what a GGUF file becomes; TuneError if transformers cannot read it."""
    try:
        folder = weights.model_dir(job.weights)
    except LaunchError as error:
        raise TuneError(str(error)) from None
    if weights.is_consolidated(folder):
        raise TuneError(
            f"{folder} has Mistral's own format only (consolidated*.safetensors), which is not trained; name weights in Hugging Face's"
        )
    return folder


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how QLoRA keeps the base: NF4, its constants quantized again; computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )  # fmt: skip


def load(
    folder: Path, window: int | None, dtype: torch.dtype, device: str, quantization: BitsAndBytesConfig | None = None
) -> Any:
    """Return the model of a folder on a device, its weights in `dtype`; TuneError if it cannot have this window."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "layer_types", None) is None:
        if window is not None and not hasattr(config, "sliding_window"):
            raise TuneError(f"a window of {window} is wanted, and {config.model_type} has none; leave the window as the model's")
        config.sliding_window = window
    config.use_cache = False
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True,
        quantization_config=quantization, **({"device_map": {"": device}} if device != "cpu" else {}),
    )  # fmt: skip


def with_adapter(model: Any, folder: Path) -> Any:
    """Return a model with the adapter of a folder."""
    return PeftModel.from_pretrained(model, str(folder), local_files_only=True)


def served(folder: Path, base: Path) -> adapters.Adapter:
    """Return the adapter of a folder; TuneError if a server with this base model would refuse it."""
    try:
        return adapters.read(folder, adapters.base_of(base))
    except ValueError as error:
        raise TuneError(f"the adapter that was trained cannot be served: {error}") from None
