"""A home folder of its own for each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mistralctl.task import package_dir
from running import Cli, down, share_node

sys.path.append(str(package_dir("model") / "plugin"))  # its certificates need nothing of vLLM


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(share_node(tmp_path / "home"), [sys.executable, "-m", "mistralctl"])
    yield cli
    down(cli)
