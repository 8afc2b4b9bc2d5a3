"""Mistral 7B for vLLM. Importing this package costs nothing: the class is registered by its name."""

from __future__ import annotations

import gc

ARCHITECTURE = "MistralSWAForCausalLM"
MODEL_CLASS = f"vllm_mistral.model:{ARCHITECTURE}"

__version__ = "0.1.0"


def register() -> None:
    """Registers the architecture with vLLM, which calls this in each of its processes; twice does no harm.

    Turns on the garbage collector that start.py turned off; what was imported by then is never walked.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
