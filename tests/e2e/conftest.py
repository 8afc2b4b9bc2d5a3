"""A home folder of its own for each test; tests that serve on this machine run one after the other; a failure shows the nodes' logs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from deployments import simulated
from mistralctl import package_dir
from roles import exceeded
from running import Cli, down, share_node
from simcloud import SimCloud
from xdist.scheduler import LoadFileScheduling

sys.path.append(str(package_dir("model") / "node"))  # its certificates need nothing of vLLM


# Files whose tests run one after the other: those of one cloud, as each simulates it as a whole; those that serve on this machine, as all take the
# first port that is free, seconds before they listen on it.
LANES = {
    "this machine": ("test_local", "test_store", "test_wheel", "test_finetune"),
    "aws": ("test_simcloud", "test_aws", "test_public"),
    "azure": ("test_simcloud_azure", "test_azure"),
    "gcp": ("test_simcloud_gcp", "test_gcp"),
}


class Lanes(LoadFileScheduling):
    """Gives each worker one lane after the other; a file of none is its own."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return next((lane for lane, files in LANES.items() if Path(file).stem in files), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin each cloud with what is simulated of it; give a test of one the time to bake its image, as the first one does: 6 to 9 minutes."""
    order = [file for files in LANES.values() for file in files]
    items.sort(key=lambda item: order.index(item.path.stem) if item.path.stem in order else len(order))
    for item in items:
        if "sim" in getattr(item, "fixturenames", ()) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture(scope="module")
def sim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    """The simulated cloud that a module names as `CLOUD`, with the small model's weights; its role in docs/roles allows what is done there."""
    cloud: str = request.module.CLOUD
    with simulated(tmp_path_factory.mktemp(cloud), [cloud]) as sim:
        yield sim
        assert exceeded(sim, cloud) == set()


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
