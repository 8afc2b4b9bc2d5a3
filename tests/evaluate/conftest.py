"""What the tests of evaluation share: a tiny model whose tokenizer puts BOS before a text, served by the real launcher with vLLM."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nodes import Launcher

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / part) for part in ("plugin", "tune")]  # their launcher, their models
os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
}  # fmt: skip

CONTEXT = 4000


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's folder with the tiny model."""
    import tiny_served

    folder = tmp_path_factory.mktemp("node")
    tiny_served.write(folder / "weights" / "tiny")
    return folder


@pytest.fixture(scope="session")
def served(weights: Path) -> Iterator[Launcher]:
    """That model behind its guard."""
    from nodes import launched

    with launched(weights, TOKENIZER_MODE="hf", CHAT_TEMPLATE="none", MAX_MODEL_LEN=str(CONTEXT)) as launcher:
        launcher.until("ready")
        yield launcher


@pytest.fixture(scope="session")
def by_reference(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """The same model, computed by the other engine."""
    from nodes import launched

    node = tmp_path_factory.mktemp("reference")
    shutil.copytree(weights / "weights", node / "weights")
    with launched(node, ENGINE="reference", TOKENIZER_MODE="hf", CHAT_TEMPLATE="none", MAX_MODEL_LEN=str(CONTEXT)) as launcher:
        launcher.until("ready")
        yield launcher
