"""The reference: `vllm_mistral.reference` behind our own server (`mistral_node.reference`), in the dtype and with the cache of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mistral_node.contract import Contract
from mistral_node.engines import surroundings

NAME, REPORTED = "the reference", "Reference"
MODULE = ("mistral_node.reference.server",)


def check_installed() -> None:
    """It needs nothing but what the launcher needs."""


def check_class() -> None:
    """It says by itself what is wrong."""


def arguments(contract: Contract, model_dir: Path, lora_rank: int = 0) -> list[str]:
    """The folder: the rest it reads from the contract's variables, as the guard does."""
    return [str(model_dir)]


def environment(contract: Contract, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of its process."""
    return surroundings(contract, environ)


def why_ended(cause: str) -> str:
    """Nothing: it is one process, whose last words say why."""
    return ""
