"""The engines that a node can serve with, and which options each of them has: what the laptop refuses before anything is rented."""

from __future__ import annotations

from dataclasses import dataclass

VLLM, REFERENCE = "vllm", "reference"


@dataclass(frozen=True)
class Engine:
    """An engine. `lacks` are the options of a deployment that it does not have; `quantized` and `scaled_rope`: whether it serves such weights."""

    name: str
    lacks: tuple[str, ...] = ()
    quantized: bool = True
    scaled_rope: bool = True
    tools: bool = True


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(VLLM),
        Engine(
            REFERENCE,
            lacks=("lora", "quantization", "tensor_parallel", "vllm_args"),
            quantized=False,
            scaled_rope=False,
            tools=False,
        ),
    )
}
