"""A signal ends a command in order, a second one at once; what goes on is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROGRAM, Run
from mistralctl import interrupts, state
from mistralctl.errors import Exit
from mistralctl.state import Record

Started = Callable[..., subprocess.Popen[str]]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# Hangs in order, in clean-up, or in a thread that is waited for, which no first signal ends.
HANGS = """
import sys, time, threading
from mistralctl import cli
from mistralctl.commands import status
def hang(name):
    try:
        print("there", flush=True)
        time.sleep(60)
    finally:
        if {stubborn}:
            print("cleans up", flush=True)
            time.sleep(60)
status.run = hang
sys.argv = ["mistralctl", "status", "m"]
cli.main()
"""


@pytest.fixture
def ours(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRALCTL_HOME", str(home / ".mistralctl"))
    return home / ".mistralctl"


@pytest.fixture
def started(ours: Path) -> Iterator[Started]:
    every: list[subprocess.Popen[str]] = []
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]  # by nohup, and inherited
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)

    def start(*words: str) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if key != "MISTRALCTL_OWNER"}
        one = subprocess.Popen(
            [sys.executable, *words], env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        every.append(one)
        return one

    yield start
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    for one in every:
        one.kill()
        one.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_ends_in_order_and_says_so(started: Started, number: signal.Signals) -> None:
    one = started("-c", HANGS.format(stubborn=False))
    assert line(one) == "there\n"
    one.send_signal(number)
    _, err = one.communicate(timeout=600)
    assert (one.returncode, err) == (Exit.INTERRUPTED, "mistralctl: interrupted; nothing was changed\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_it_at_once(started: Started, number: signal.Signals) -> None:
    one = started("-c", HANGS.format(stubborn=True))
    assert line(one) == "there\n"
    one.send_signal(number)
    assert line(one) == "cleans up\n"
    time.sleep(2 * interrupts.SAME_SECONDS)
    one.send_signal(number)
    _, err = one.communicate(timeout=600)
    assert (one.returncode, err) == (
        Exit.INTERRUPTED,
        "mistralctl: interrupted again and ended at once; mistralctl status says what runs\n",
    )


def test_what_goes_on_is_said_by_name() -> None:
    assert interrupts.said(["chat", "m", "-m", "hello"]) == "interrupted; m serves on; an answer that had begun is not finished"
    assert interrupts.said(["chat", "-m", "hello"]) == "interrupted; it serves on; an answer that had begun is not finished"
    assert interrupts.said(["keys", "m", "add"]).endswith("mistralctl keys m list shows who may ask")
    assert interrupts.said([]) == "interrupted; nothing was left half-done"


def test_following_a_log_ends_and_the_deployment_goes_on(ours: Path, started: Started) -> None:
    server = subprocess.Popen(
        ["sleep", "100"], env=os.environ | {"MISTRALCTL_NAME": "m", "MISTRALCTL_NODE_DIR": str(ours / "node")}
    )
    try:
        state.save(Record("m", "local", "up", "m", "m", 8123, str(ours / "node"), "s", time.time(), pid=server.pid))
        (state.folder("m") / "up.log").write_text("said\n")
        one = started(*PROGRAM, "logs", "m", "-f")
        assert line(one) == "said\n"
        one.send_signal(signal.SIGINT)
        assert one.communicate(timeout=600)[1] == "mistralctl: interrupted; m goes on\n"
        assert one.returncode == Exit.INTERRUPTED
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


def test_a_first_up_that_failed_is_shown_with_its_log_until_it_is_taken_down(ours: Path, mistralctl: Run) -> None:
    log = state.folder("m") / "up.log"
    state.save(Record("m", "local", "down", "m", "m", 8123, str(ours / "node"), "s", time.time(), failure="no memory"))
    log.write_text("why\n")
    [one] = json.loads(mistralctl("status", "-o", "json").stdout)["items"]
    assert (one["state"], one["why"]) == ("failed", f"no memory (log: {log})")
    assert mistralctl("logs", "m").stdout == "why\n"
    done = mistralctl("down", "m")
    assert (done.returncode, done.stdout) == (0, "m did not come up, and is forgotten; its log stays\n")
    assert json.loads(mistralctl("status", "-o", "json").stdout)["items"] == []
