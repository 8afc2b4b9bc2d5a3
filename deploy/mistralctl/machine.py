"""What this machine has: memory, cores, GPUs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from mistralctl.gpus import GIB, Gpu


@dataclass(frozen=True)
class Machine:
    """Memory in bytes, logical cores that this process may use, and NVIDIA GPUs (empty: the CPU serves)."""

    memory_bytes: int
    cores: int
    gpus: tuple[Gpu, ...] = ()

    @property
    def label(self) -> str:
        """`this machine (2 cores, 23 GiB)`."""
        gpus = f", {len(self.gpus)} x {self.gpus[0].name}" if self.gpus else ""
        return f"this machine ({self.cores} cores, {self.memory_bytes // GIB} GiB{gpus})"


def _gpus() -> tuple[Gpu, ...]:
    if not shutil.which("nvidia-smi"):
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in output.splitlines():
        name, memory, capability = (part.strip() for part in line.split(","))
        major, minor = capability.split(".")
        found.append(Gpu(name.removeprefix("NVIDIA "), float(memory) / 1024, (int(major), int(minor))))
    return tuple(found)


def this_machine() -> Machine:
    """What this machine has, as read now."""
    import psutil

    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
    return Machine(psutil.virtual_memory().total, cores, _gpus())
