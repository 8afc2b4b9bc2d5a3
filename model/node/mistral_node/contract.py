"""The contract with the laptop, as the launcher reads it: the envs of a server (docs/contract.md) and where its things are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mistral_contract import envs, files
from mistral_contract.exits import Code
from mistral_contract.untrusted import printable

__all__ = ["Code", "Contract", "LaunchError", "read"]


class LaunchError(Exception):
    """What is wrong and what to do, in one line, with the exit code of its kind."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(printable(message))
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Contract(envs.Serve):
    """What this node shall serve, and its folders. `adapters` are the names and folders of the LoRA adapters."""

    adapters: tuple[tuple[str, Path], ...] = ()

    @property
    def run_dir(self) -> Path:
        return self.node_dir / files.RUN.of(self.name)

    @property
    def shared_dir(self) -> Path:
        """What launcher and vLLM both write: the counts, the engine's report, its routes, its certificate."""
        return self.node_dir / files.SHARED.of(self.name)

    @property
    def weights_dir(self) -> Path:
        return self.node_dir / files.WEIGHTS.name / self.weights_id


def read(environ: Mapping[str, str]) -> Contract:
    """The contract; LaunchError with every variable that is wrong, in one line."""
    try:
        found = envs.read(Contract, environ)
    except ValueError as error:
        raise LaunchError(Code.CONTRACT, f"{error}; start the deployment with mistralctl up") from error
    return replace(found, adapters=tuple((name, found.run_dir / files.LORA.name / name) for name in found.lora))
