"""What the running engine says of itself: written by the model class from inside vLLM's worker, read by the launcher."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mistral_contract import envs, files, untrusted


def _facts(model: Any, vllm_config: Any) -> dict[str, Any] | None:
    """Class, window, cache spec, block size, backend, blocks and concurrency; None before the cache exists."""
    context = vllm_config.compilation_config.static_forward_context
    named = {name: layer for name, layer in context.items() if hasattr(layer, "attn_backend")}
    layers = list(named.values())
    blocks = vllm_config.cache_config.num_gpu_blocks
    if not layers or not blocks or any(layer.kv_cache.numel() == 0 for layer in layers):
        return None
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in named.items()}
    kinds = {type(spec).__name__ for spec in specs.values()}
    windows = sorted({layer.sliding_window for layer in layers}, key=lambda window: window or 0)
    import torch
    import vllm
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

    [block_size] = {spec.block_size for spec in specs.values()}
    groups = [group.kv_cache_spec for group in get_kv_cache_groups(vllm_config, specs)]  # each has blocks of its own
    held = sum(-(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in groups)
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "architecture": type(model).__qualname__,
        "sliding_window": windows[-1],
        "windows": windows,
        "kv_cache_spec": "+".join(sorted(kinds)),
        "block_size": block_size,
        "attention_backend": layers[0].attn_backend.get_name(),
        "num_blocks": blocks,
        "blocks_per_request": held,
        "max_concurrency": round(blocks / held, 2),
        "max_model_len": vllm_config.model_config.max_model_len,
        "max_in_flight_tokens": vllm_config.max_in_flight_tokens,
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "vocabulary": vllm_config.model_config.get_vocab_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
    }


class EngineReport:
    """Writes the facts once, at the first logits after the KV cache was bound; nothing without MISTRALCTL_RUN_DIR."""

    def __init__(self, model: Any, vllm_config: Any) -> None:
        folder = os.environ.get(envs.RUN_DIR)
        self._model, self._vllm_config = [model], vllm_config  # a list, so that torch does not take the model for a child
        self._file = Path(folder) / files.ENGINE.name if folder else None

    def once(self) -> None:
        """Called with every step; costs one comparison after the first."""
        if self._file is None:
            return
        facts = _facts(self._model[0], self._vllm_config)
        if facts is not None:
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(facts), "utf-8")
            temporary.replace(self._file)
            self._file = None


def read(run_dir: Path) -> dict[str, Any] | None:
    """The facts that the engine wrote, None before it did."""
    try:
        return untrusted.read_file(run_dir / files.ENGINE.name)
    except (OSError, ValueError):
        return None
