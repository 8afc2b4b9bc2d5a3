"""The report of `make real`: what was seen so far is in the file after each step, whatever becomes of the run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from mistralctl import package_dir

sys.path.append(str(package_dir("model").parent / "benchmarks"))
import real_run
from real_run import Failed, Run, take


@pytest.fixture
def run(tmp_path: Path) -> Run:
    options = argparse.Namespace(cloud="aws", max_price="1", ttl="1h", model="m", skip=["chat"], name="real")
    return Run(options, tmp_path / "report.md")


def rows(run: Run) -> list[str]:
    return [line for line in run.file.read_text("utf-8").splitlines() if line.startswith(("##", "| "))]


def test_a_step_is_in_the_file_once_it_was_taken(run: Run) -> None:
    def dies(_: Run) -> str:
        raise KeyboardInterrupt

    assert take(run, "up", lambda _: "a machine | in\nus-east-1")
    with pytest.raises(KeyboardInterrupt):
        take(run, "machine", dies)
    [title, _, up] = rows(run)
    assert title.endswith(": m, not finished")
    assert up == "| up | passed | 0 | a machine \\| in us-east-1 |"


def test_what_a_finished_run_says(run: Run) -> None:
    def fails(_: Run) -> str:
        raise Failed("no text came")

    for step in ("up", "chat", "down"):
        take(run, step, lambda _: "")
    assert rows(run)[0].endswith(": m, every step passed")
    assert rows(run)[3] == "| chat | left out | 0 | by --skip |"
    assert not take(run, "long prompt", fails)
    assert rows(run)[0].endswith(": m, 1 failed")


def test_no_machine_is_rented_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(sys, "argv", ["real_run.py", "--cloud", "aws", "--max-price", "1"])
    with pytest.raises(SystemExit, match="never run in CI"):
        real_run.main()
