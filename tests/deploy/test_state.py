"""Records: one that is damaged, of a newer version or another user's stops no other, and nothing in it is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistralctl import own_files, processes, state
from mistralctl.errors import Exit, UserError
from mistralctl.runtime import leftovers
from mistralctl.state import Record, Unreadable

SLEEP = "print('there', flush=True); import time; time.sleep(100)"


def record(name: str = "good", **changes: Any) -> Record:
    one = Record(name, "local", "down", "mistral-7b-v0-1", name, 8123, "/node", "s", 1.0, task={"envs": {}, "resources": {}})
    return dataclasses.replace(one, **changes)


@pytest.fixture
def ours(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of the command line's tests, with a record that is good."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(home / ".mistralctl"))
    state.save(record())
    return home / ".mistralctl"


def test_a_hint_repeats_where_it_was(ours: Path) -> None:
    assert record().again == state.again("good") == "mistralctl up mistral-7b-v0-1 --name good --cloud local"
    state.save(record(command="mistralctl up ./a --cloud gcp"))
    assert state.again("good") == "mistralctl up ./a --cloud gcp"
    assert state.again("unheard-of") == "mistralctl up"


def test_no_hint_of_what_was_up_leaves_its_cloud_out() -> None:
    """A plain `mistralctl up` in a hint would rent a machine for what was up on this one."""
    sources = Path(state.__file__).parent.rglob("*.py")
    plain = re.compile(r"(run|again:|give it more.*) mistralctl up(?! with --ttl never)")
    assert not [
        f"{path.name}: {line.strip()}" for path in sources for line in path.read_text("utf-8").splitlines() if plain.search(line)
    ]


def changed(**changes: Any) -> Callable[[Path], None]:
    """Write a record that differs in these fields."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(record("bad")) | changes))

    return write


