"""A process for each device: what they share, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mistral_tune import processes

WORKER = """
import os, signal, sys, time
from pathlib import Path
folder, does = Path(sys.argv[1]), sys.argv[2:]
rank = int(os.environ["RANK"])
def asked(number, frame):
    sys.exit(75)
signal.signal(signal.SIGTERM, asked)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MISTRAL_TUNE_TOGETHER")
(folder / f"{rank}.new").write_text("\\n".join(os.environ[name] for name in names))
(folder / f"{rank}.new").rename(folder / f"{rank}")
for _ in range(3000):
    if does[rank] != "wait":
        sys.exit(int(does[rank]))
    time.sleep(0.1)
"""
PARENT = """
import sys
from mistral_tune import processes
processes.KILL_SECONDS = 0.5
sys.exit(processes.run(2, sys.argv[1:], [sys.executable, "-c", {!r}]))
"""


def together(folder: Path, *does: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start two processes that leave what they were told in files, and then end with a code or wait."""
    command = [sys.executable, "-c", PARENT.format(WORKER), str(folder), *does]
    return subprocess.Popen(command, env=os.environ | variables)


def told(folder: Path) -> list[list[str]]:
    """Return what each was told, once both are there."""
    files = [folder / str(rank) for rank in range(2)]
    for _ in range(3000):
        if all(file.exists() for file in files):
            return [file.read_text().split("\n") for file in files]
        time.sleep(0.1)
    raise AssertionError("they did not start")


def test_each_process_is_told_its_place_and_has_its_share_of_the_threads(tmp_path: Path) -> None:
    assert together(tmp_path, "0", "0", OMP_NUM_THREADS="8").wait(300) == 0
    [first, second] = told(tmp_path)
    assert (first[:4], second[:4]) == (["0", "0", "2", "127.0.0.1"], ["1", "1", "2", "127.0.0.1"])
    assert first[4] == second[4]
    assert (first[5], second[5]) == ("4", "4")


def test_one_that_fails_ends_the_others_and_its_code_is_that_of_all(tmp_path: Path) -> None:
    assert together(tmp_path, "wait", "3").wait(300) == 3


def test_a_signal_reaches_each_and_all_say_that_the_run_goes_on(tmp_path: Path) -> None:
    process = together(tmp_path, "wait", "wait")
    told(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75


def test_a_signal_while_they_are_started_reaches_those_that_come_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    told: list[list[int]] = []

    class Started:
        def __init__(self, command: object, env: dict[str, str]) -> None:
            self.heard: list[int] = []
            told.append(self.heard)
            if len(told) == 1:
                signal.raise_signal(signal.SIGTERM)

        def send_signal(self, number: int) -> None:
            self.heard.append(number)

        def poll(self) -> int | None:
            return 75 if self.heard else None

        kill = poll

        @property
        def returncode(self) -> int | None:
            return self.poll()

    monkeypatch.setattr(processes, "KILL_SECONDS", 0.1)
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=Started))
    try:
        assert processes.run(2, []) == 75
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert told == [[signal.SIGTERM], [signal.SIGTERM]]


def test_what_an_earlier_run_was_told_is_not_this_ones(tmp_path: Path) -> None:
    """The port of the rendezvous may be the same; a process would go on from another checkpoint than the first one does."""
    seen = []
    for _ in range(2):
        assert together(tmp_path, "0", "0", OMP_NUM_THREADS="8").wait(300) == 0
        told_to = [one[6] for one in told(tmp_path)]
        assert told_to[0] == told_to[1]
        seen.append(told_to[0])
    assert len(set(seen)) == 2


@pytest.mark.parametrize(("quota", "expected"), [("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", None)])
def test_no_more_threads_than_the_control_group_is_given(tmp_path: Path, quota: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    cores = len(os.sched_getaffinity(0))
    assert processes.threads(tmp_path / "cpu.max") == (expected or cores)
    assert processes.threads(tmp_path / "none") == cores


def test_what_the_user_says_of_threads_stays() -> None:
    environ = {"OMP_NUM_THREADS": "3"}
    processes.bound(environ)
    assert environ == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}
