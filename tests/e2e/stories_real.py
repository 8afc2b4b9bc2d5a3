"""The scripted first run on a real account (benchmarks/real_run.py, `make real`), rehearsed on each simulated cloud."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from deployments import PLACES, simulated, story
from mistralctl import package_dir
from running import MODEL

PROGRAM = package_dir("model").parent / "benchmarks" / "real_run.py"
STEPS = ("up", "machine", "routes", "ports", "chat", "long prompt", "eight at once", "idle", "down")


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("cloud", PLACES)
def test_the_first_run_on_a_real_account(cloud: str, tmp_path: Path) -> None:
    place, report = PLACES[cloud], tmp_path / "report.md"
    with simulated(tmp_path, [cloud]) as sim, story("a first run, scripted", cloud):
        words = [sys.executable, PROGRAM, "--cloud", cloud, "--max-price", "1", "--model", MODEL, "--weights", place.weights,
                 "--tools-model", MODEL, "--yes", "--report", report]  # fmt: skip
        done = sim.run([str(word) for word in words], timeout=1800, check=False, env={"CI": ""})
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        text = report.read_text("utf-8")
        assert text.startswith(f"## {cloud}, ")
        assert f": {MODEL}, every step passed\n" in text
        for step in STEPS:
            assert f"| {step} | passed |" in text
        assert f"| tools | left out | 0 | {MODEL} calls no tools |" in text.replace("| 1 |", "| 0 |").replace("| 2 |", "| 0 |")
        key = (sim.home / ".mistralctl" / "deployments" / "real" / "api_key").read_text().strip()
        assert key not in text
        assert not sim.instances(cloud)
        assert not sim.volumes(cloud)
