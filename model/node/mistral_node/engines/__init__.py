"""Engines: what the launcher has to know of the program that computes. One module each, which is a `Kind`; the rest does not tell them apart."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from mistral_contract import envs
from mistral_node.contract import Code, Contract, LaunchError
from vllm_mistral import inspection

DRAIN_SECONDS = 25  # that a server has for the requests that run when it shall end

# How often one of OpenMP's threads looks for the others before it sleeps, as libgomp has it where threads outnumber cores. By itself it looks
# 300,000 times, also while those for whom it waits have no core: two servers at once on two cores are 3.8 times as fast with this, one that is
# alone 0.89 times (benchmarks/neighbours.py).
SPINS = "1000"


class Kind(Protocol):
    """A module of this package.

    Every engine is one HTTP server with `mistral_node.front.Guard` outermost, answers /health once it serves, and completions and chats as the
    OpenAI API has them. `NAME` is how messages call it; `python -m MODULE` runs it; engine.json has the architecture REPORTED.
    """

    @property
    def NAME(self) -> str: ...  # noqa: N802

    @property
    def MODULE(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def REPORTED(self) -> str: ...  # noqa: N802

    def check_installed(self) -> None:
        """LaunchError if it cannot run on this node at all."""

    def check_class(self) -> None:
        """LaunchError if its model class is why it did not start; asked only after that."""

    def arguments(self, contract: Contract, model_dir: Path, lora_rank: int = 0) -> list[str]:
        """Return what follows MODULE."""

    def environment(self, contract: Contract, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of its process, the launcher's among them."""

    def why_ended(self, cause: str) -> str:
        """Return what it means that this was the first error in its output; empty where that says enough."""


def of(name: str) -> Kind:
    """Return the engine of that name."""
    return cast(Kind, importlib.import_module(f"{__name__}.{name}"))


def surroundings(contract: Contract, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every engine gets: off the hub, and as many threads as there are cores."""
    found = dict(environ) | {
        envs.RUN_DIR: str(contract.shared_dir),
        "FORWARDED_ALLOW_IPS": "",  # no proxy stands in front of it, whose word on a client's address would count
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if contract.device == "cpu":
        found.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        if "OMP_WAIT_POLICY" not in found:
            found.setdefault("GOMP_SPINCOUNT", SPINS)
        return found
    # Libraries of the image's CUDA toolkit would be loaded instead of the wheels'. The driver's may be found in no other way.
    folders = found.pop("LD_LIBRARY_PATH", "").split(":")
    if drivers := [folder for folder in folders if folder and (Path(folder) / "libcuda.so.1").exists()]:
        found["LD_LIBRARY_PATH"] = ":".join(drivers)
    return found


def check(kind: Kind, wanted: Contract, run_dir: Path) -> dict[str, Any]:
    """Return what the running engine says of itself; LaunchError if it is not our class or not with the window asked for."""
    facts = inspection.read(run_dir)
    if facts is None or facts.get("architecture") != kind.REPORTED:
        said = (facts or {}).get("class", "its own class")
        raise LaunchError(Code.CLASS, f"{kind.NAME} serves with {said}, not {kind.REPORTED}")
    if wanted.model != "custom" and facts["sliding_window"] != wanted.sliding_window:
        raise LaunchError(
            Code.CLASS,
            f"the engine has the window {facts['sliding_window']}, {wanted.sliding_window} was asked for; the config.json of "
            "these weights is not the model's",
        )
    return facts
