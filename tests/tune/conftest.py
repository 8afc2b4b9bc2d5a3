"""What the tests of training share: few threads, no hub, a tiny base model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = os.pathsep.join(str(ROOT / "model" / part) for part in ("contract", "weights", "chats", "plugin", "node", "tune"))
os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING",
    "PYTHONPATH": SOURCES,
}  # fmt: skip


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's folder with the tiny base model."""
    import tiny_model

    folder = tmp_path_factory.mktemp("node")
    tiny_model.write(folder / "weights" / "tiny")
    return folder
