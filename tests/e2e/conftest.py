"""A home folder of its own for each test; tests that serve on this machine run one after the other; a failure shows the nodes' logs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from mistralctl import package_dir
from running import Cli, down, share_node
from simcloud import SimCloud
from xdist.scheduler import LoadFileScheduling

sys.path.append(str(package_dir("model") / "node"))  # its certificates need nothing of vLLM


LOCAL = ("test_local", "test_store", "test_wheel")  # all take the first port that is free, seconds before they listen on it


class Files(LoadFileScheduling):
    """Gives each worker one file after the other, and those above as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "this machine" if Path(file).stem in LOCAL else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a test of a simulated cloud the time to bake its image, which the first one does: 6 to 9 minutes on two cores."""
    for item in items:
        if "sim" in getattr(item, "fixturenames", ()) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(2400))


def _end(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure in simulated clouds: how the jobs' logs end, newest last, and whom the kernel killed for want of memory."""
    report = yield
    sim = getattr(item, "funcargs", {}).get("sim")
    if report.failed and isinstance(sim, SimCloud):
        logs = sorted(sim.root.glob("*/nodes/*/upper/home/*/sky_logs/*/run.log"), key=lambda log: log.stat().st_mtime)
        report.sections += [(str(log.relative_to(sim.root)), _end(log.read_text("utf-8", "replace"))) for log in logs[-3:]]
        kernel = subprocess.run(["dmesg"], capture_output=True, text=True).stdout
        report.sections.append(("kernel", _end("\n".join(line for line in kernel.splitlines() if "Out of memory" in line))))
    return report


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(share_node(tmp_path / "home"), [sys.executable, "-m", "mistralctl"])
    yield cli
    down(cli)
