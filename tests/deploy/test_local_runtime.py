"""The runtime of this machine with scripts of a few lines in the place of set-up and server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mistralctl import state
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Observed
from mistralctl.phases import PhaseEvent
from mistralctl.processes import alive, servers
from mistralctl.runtime.local import Local
from mistralctl.runtime.protocol import Attempt
from mistralctl.state import Record

EVENT = """echo 'mistralctl-phase {"phase": "%s", "event": "%s", "at": 1.0, "message": "%s"}'\n"""
SETUP = EVENT % ("weights", "end", "")
RUN = EVENT % ("engine", "end", "") + EVENT % ("ready", "end", "") + "exec sleep 100"
IDLE = Observed("up", {}, beside=True)


def wanted(home: Path, setup: str = SETUP, run: str = RUN) -> Record:
    envs = {"MISTRALCTL_NAME": "m", "MISTRALCTL_NODE_DIR": str(home / "node"), "MISTRALCTL_SERVING_ID": run}
    task: dict[str, Any] = {"name": "m", "resources": {}, "envs": envs, "file_mounts": {}, "setup": setup, "run": run}
    return Record("m", "local", "starting", "m", "m", 8999, str(home / "node"), run, 0.0, task=task)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    (tmp_path / "node" / "run" / "m").mkdir(parents=True)
    yield tmp_path
    record = state.read("m")
    if record is not None:
        Local().stop(record, drain=0)


def attempt(record: Record, heard: list[PhaseEvent], old: Record | None = None) -> Attempt:
    return Attempt(record, {"api_key": "k"}, IDLE, heard.append, state.save, 0.0, old)


def test_set_up_then_a_server_whose_phases_are_heard(home: Path) -> None:
    heard: list[PhaseEvent] = []
    server = Local().start(attempt(wanted(home), heard))
    for phase in ("engine", "ready"):
        server.wait(phase)
    assert [event.phase for event in heard] == [event.phase for event in server.events] == ["weights", "engine", "ready"]
    record = state.known("m")
    assert record.pid == server.record.pid
    assert alive(record)
    assert json.loads((record.run_dir / "secrets.json").read_text()) == {"api_key": "k"}
    observed = Local().observe(dataclasses.replace(record, state="up"), record)
    assert observed == Observed("up", {"": record.pid or 0}, beside=True)
    assert Local().observe(record, record).interrupted
    Local().stop(record)
    assert servers(record) == []
    assert Local().observe(record, record) == IDLE


@pytest.mark.parametrize(
    ("setup", "run", "says"),
    [
        (EVENT % ("weights", "fail", "no such bucket") + "exit 3", RUN, "^no such bucket \\(log: "),
        ("echo out of disk; exit 3", RUN, "^it ended with code 3: out of disk \\(log: "),
        (SETUP, "echo no memory; exit 4", "^it ended with code 4: no memory \\(log: "),
    ],
)
def test_what_fails_says_why_and_leaves_nothing(home: Path, setup: str, run: str, says: str) -> None:
    one = attempt(wanted(home, setup, run), [])
    with pytest.raises(UserError, match=says) as error:
        Local().start(one).wait("engine")
    assert error.value.code == Exit.SERVER
    Local().give_up(one, error.value)
    assert (state.known("m").state, state.known("m").pid) == ("down", None)
    assert not (home / "node" / "run" / "m").exists()


def test_a_set_up_that_fails_leaves_the_server_that_serves(home: Path) -> None:
    server = Local().start(attempt(wanted(home), []))
    server.wait("ready")
    old = dataclasses.replace(server.record, state="up")
    state.save(old)
    old = state.known("m")
    one = attempt(wanted(home, "exit 3"), [], old)
    with pytest.raises(UserError) as error:
        Local().replace(one)
    Local().give_up(one, error.value)
    assert state.known("m") == old
    assert alive(old)
    Local().replace(attempt(wanted(home), [], old)).wait("ready")
    assert not alive(old)
    assert state.known("m").pid != old.pid
    Local().give_up(attempt(wanted(home), [], old), KeyboardInterrupt())
    left = state.known("m")
    assert (left.state, left.pid) == ("down", None)


def test_the_log_is_read_over_its_rotation(home: Path) -> None:
    asked = wanted(home)
    log = state.folder("m") / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.with_name("up.log.1").write_text("1\n2\n3\n")
    log.write_text("4\n5\n")
    for lines, text in (
        (None, "1\n2\n3\n4\n5\n"),
        (1, "5\n"),
        (2, "4\n5\n"),
        (4, "2\n3\n4\n5\n"),
        (9, "1\n2\n3\n4\n5\n"),
        (0, ""),
    ):
        assert "".join(Local().logs(asked, follow=False, lines=lines)) == text
    following = Local().logs(asked, follow=True, lines=1)
    assert [next(following)] == ["5\n"]
    log.write_text("6\n")  # what was there has gone to the older one
    assert next(following) == "6\n"


def test_a_run_that_is_at_work_is_attached_to_and_its_log_is_heard_from_the_beginning(home: Path) -> None:
    run = (
        EVENT % ("train", "start", "")
        + "echo '{}' > \"$MISTRALCTL_NODE_DIR/run/m/status.json\"; sleep 1; "
        + EVENT % ("publish", "end", "")
    )
    first = Local().start(attempt(wanted(home, run=run), []))
    lines: list[str] = []
    one = dataclasses.replace(attempt(first.record, [], state.known("m")), on_line=lines.append)
    while not (first.record.run_dir / "status.json").exists():
        assert alive(first.record)
    attached = Local().attach(one)
    assert attached is not None
    attached.wait("publish", seconds=60)
    assert [event.phase for event in attached.events] == ["weights", "train", "publish"]
    assert any("publish" in line for line in lines)
    first.wait("publish")


def test_a_set_up_that_was_left_alone_is_no_run(home: Path) -> None:
    first = Local().start(attempt(wanted(home), []))
    (first.record.run_dir / "status.json").unlink(missing_ok=True)
    assert Local().attach(attempt(first.record, [], state.known("m"))) is None
    assert Local().attach(attempt(first.record, [])) is None


def test_a_file_goes_to_the_nodes_folder_as_a_file(home: Path) -> None:
    (home / "chats.jsonl").write_text("one\n", "utf-8")
    target = home / "node" / "run" / "m" / "data" / "chats.jsonl"
    record = wanted(home)
    record.task["file_mounts"][str(target)] = str(home / "chats.jsonl")
    Local().start(attempt(record, []))
    assert target.read_text("utf-8") == "one\n"
