"""What the launcher writes while it serves: within bounds, and without an end where the disk is full."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mistral_contract import files
from mistral_node import disk, gate, log
from mistral_node.callers import Callers
from mistral_node.phases import Status
from nodes import KEY, known, write_keys

PROGRAM = """
import sys
from mistral_node import log
log.LARGEST = 100_000
log._budget = log._Budget()
for number in range(int(sys.argv[1])):
    log.line(f"{number:06d} " + "x" * 92, ours=sys.argv[2] == "ours")
log.line("the end")
"""


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow: a write to one fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write(lines: int, output: int, whose: str = "vllm") -> int:
    return subprocess.run([sys.executable, "-c", PROGRAM, str(lines), whose], stdout=output, check=False, timeout=600).returncode


def test_a_file_is_rotated_and_keeps_its_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "up.log"
    with path.open("ab") as output:
        assert write(5000, output.fileno()) == 0
    older, newer = (tmp_path / "up.log.1").read_text(), path.read_text()
    assert len(older) < 100_300
    assert len(newer) < 100_300
    numbers = [int(line.split()[0]) for line in (older + newer).splitlines()[:-1]]
    assert numbers == list(range(numbers[0], 5000))  # none is missing from where they begin
    assert newer.endswith("the end\n")


def test_what_is_read_elsewhere_has_a_budget_which_the_launchers_own_lines_have_not(tmp_path: Path) -> None:
    for whose, least, most in (("vllm", 99_000, 110_000), ("ours", 500_000, 510_000)):
        done = subprocess.run([sys.executable, "-c", PROGRAM, "5000", whose], capture_output=True, check=True, timeout=600)
        assert least < len(done.stdout) < most
        assert done.stdout.endswith(b"the end\n")


def test_what_was_left_out_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, clock = log._Budget(), [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    budget._at = 0.0
    assert budget.take(b"x" * log.LARGEST) == b"x" * log.LARGEST
    assert [budget.take(b"a\n"), budget.take(b"b\n")] == [b"", b""]
    clock[0] = 3600.0
    assert budget.take(b"c\n") == b"(2 lines of vLLM are left out: the log is full)\nc\n"


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        assert write(3, descriptor) == 0
    finally:
        os.close(descriptor)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert write(3, writing) == 0
    finally:
        os.close(writing)


def test_a_log_on_a_full_disk_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1000)
    with path.open("ab") as output, full_disk():
        log._rotate(output.fileno())
    assert (path.stat().st_size, list(tmp_path.iterdir())) == (0, [path])


def test_a_status_that_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    file = tmp_path / files.STATUS.name
    with full_disk():
        status = Status(file)
        status.set(state="ready")
        with status.during("gate"):
            pass
        assert list(tmp_path.iterdir()) == []
    status.set(state="ready")
    assert json.loads(file.read_text())["phases"][0]["phase"] == "gate"
    with full_disk():
        status.set(state="draining")
    assert json.loads(file.read_text())["state"] == "ready"
    status.set()
    assert json.loads(file.read_text())["state"] == "draining"
    assert list(tmp_path.iterdir()) == [file]


def test_counts_that_cannot_be_written_are_written_later_and_leave_no_pieces(tmp_path: Path) -> None:
    run_dir = write_keys(tmp_path)
    usage = run_dir / files.USAGE.name
    callers = Callers(tmp_path / "keys" / files.KEYS_FILE.name, usage)
    with full_disk():
        callers.account(known().keys[0]).begin(1.0)
        for _ in range(3):
            with pytest.raises(OSError, match="File too large"):
                callers.save({"401": 7})
    assert list(run_dir.iterdir()) == []
    callers.save({"401": 7})
    assert json.loads(usage.read_text())["refused"] == {"401": 7}
    assert Callers(tmp_path / "keys" / files.KEYS_FILE.name, usage).refused == {"401": 7}
    assert KEY not in usage.read_text()


def test_a_report_of_the_gate_that_cannot_be_written_does_not_keep_it_shut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_walk", lambda client, file: gate.routes.Report(1, ()))
    with full_disk():
        assert not disk.replaced(tmp_path / "x", "text")
    (tmp_path / files.GATE.name).mkdir()  # cannot be replaced
    monkeypatch.setattr(gate.routes.Report, "fault", lambda self: "")
    gate.pass_through(None, tmp_path, tmp_path)  # type: ignore[arg-type]
