"""Keys in an object that the launcher follows: a file here, read by the real follower; what stores with a protocol say is in tests/weights."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mistral_contract import files, keys
from mistral_node import contract, key_source, serve
from mistral_node.callers import Callers
from mistral_node.contract import Code, LaunchError
from mistral_node.key_source import KeySource
from mistral_node.phases import Status
from nodes import KEY, known, launched, variables, write_keys

OTHER = "sk-other-0123456789abcdef0123456789abcdef"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A deployment's folder after its set-up."""
    folder = tmp_path / "run" / "test"
    folder.mkdir(parents=True)
    (folder / files.WEIGHTS_TOOL.name).symlink_to(sys.prefix)
    return folder


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket" / "keys.json"


@pytest.fixture
def source(run_dir: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeySource]:
    """A source that looks ten times a second, and is not started yet."""
    monkeypatch.setattr(KeySource, "_command", lambda self, plain=KeySource._command: [*plain(self), "0.1"])
    monkeypatch.setattr(key_source, "AGAIN_SECONDS", 0.2)
    found = KeySource(f"file://{bucket}", run_dir)
    yield found
    found.end()


def until(true: Callable[[], Any], seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def serial(run_dir: Path) -> int:
    return keys.read((run_dir / "keys" / "keys.json").read_text()).serial


def test_newer_keys_are_taken_up_by_the_guard_and_older_ones_never(run_dir: Path, bucket: Path, source: KeySource) -> None:
    keys.write(bucket, known(5))
    write_keys(run_dir, known(3))
    callers = Callers(run_dir / "keys" / "keys.json", run_dir / "shared" / "usage.json")
    source.start()
    source.first(threading.Event(), 300)
    assert serial(run_dir) == 5
    both = known(6).changed([*known().keys, keys.make(OTHER, "other", 1.0)])
    keys.write(bucket, both)
    until(lambda: serial(run_dir) == both.serial)
    time.sleep(0.25)
    callers.look()
    assert callers.find(OTHER.encode()) is not None
    keys.write(bucket, known(4))
    keys.write(run_dir / "keys" / "keys.json", known(both.serial + 1))  # by whoever else: the object's next one is older
    keys.write(bucket, known(both.serial))
    time.sleep(0.5)
    assert serial(run_dir) == both.serial + 1
    assert source.status() == {"uri": f"file://{bucket}", "problem": None, "since": None}


def test_what_goes_wrong_keeps_the_keys_in_force_and_is_said_with_its_beginning(
    run_dir: Path, bucket: Path, source: KeySource
) -> None:
    write_keys(run_dir, known(3))
    before = time.time()
    source.start()
    source.first(threading.Event(), 300)
    began = source.status()
    assert (began["problem"], serial(run_dir)) == (f"{bucket} is not there; check its name", 3)
    assert before - 1 <= began["since"] <= time.time() + 1
    time.sleep(0.05)
    assert source.status()["since"] == began["since"]
    for damaged, problem in (
        ("{", "is no JSON"), ('{"version": 2, "serial": 9, "keys": []}', "version 2 is not known here"),
        ("x" * 100_001, "should have at most 100000 characters"), ("x" * (1 << 21), "has more than 1048576 bytes"),
    ):  # fmt: skip
        bucket.write_text(damaged)
        until(lambda says=problem: says in (source.status()["problem"] or ""))
        assert (source.status()["since"], serial(run_dir)) == (began["since"], 3)
    keys.write(bucket, known(4))
    until(lambda: source.status()["problem"] is None)
    assert (source.status()["since"], serial(run_dir)) == (None, 4)
    bucket.unlink()
    again = until(lambda: source.status()["since"])
    assert (again > began["since"], serial(run_dir)) == (True, 4)


def test_what_reads_the_object_is_started_again_and_ends_with_the_launcher(
    run_dir: Path, bucket: Path, source: KeySource
) -> None:
    def readers() -> list[psutil.Process]:
        below = psutil.Process().children(recursive=True)
        return [
            one for one in below if one.is_running() and one.status() != "zombie" and "mistral_weights.follow" in one.cmdline()
        ]

    source.start()
    [first] = until(readers)
    first.kill()
    [second] = until(lambda: [one for one in readers() if one != first])
    keys.write(bucket, known(8))
    until(lambda: (run_dir / "keys" / "keys.json").exists() and serial(run_dir) == 8)
    until(lambda: source.status()["problem"] is None)
    source.end()
    psutil.wait_procs([second], timeout=600)
    assert readers() == []


@pytest.mark.parametrize("said", ["1", "[]", "{}", '{"event": "problem"}', '{"event": "object", "text": null}'])
def test_what_no_reader_says_ends_no_following(
    run_dir: Path, bucket: Path, source: KeySource, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """An SDK may write to standard output, too."""
    command, calls = KeySource._command, list[str]()

    def once(self: KeySource) -> list[str]:
        calls.append(said)
        return [sys.executable, "-c", f"print({said!r}, flush=True)"] if len(calls) == 1 else command(self)

    monkeypatch.setattr(KeySource, "_command", once)
    keys.write(bucket, known(8))
    source.start()
    until(lambda: not source._thread.is_alive() or (run_dir / "keys" / "keys.json").exists())
    assert serial(run_dir) == 8


def test_without_what_reads_it_the_source_says_so(run_dir: Path, source: KeySource) -> None:
    (run_dir / files.WEIGHTS_TOOL.name).unlink()
    source.start()
    source.first(threading.Event(), 300)
    assert "what reads it does not work: [Errno 2] No such file" in source.status()["problem"]


def test_a_start_needs_no_laptop_and_waits_for_no_store(
    run_dir: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest keys count, of the object and of the task; the task's own where there is no object, or none that answers in time."""
    monkeypatch.setattr(serve, "KEYS_SECONDS", 20.0)
    asked = threading.Event()
    wanted = contract.read(variables(tmp_path, KEYS=known(5).dump(), KEYS_URI=f"file://{bucket}"))
    status = Status(run_dir / "status.json")

    def settled(wanted: contract.Contract = wanted) -> int:
        (run_dir / "keys" / "keys.json").unlink(missing_ok=True)
        with serve.followed_keys(wanted, status, asked):
            serve.settle_keys(wanted)
            status.set()
            return serial(run_dir)

    assert settled() == 5
    assert "is not there" in status.fields["keys"]["problem"]
    for there, in_force in ((4, 5), (6, 6)):
        keys.write(bucket, known(there))
        assert settled() == in_force
        assert status.fields["keys"]["problem"] is None
    without = dataclasses.replace(wanted, keys=None)
    assert settled(without) == 6
    bucket.unlink()
    with pytest.raises(LaunchError, match="MISTRALCTL_KEYS names no key") as caught:
        settled(without)
    assert caught.value.code is Code.CONTRACT
    silent = run_dir / "silent" / "bin" / "python"  # a store that never answers
    silent.parent.mkdir(parents=True)
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    (run_dir / files.WEIGHTS_TOOL.name).unlink()
    (run_dir / files.WEIGHTS_TOOL.name).symlink_to(silent.parents[1])
    monkeypatch.setattr(serve, "KEYS_SECONDS", 0.3)
    began = time.monotonic()
    assert settled() == 5
    assert time.monotonic() - began < 50


def test_a_silent_reader_is_a_problem(source: KeySource, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.status()["problem"] is None
    monkeypatch.setattr(key_source, "SILENT_SECONDS", -1.0)
    assert source.status()["problem"] == "what reads it does not answer"


def test_a_launcher_without_a_uri_follows_nothing(tmp_path: Path) -> None:
    status = Status(tmp_path / "status.json")
    with serve.followed_keys(contract.read(variables(tmp_path)), status, threading.Event()):
        status.set()
    assert status.fields["keys"] is None


def test_a_bad_uri_is_refused_by_the_contract(tmp_path: Path) -> None:
    with launched(tmp_path, KEYS_URI="hf://a/b/keys.json") as launcher:
        assert launcher.wait(300) == Code.CONTRACT
        assert "MISTRALCTL_KEYS_URI" in launcher.log.read_text()
        assert KEY not in launcher.log.read_text()
