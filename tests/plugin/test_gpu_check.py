"""benchmarks/gpu_check.py, small and on a CPU: the program that a machine with a GPU runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def run(folder: Path, *options: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROGRAM, "--output", folder, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run on the CPU has written, with every import that a bare machine has not refused."""
    folder = tmp_path_factory.mktemp("gpu-check")
    refuse = "import sys; sys.modules.update(dict.fromkeys(('vllm', 'safetensors', 'transformers', 'psutil')))"
    start = f"{refuse}; import runpy; sys.argv = {['gpu_check.py', '--small', '--device', 'cpu', '--output', str(folder)]}"
    command = [sys.executable, "-c", f"{start}; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith((folder / "gpu-check.md").read_text())
    return folder


def test_every_figure_is_real_and_within_its_limit(report: Path) -> None:
    found = json.loads((report / "gpu-check.json").read_text())
    assert (found["name"], found["small"], found["ok"], found["machine"]["device"]) == ("gpu-check", True, True, "cpu")
    *right, wrong = found["equality"]
    assert len(right) == 8
    assert all(0 < check["found"] <= check["limit"] for check in right), right
    assert wrong["found"] > wrong["limit"] == 0.4
    rows = {(row["phase"], row["tokens"]): row for row in found["attention"]}
    assert rows.keys() == {(phase, tokens) for phase in ("prefill", "decode") for tokens in (512, 1024)}
    assert all(row["none_ms"] > 0 < row["window_ms"] for row in rows.values())
    assert [round(row["pairs"], 2) for row in rows.values()] == [2.29, 4.27, 4.0, 8.0]
    held = [(row["tokens"], row["window"], row["none"]) for row in found["blocks"]]
    assert held == [(512, 12, 32), (1024, 12, 64)]


def test_the_table_has_every_figure(report: Path) -> None:
    found, table = json.loads((report / "gpu-check.json").read_text()), (report / "gpu-check.md").read_text()
    assert table.startswith(f"### cpu, {found['date']} (small)\n")
    for check in found["equality"]:
        assert f"| {check['what']} | {check['found']:.1e} | " in table
    for row in found["attention"]:
        assert f"| {row['none_ms']:.3f} | {row['window_ms']:.3f} | {row['ratio']:.2f} | {row['pairs']:.2f} |" in table
    for row in found["blocks"]:
        assert f"| prompt of {row['tokens']} tokens | {row['window']} ({row['window_bound']}) | " in table


def test_without_torch_or_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("gpu-check: torch ")
    bare = subprocess.run(
        [sys.executable, "-S", "-E", PROGRAM, "--output", tmp_path], capture_output=True, text=True, check=False
    )  # -S: no installed packages
    assert (bare.returncode, bare.stdout, len(bare.stderr.splitlines())) == (2, "", 1)
    assert bare.stderr.startswith("gpu-check: torch cannot be imported (No module named 'torch'); ")
    assert list(tmp_path.iterdir()) == []
