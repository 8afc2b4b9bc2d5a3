"""A home folder of its own for each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Cli, down, share_node


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(share_node(tmp_path / "home"), [sys.executable, "-m", "mistralctl"])
    yield cli
    down(cli)
