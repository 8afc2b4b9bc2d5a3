"""The table of GPUs that mistralctl plans with."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """`name` is SkyPilot's accelerator name; `memory_gib` what CUDA reports as total, in GiB (less than the label says).

    `capability` is NVIDIA's compute capability: vLLM 0.32 needs 7.5, bfloat16 needs 8.0, fp8 arithmetic 8.9.
    The memory figures are the lowest of those that CUDA's own out-of-memory messages name for each card.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]

    @property
    def bfloat16(self) -> bool:
        return self.capability >= (8, 0)

    @property
    def supported(self) -> bool:
        return self.capability >= (7, 5)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 14.56, (7, 5)),
        Gpu("V100", 15.77, (7, 0)),
        Gpu("A10", 21.98, (8, 6)),
        Gpu("A10G", 21.98, (8, 6)),
        Gpu("L4", 21.95, (8, 9)),
        Gpu("L40S", 44.39, (8, 9)),
        Gpu("A100", 39.39, (8, 0)),
        Gpu("A100-80GB", 79.15, (8, 0)),
        Gpu("H100", 79.10, (9, 0)),
    )
}
