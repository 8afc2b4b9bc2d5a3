"""A home folder of its own for each test; tests that serve on this machine run one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mistralctl.task import package_dir
from running import Cli, down, share_node
from xdist.scheduler import LoadFileScheduling

sys.path.append(str(package_dir("model") / "plugin"))  # its certificates need nothing of vLLM


LOCAL = ("test_local", "test_store", "test_wheel")  # all take the first port that is free, seconds before they listen on it


class Files(LoadFileScheduling):
    """Gives each worker one file after the other, and those above as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "this machine" if Path(file).stem in LOCAL else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    return Files(config, log)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(share_node(tmp_path / "home"), [sys.executable, "-m", "mistralctl"])
    yield cli
    down(cli)