def half(path: Path) -> None:
    changed()(path)
    os.truncate(path, path.stat().st_size // 2)


def deep(path: Path) -> None:
    path.write_text('{"task": ' + "[" * 100_000 + "]" * 100_000 + "}")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "is damaged (Expecting value"),
    "half written": (half, "is damaged ("),
    "no object": (lambda path: path.write_text("[]"), "is damaged (it is no object)"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe{"), "is damaged (it is no text)"),
    "deep": (deep, "is damaged ("),
    "a folder": (lambda path: path.mkdir(), "is no file"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "is a link to nothing"),
    "a pipe": (os.mkfifo, "is no file"),
    "a field is missing": (lambda path: path.write_text('{"name": "bad"}'), "is damaged (cloud: Field required)"),
    "a list for a text": (changed(model=["x"]), "is damaged (model: Input should be a valid string)"),
    "a text for a number": (changed(port="8000"), "is damaged (port: Input should be a valid integer)"),
    "no number": (changed(price=float("nan")), "is damaged (NaN is no JSON)"),
    "a port that is none": (changed(port=-1), "is damaged (port: it is none)"),
    "a huge process id": (changed(pid=10**30), "is damaged (pid: "),
    "envs that are none": (changed(task={"envs": [], "resources": {}}), "is damaged (task.envs: should be an object of texts)"),
    "a life of no minutes": (
        changed(task={"envs": {"MISTRALCTL_TTL_MINUTES": "²"}}),
        "is damaged (task.envs: should hold minutes",
    ),
    "a budget of no amount": (
        changed(task={"envs": {"MISTRALCTL_BUDGET": "inf", "MISTRALCTL_PRICE": "0"}}),
        "is damaged (task.envs: should",
    ),
    "phases that are none": (changed(phases=[{"phase": 1}]), "is damaged (phases: should be names with seconds)"),
    "another's name": (changed(name="good"), "is damaged (it is of 'good')"),
    "another's machine": (changed(cluster="production"), "is damaged (cluster: it is none of this deployment's)"),
    "an unknown state": (changed(state="flying"), "is damaged (state: Input should be 'starting', 'up' or 'down')"),
    "a newer schema": (changed(schema=99), "was made by a newer version of mistralctl (schema 99, this one knows 1)"),
    "an unknown cloud": (changed(cloud="moon"), "the cloud 'moon' is not known to this version"),
    "an unknown kind": (changed(kind="dream"), "the kind 'dream' is not known to this version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_cannot_be_read_is_named_and_stops_no_other(ours: Path, damage: str) -> None:
    make, says = DAMAGES[damage]
    path = state.folder("bad") / "record.json"
    path.parent.mkdir()
    make(path)
    records, unreadable = state.every()
    assert [one.name for one in records] == ["good"]
    assert list(unreadable) == ["bad"]
    assert says in str(unreadable["bad"])
    assert "\n" not in str(unreadable["bad"])
    with pytest.raises(Unreadable) as error:
        state.known("bad")
    assert error.value.code == Exit.CONFLICT


def test_status_and_down_go_on_and_say_so(ours: Path, mistralctl: Run) -> None:
    """On this machine; with half a record `down` takes away what the name tells, and keeps the rest beside it."""
    for name, text in (("half", '{"name": "half", "cloud": "local", "sta'), ("new", '{"schema": 2}')):
        (state.folder(name)).mkdir()
        (state.folder(name) / "record.json").write_text(text)
    (ours / "deployments" / "odd name").mkdir()
    (ours / "deployments" / "odd name" / "record.json").write_text("{}")
    done = mistralctl("status")
    assert done.returncode == Exit.CONFLICT
    rows = [line.split()[:2] for line in done.stdout.splitlines()[1:5]]
    assert rows == [["good", "down"], ["half", "damaged"], ["new", "newer"], ["odd", "name"]]
    assert len(done.stderr.splitlines()) == 1
    items = json.loads(mistralctl("status", "-o", "json").stdout)["items"]
    assert {one["name"]: one["state"] for one in items} == {
        "good": "down",
        "half": "damaged",
        "new": "newer",
        "odd name": "damaged",
    }
    done = mistralctl("down", "--all")
    assert done.returncode == Exit.CONFLICT
    assert done.stdout.splitlines()[0] == "good was down already"
    assert done.stdout.splitlines()[1] == "half is down; its damaged record is kept as record.damaged"
    assert "has no deployment's name" in done.stderr
    assert "newer version" in done.stderr
    assert (state.folder("half") / "record.damaged").read_text() == '{"name": "half", "cloud": "local", "sta'
    assert state.known("half").state == "down"
    assert (state.folder("new") / "record.json").read_text() == '{"schema": 2}'
    assert mistralctl("status", "good").returncode == 0
    assert mistralctl("status", "../deployments/good").returncode == Exit.NOT_FOUND


@pytest.mark.linux
def test_the_server_of_a_damaged_record_is_ended(ours: Path, mistralctl: Run) -> None:
    environ = os.environ | {"MISTRALCTL_NAME": "bad", "MISTRALCTL_NODE_DIR": str(ours / "node")}
    server = subprocess.Popen([sys.executable, "-c", SLEEP], env=environ, start_new_session=True, stdout=subprocess.PIPE)
    try:
        state.folder("bad").mkdir()
        (state.folder("bad") / "record.json").write_text('{"name": "bad", "cloud": "local", "state": "up"')
        (ours / "node" / "run" / "bad").mkdir(parents=True)
        done = mistralctl("down", "bad")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "bad is down; its damaged record is kept as record.damaged\n"
        assert server.wait(300) is not None
        assert not (ours / "node" / "run" / "bad").exists()
    finally:
        server.kill()
        server.communicate()


def test_what_a_newer_version_wrote_is_kept(ours: Path) -> None:
    path = state.folder("good") / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue", "task": {"envs": {"X": "1"}, "size": 3}}))
    state.save(dataclasses.replace(state.known("good"), state="starting"))
    written = json.loads(path.read_text())
    assert (written["colour"], written["state"], written["task"], written["schema"]) == (
        "blue", "starting", {"envs": {"X": "1"}, "size": 3}, 1,
    )  # fmt: skip
    assert "more" not in written
    old = {key: value for key, value in written.items() if key not in ("schema", "failure", "pid_mark", "colour")}
    path.write_text(json.dumps(old))  # of an older version
    assert state.known("good") == record(state="starting", task={"envs": {"X": "1"}, "size": 3})


def test_a_record_is_on_the_disk_before_anything_goes_on(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync

    def sync(handle: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{handle}"))  # noqa: PTH112
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    state.save(record())
    assert synced == [False, True] if sys.platform == "linux" else len(synced) == 2


def test_who_comes_second_is_told_who_holds_it(ours: Path, mistralctl: Run) -> None:
    with state.locked("good", "up"):
        done = mistralctl("keys", "good", "add")
    assert done.returncode == Exit.CONFLICT
    assert done.stderr.startswith(
        f"mistralctl: good is being brought up or down already, by mistralctl up (process {os.getpid()}, since "
    )
    assert len(done.stderr.splitlines()) == 1
    assert mistralctl("keys", "good", "add").returncode == 0


@pytest.mark.parametrize("content", [b"", b"two words", b"mctl-x\nX-Other: header", b"\xff"])
def test_a_file_without_a_key_is_named(ours: Path, mistralctl: Run, content: bytes) -> None:
    state.save(record(state="up"))
    (state.folder("good") / "api_key").write_bytes(content)
    done = mistralctl("env", "good")
    assert (done.returncode, done.stdout) == (Exit.CONFLICT, "")
    assert done.stderr.startswith(f"mistralctl: {state.folder('good')}/api_key is damaged (")
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_record_is_set_aside_as_often_as_need_be(ours: Path) -> None:
    path = state.folder("good") / "record.json"
    for _ in range(2):
        path.unlink(missing_ok=True)
        path.mkdir()
        assert state.set_aside("good").is_dir()
        path.write_text("{")
        assert state.set_aside("good").read_text() == "{"
    assert len(list(path.parent.glob("record.damaged*"))) == 4


FOREIGN = 12345


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
@pytest.mark.parametrize(
    "file", ["", "deployments", "deployments/good", "deployments/good/record.json", "deployments/good/api_key"]
)
def test_what_another_user_owns_is_refused(ours: Path, mistralctl: Run, file: str) -> None:
    state.save(record(state="up"))
    state.api_key("good")
    os.chown(ours / file, FOREIGN, FOREIGN)
    done = mistralctl("env", "good")
    assert done.stdout == ""
    assert f"{ours / file if file else ours} belongs to another user (uid {FOREIGN})" in done.stderr
    assert "chown" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode in (Exit.MACHINE, Exit.CONFLICT)


@pytest.mark.parametrize(("file", "mode"), [("", 0o777), ("deployments", 0o757), ("deployments/good/record.json", 0o620),
                                            ("deployments/good/api_key", 0o666)])  # fmt: skip
def test_what_others_may_write_is_refused(ours: Path, mistralctl: Run, file: str, mode: int) -> None:
    state.save(record(state="up"))
    state.api_key("good")
    (ours / file).chmod(mode)
    done = mistralctl("env", "good")
    assert done.stdout == ""
    assert (
        f"can be written by other users (mode {mode:04o}), so its content is not trusted; run: chmod go-w {ours / file}"
        in done.stderr
    )


@pytest.mark.parametrize("file", ["deployments", "deployments/good/api_key", "node/envs/e", "node/weights/w/model.safetensors"])
def test_doctor_names_what_others_may_write(ours: Path, mistralctl: Run, file: str) -> None:
    state.api_key("good")
    for one in ("node/envs/e/bin", "node/weights/w"):
        (ours / one).mkdir(parents=True)
    (ours / "node/weights/w/model.safetensors").touch()

    def check() -> dict[str, Any]:
        checks = json.loads(mistralctl("doctor", "-o", "json").stdout)["checks"]
        return next(one for one in checks if one["name"] == "files of one's own")

    if file == "deployments":
        assert check()["ok"]
    (ours / file).chmod(0o777)
    found = check()
    assert not found["ok"]
    assert f"{ours / file} can be written by other users (mode 0777)" in found["found"]
    assert found["mend"].endswith(f"chmod -R go-w {ours}")


def test_a_folder_that_others_may_write_above_the_home_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open" / "home").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match=rf"^{tmp_path}/open can be written by other users \(mode 0777\)"):
        own_files.require(tmp_path / "open" / "home" / "file")
    (tmp_path / "open").chmod(0o1777)  # as /tmp
    own_files.require(tmp_path / "open" / "home" / "file")
    made = own_files.folder(tmp_path / "a" / "b")
    assert [oct(one.stat().st_mode)[-3:] for one in (made, made.parent)] == ["700", "700"]


def test_twenty_deployments_of_two_homes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty processes write and read at the same time; each finds its own."""
    script = (
        "import dataclasses, json, sys; from mistralctl import state; from mistralctl.state import Record\n"
        "one = Record(sys.argv[1], 'local', 'down', 'm', 'm', 8000, '/node', sys.argv[2], 1.0)\n"
        "for number in range(20):\n"
        "    state.save(dataclasses.replace(one, created_at=float(number))); state.every()\n"
    )
    begun = [
        subprocess.Popen([sys.executable, "-c", script, f"n{number % 4}", str(number)], stderr=subprocess.PIPE,
                         env=os.environ | {"MISTRALCTL_HOME": str(tmp_path / f"home{number % 2}")})
        for number in range(8)
    ]  # fmt: skip
    assert [one.communicate()[1] for one in begun] == [b""] * 8
    for number in range(2):
        monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / f"home{number}"))
        for name in range(20):
            state.save(record(f"d{name}"))
        records, unreadable = state.every()
        assert (len(records), unreadable) == (22, {})
        assert processes.servers(records[0]) == []


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("gone/x"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("file", ["lock", "lock.by"])
def test_a_strange_lock_holds_nobody_up(ours: Path, mistralctl: Run, file: str, strange: str) -> None:
    STRANGE[strange](state.folder("good") / file)
    done = mistralctl("keys", "good", "add")
    assert done.returncode in (0, Exit.CONFLICT)
    if done.returncode:
        assert f"{state.folder('good')}/lock cannot be locked (" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("strange", STRANGE)
def test_down_removes_whatever_is_in_the_place_of_a_nodes_folder(ours: Path, mistralctl: Run, strange: str) -> None:
    node = ours / "node"
    state.save(record(node_dir=str(node)))
    (node / "run").mkdir(parents=True)
    STRANGE[strange](node / "run" / "good")
    assert mistralctl("down", "good").returncode == 0
    assert not os.path.lexists(node / "run" / "good")


@pytest.mark.parametrize("strange", STRANGE)
def test_a_log_is_begun_as_a_file_of_ones_own(tmp_path: Path, strange: str) -> None:
    log = tmp_path / "up.log"
    STRANGE[strange](log)
    own_files.begin_log(log)
    assert (log.is_symlink(), log.read_bytes(), log.stat().st_mode & 0o777) == (False, b"", 0o600)
    log.write_text("a line")
    own_files.begin_log(log)
    assert log.read_bytes() == b""


@pytest.mark.parametrize("place", ["deployments", "deployments/good"])
def test_a_file_in_the_place_of_a_folder_is_named(ours: Path, mistralctl: Run, place: str) -> None:
    shutil.rmtree(ours / place)
    (ours / place).touch()
    with pytest.raises(UserError, match=rf"^{ours / place} is no folder; remove it$"):
        own_files.folder(state.folder("good"))
    done = mistralctl("up", "smollm2-135m-instruct", "--cloud", "local", "--name", "good", "--dry-run")
    assert "free some space" not in done.stderr


def test_of_a_record_without_end_the_beginning_is_read(ours: Path) -> None:
    path = state.folder("good") / "record.json"
    with path.open("a") as file:
        file.truncate(1 << 40)
    assert own_files.head(path, 9) == b'{\n "name"'
    assert leftovers._said("good", "cloud") == "local"
    with pytest.raises(Unreadable, match="is larger than 64 MiB"):
        state.read("good")


def test_the_last_lines_of_a_log_without_an_end_are_those_of_its_end(ours: Path, mistralctl: Run) -> None:
    log = state.folder("good") / "up.log"
    log.write_text("first\n" * 100_000)
    assert mistralctl("logs", "good", "-n", "3").stdout == "first\n" * 3
    with log.open("ab") as file:
        file.truncate(1 << 40)
        file.seek(0, 2)
        file.write(b"\nlast\n")
    assert mistralctl("logs", "good", "-n", "1").stdout == "last\n"
