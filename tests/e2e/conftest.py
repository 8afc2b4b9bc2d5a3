"""A home folder of its own for each test; tests that serve on this machine run one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mistralctl.task import package_dir
from running import Cli, down, share_node

sys.path.append(str(package_dir("model") / "plugin"))  # its certificates need nothing of vLLM


LOCAL = ("test_local", "test_store", "test_wheel")  # all take the first port that is free, seconds before they listen on it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.stem
        item.add_marker(pytest.mark.xdist_group("this machine" if file in LOCAL else file))


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(share_node(tmp_path / "home"), [sys.executable, "-m", "mistralctl"])
    yield cli
    down(cli)
