"""Commands, threads and machines that come between each other: nobody's change is lost, nobody fails in silence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mistral_contract import figures as judged
from mistral_contract import files, keys
from mistralctl import endpoint, figures, processes, runtime, state, training_data, weights
from mistralctl.commands import down, extend, receipt
from mistralctl.errors import Exit, UserError
from mistralctl.phases import PhaseEvent, Progress
from mistralctl.runtime import rented, sky, ssh
from mistralctl.runtime.following import Following
from mistralctl.runtime.local import Attached, Local
from mistralctl.runtime.rented import Rented, SecretsSender
from mistralctl.runtime.ssh import Address
from mistralctl.state import Record
from mistralctl.training_data import Place
from test_budget import Node, run_of_training
from test_figures import KEY, MADE
from test_lifecycle import record
from test_training import sourced


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the deployment `m` has its files."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    made = state.folder("m")
    made.mkdir(parents=True)
    return made


CUTS = ("", "1764430")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("what", ["end", "keys", "secrets"])
def test_what_a_lost_connection_cut_off_replaces_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cut: str, what: str
) -> None:
    """sshd closes standard input of a script whose connection is gone, and the script goes on."""
    node = folder / "node"
    monkeypatch.setattr(ssh, "NODE_DIR", str(node))
    (node / "run" / "m" / "keys").mkdir(parents=True)
    file = {"end": files.ENDS_AT, "keys": files.KEYS_FILE, "secrets": files.SECRETS}[what].of("m")
    (node / file).write_text("1764000000\n")

    def bash(name: str, script: str, *, given: str = "", seconds: float = 60) -> str:
        sent = given if whole else cut
        done = subprocess.run(["bash", "-c", script], input=sent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(done.stderr, Exit.NETWORK)
        return done.stdout

    monkeypatch.setattr(ssh, "run", bash)
    change: dict[str, Callable[[], Any]] = {
        "end": lambda: Rented().write(record(), file, "1764430000\n"),
        "keys": lambda: Rented().exchange(record(), "1764430000\n", "1764000000\n"),
        "secrets": lambda: ssh.write_secrets("m", {"hf_token": "1764430000"}),
    }
    whole = False
    with pytest.raises(UserError, match="was cut off"):
        change[what]()
    assert (node / file).read_text() == "1764000000\n"
    assert [path.name for path in (node / file).parent.iterdir() if path.name.startswith((file, "secrets"))] in (
        [],
        ["secrets.json"],
    )
    whole = True
    change[what]()
    assert "1764430000" in (node / file).read_text()


def test_secrets_that_a_thread_could_not_send_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str, secrets: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rented, "SECRETS_SECONDS", 0.0)
    monkeypatch.setattr(rented, "learn", lambda one: one)
    monkeypatch.setattr(ssh, "write_secrets", full)
    with pytest.raises(OSError, match="No space left"):
        SecretsSender(record(), {"hf_token": "x"}).finish()


def test_secrets_that_are_still_on_their_way_were_not_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(rented, "SECRETS_SECONDS", -9.9)  # of which 0.1 s are waited
    monkeypatch.setattr(rented, "learn", lambda one: one)
    monkeypatch.setattr(ssh, "write_secrets", lambda name, secrets: over.wait(60))
    try:
        with pytest.raises(UserError, match="did not take the secrets"):
            SecretsSender(record(), {"hf_token": "x"}).finish()
    finally:
        over.set()


def test_why_a_log_is_followed_no_more_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "command", lambda name: ["/nowhere/ssh"])
    followed = Following("m", "mctl-m", 7, folder / "serve.log", lambda line: None)
    with pytest.raises(FileNotFoundError, match="/nowhere/ssh"):
        followed.wait(60, lambda: False, lambda: False)


def test_the_way_to_a_new_machine_outlives_a_command_to_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (Address(f"192.0.2.{number}", 22, "ubuntu", "/key", machine=f"i-{number}") for number in (1, 2))
    ssh.remember("m", old)
    ssh.known_hosts("m").write_text("i-1 ssh-ed25519 AAAA\n")
    known, asked = ssh._is_known, list[str]()

    def between(name: str) -> bool:
        found = known(name)
        if not asked:
            asked.append(name)
            ssh.remember(name, new)
        return found

    monkeypatch.setattr(ssh, "_is_known", between)
    ssh.command("m")
    text = ssh.config_file("m").read_text()
    assert "HostName 192.0.2.2" in text
    assert ssh.FIRST in text


def test_silence_of_several_threads_ends_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    one, other = sky._quiet(), sky._quiet()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    sys.stdout.write("not heard")
    other.__exit__(None, None, None)
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.getvalue() == ""


@pytest.mark.linux
def test_two_that_choose_a_port_at_once_choose_two() -> None:
    program = (
        "import sys; from mistralctl import endpoint\n"
        "print(endpoint.choose_port(None, None, (), place='port', ours=False), flush=True); sys.stdin.read()"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        ports = [int(one.stdout.readline()) for one in started if one.stdout]
        assert len(set(ports)) == 2
        with pytest.raises(UserError, match="another mistralctl up has chosen just now"):
            endpoint.choose_port(ports[0], None, (), place="port", ours=False)
    finally:
        for one in started:
            one.communicate(timeout=60)


def test_lines_that_were_rotated_before_they_were_heard_are_heard(folder: Path) -> None:
    log, event = folder / "up.log", 'mistralctl-phase {"phase": "%s", "event": "end", "at": 1.0, "message": ""}\n'
    log.write_text(event % "train")
    heard: list[PhaseEvent] = []
    server = Attached(record(), log, Progress(heard.append))
    server._hear()
    log.with_name("up.log.1").write_text(log.read_text() + event % "prove")  # as the launcher rotates it
    log.write_text("x\n")
    server._hear()
    with log.open("a") as file:
        file.write(event % "publish")
    server._hear()
    assert [one.phase for one in heard] == ["train", "prove", "publish"]


def test_lines_that_were_rotated_before_they_were_followed_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, one = folder / "up.log", record()
    log.write_text("one\n" * 10)
    state.save(one)
    shown = Local().logs(one, follow=True, lines=1)
    assert next(shown) == "one\n"
    log.with_name("up.log.1").write_text(log.read_text() + "two\n")
    log.write_text("three\n")
    monkeypatch.setattr(processes, "of", lambda record: [])
    assert "".join(shown) == "two\nthree\n"


def test_a_run_that_ended_while_its_life_was_put_off_stays_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Ending(Node):
        def write(self, record: Record, file: str, text: str) -> None:
            super().write(record, file, text)
            state.save(replace(state.known("m"), state="down"))

    run_of_training(monkeypatch, tmp_path, Ending("4000000000\n"))
    monkeypatch.setattr(extend, "_left", lambda record, until: 1.0)
    extend.run("m", "2h")
    assert state.known("m").state == "down"


def test_down_closes_the_receipt_before_the_next_up_may_begin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(record(state="down"))
    held: list[bool] = []

    def close(name: str) -> None:
        with pytest.raises(UserError, match="already, by mistralctl down"), state.locked(name, "up"):
            pass
        held.append(True)

    monkeypatch.setattr(down, "_take_down", lambda record: False)
    monkeypatch.setattr(receipt, "close", close)
    down.run(["m"], everything=False)
    assert held == [True]


def test_damaged_figures_that_another_command_sets_aside_stop_no_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = state.home() / files.CANARIES.name
    place.mkdir()
    (place / f"{KEY}.json").write_text("[]")
    read = judged.read

    def between(*given: Any) -> Any:
        (place / f"{KEY}.json").unlink()
        return read(*given)

    monkeypatch.setattr(judged, "read", between)
    assert figures.known("m", lambda text: None) == []


def test_the_first_figures_of_weights_stay_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    place = state.home() / files.CANARIES.name / f"{KEY}.json"

    class Slow:
        def read(self, record: Record, file: str) -> str:
            state.write_private(place, "of a faster command")
            return json.dumps(MADE)

    monkeypatch.setattr(runtime, "of", lambda cloud: Slow())
    figures.keep(record(), {"weights": KEY})
    assert place.read_text() == "of a faster command"


@contextmanager
def tokenizer_of(data: Callable[[], bytes]) -> Iterator[Any]:
    yield SimpleNamespace(sizes={"tokenizer.json": 2}, read=lambda name, start, stop: data())


def test_a_tokenizer_is_there_as_a_whole_whoever_brings_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = state.home() / "tokenizers" / "w"
    target.mkdir(parents=True)
    (target / "tokenizer.json").write_bytes(b"{")  # half made, by an earlier version
    place, faster = Place("s3://bucket/w", "", "w"), list[Path | None]()

    def data() -> bytes:
        if not faster:
            faster.append(None)
            faster[0] = training_data._brought(place)
            os.utime(target / "tokenizer.json", (1, 1))  # somebody reads it from now on
        return b"{}"

    monkeypatch.setattr(weights, "briefly", lambda uri: tokenizer_of(data))
    assert training_data._brought(place) == faster[0] == target
    assert sorted(path.name for path in target.iterdir()) == [".complete", "tokenizer.json"]
    assert (target / "tokenizer.json").stat().st_mtime == 1
    assert (target / "tokenizer.json").read_bytes() == b"{}"
    assert list(target.parent.iterdir()) == [target]


def test_chats_that_change_while_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mistralctl import chats

    path = tmp_path / "chats.jsonl"
    path.write_text("{}\n")
    monkeypatch.setattr(chats, "read_chats", lambda path: path.write_text("{}\n{}\n"))
    with pytest.raises(UserError, match=r"chats\.jsonl changed while it was read") as raised:
        training_data._chats(sourced(data=str(path)), "data", tmp_path, lambda text: None)
    assert raised.value.code == Exit.CONFLICT


def test_keys_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync, seen = tmp_path / "keys.json", os.fsync, list[bool]()

    def fsync(handle: int) -> None:
        seen.append(path.exists() or os.fstat(handle).st_size == 0)
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    keys.write(path, keys.Keys(7))
    assert seen == [False]
    assert keys.read(path.read_text()).serial == 7
