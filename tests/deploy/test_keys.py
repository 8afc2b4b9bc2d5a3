"""`mistralctl keys`, on a node of this machine whose file of keys is read by the guard's own reader; and the keys that `up` makes or is given."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistral_contract import files
from mistral_contract import keys as contract
from mistral_node.callers import Callers
from mistralctl import checkpoints, documents, key_places, keys, output, plan, readiness, state
from mistralctl.commands import keys as command
from mistralctl.commands import plan as plan_command
from mistralctl.commands.down import DownResult
from mistralctl.commands.keys import Wanted
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.machine import Machine
from mistralctl.runtime import ssh
from mistralctl.runtime.local import Local
from mistralctl.state import Record

NAME = "served"
KEYS_FILE = "keys/keys.json"
GOOD = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A deployment that is up on this machine, as `up` leaves it."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "laptop"))
    found = Record(NAME, "local", "up", "m", "m", 8000, str(tmp_path / "node"), "id", 0.0)
    state.save(found)
    keys.prepare(NAME, None, running=False)
    contract.write(found.run_dir / KEYS_FILE, keys.known(NAME))
    (found.run_dir / "shared").mkdir()
    return found


@pytest.fixture(autouse=True)
def callers(record: Record) -> Iterator[Callers]:
    """What the guard of its server knows, looked at as often as there."""
    found = Callers(record.run_dir / KEYS_FILE, record.run_dir / "shared" / files.USAGE.name)
    found.save()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            found.look()
            found.save()

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    over.set()
    thread.join()


def own() -> str:
    return state.api_key(NAME)


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def let_in(callers: Callers, secret: str) -> bool:
    key = callers.find(secret.encode())
    return key is not None and not key.expired(time.time())


def test_a_key_is_let_in_within_a_second_and_is_nowhere_on_this_laptop(record: Record, callers: Callers, tmp_path: Path) -> None:
    began = time.monotonic()
    made = command.add(NAME, Wanted(name="ci", requests_per_minute=60, tokens_per_day=1000, expires="30d"))
    assert time.monotonic() - began < 60
    assert (made.action, made.key_name, made.effective, made.key_file) == ("added", "ci", "now", "")
    assert made.key.startswith("mctl-")
    assert let_in(callers, made.key)
    assert let_in(callers, own())
    assert made.expires is not None
    assert 29.9 * 86400 < made.expires - time.time() <= 30 * 86400
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and made.key in path.read_text("utf-8", "replace")]
    assert [
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file() and own() in path.read_text()
    ] == [f"laptop/deployments/{NAME}/api_key"]
    for path in (state.folder(NAME) / "api_key", keys.file(NAME)):
        assert path.stat().st_mode & 0o777 == 0o600
    assert keys.known(NAME) == contract.read((record.run_dir / KEYS_FILE).read_text())
    text = output.key_change_text(made)
    assert text.splitlines()[-1] == made.key
    assert "in force now, until 20" in text


def test_a_revoked_key_is_shut_out(callers: Callers) -> None:
    made = command.add(NAME, Wanted(name="ci"))
    other = command.add(NAME, Wanted())
    done = command.revoke(NAME, "ci")
    assert (done.action, done.id, done.key, done.effective) == ("revoked", made.id, "", "now")
    assert [let_in(callers, secret) for secret in (made.key, other.key, own())] == [False, True, True]
    assert command.revoke(NAME, other.id).key_name == other.key_name


def test_what_cannot_be_revoked_is_named() -> None:
    for _ in range(2):
        command.add(NAME, Wanted(name="twice"))
    for wanted, words, code in (
        ("nobody", f"{NAME}: there is no key 'nobody'; mistralctl keys {NAME} list shows them", Exit.NOT_FOUND),
        ("twice", f"{NAME}: 2 keys are named twice; give an id; mistralctl keys {NAME} list shows them", Exit.CONFLICT),
        ("own", f"own is this laptop's own key; run mistralctl keys {NAME} rotate, or mistralctl down {NAME}", Exit.CONFLICT),
    ):
        with pytest.raises(UserError) as caught:
            command.revoke(NAME, wanted)
        assert (str(caught.value), caught.value.code) == (words, code)


def test_this_laptops_key_is_rotated_without_a_moment_without_one(
    record: Record, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = own(), []
    put = Local.exchange

    def exchange(self: Local, record: Record, text: str, old: str) -> bool:
        done = put(self, record, text, old)
        until(lambda: callers._serial >= contract.read(text).serial)
        seen.append((own() == before, let_in(callers, own())))
        return done

    monkeypatch.setattr(Local, "exchange", exchange)
    done = command.rotate(NAME, "", None, "10m")
    assert seen == [(True, True), (False, True)]  # the new one in, then this laptop asks with it, then the old one's end
    assert (done.key, done.key_file, done.key_name) == ("", str(state.folder(NAME) / "api_key"), "own")
    assert let_in(callers, before)
    [old, new] = keys.known(NAME).keys
    assert new.sha256 == contract.digest(own())
    assert (new.name, new.expires, old.id) == ("own", None, done.old_id)
    assert old.expires == done.old_expires
    assert 590 < (done.old_expires or 0) - time.time() <= 600
    contract.write(record.run_dir / KEYS_FILE, keys.known(NAME).changed([replace(old, expires=1.0), new]))
    until(lambda: not let_in(callers, before))
    assert let_in(callers, own())
    command.add(NAME, Wanted(name="next"))
    assert [key.name for key in keys.known(NAME).keys] == ["own", "next"]  # the expired one is gone
    assert command.revoke(NAME, "next").effective == "now"


def test_another_key_is_rotated_with_its_limits(callers: Callers, tmp_path: Path) -> None:
    made = command.add(NAME, Wanted(name="ci", tokens_per_minute=5, expires="1h"))
    done = command.rotate(NAME, "ci", None, "2h")
    assert let_in(callers, done.key)
    assert (done.expires, done.old_expires) == (made.expires, made.expires)  # never longer than it would have been
    assert [key.tokens_per_minute for key in keys.known(NAME).keys] == [None, 5, 5]
    (tmp_path / "mine").write_text(f"{GOOD}\n")
    brought = command.rotate(NAME, done.id, tmp_path / "mine", "1m")
    assert (brought.key, let_in(callers, GOOD)) == ("", True)
    with pytest.raises(UserError, match="has this key already"):
        command.rotate(NAME, "", tmp_path / "mine", "1m")
    with pytest.raises(UserError, match="--grace: never would keep the old key"):
        command.rotate(NAME, "", None, "never")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("hunter2", "this key has 36 bits by its length and alphabet; its hash may be read by others, so it needs at least 128 bits; make one"),
        ("a" * 60, "this key has only 1 different characters"), ("two words " * 9, "a key is one word of visible ASCII characters"),
        ("", "a key is one word"), (b"\xff\xfe", "is no text"), (None, "No such file or directory; make one with: openssl rand -hex 32 > FILE"),
    ],
)  # fmt: skip
def test_a_key_that_could_be_guessed_is_refused_with_the_reason(content: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"^--key-file: {path}: {problem}") as caught:
        command.add(NAME, Wanted(key_file=path))
    assert caught.value.code == Exit.USAGE
    assert not content or len(content) < 5 or str(content) not in str(caught.value)


def test_the_list_has_limits_and_counts(record: Record, callers: Callers) -> None:
    made = command.add(NAME, Wanted(name="ci", requests_at_once=2))
    account = callers.account(callers.find(made.key.encode()))  # type: ignore[arg-type]
    assert account is not None
    account.begin(time.time())
    account.end(time.time(), 12)
    account.refused += 3
    callers.save()
    found = command.run(NAME)
    assert found.live
    assert [(row.name, row.own, row.requests, row.tokens, row.refused, row.requests_at_once) for row in found.keys] == [
        ("own", True, 0, 0, 0, None), ("ci", False, 1, 12, 3, 2),
    ]  # fmt: skip
    assert json.loads(documents.as_json(found))["keys"][1] == asdict(found.keys[1])
    lines = output.keys_text(found).splitlines()
    assert lines[0].split()[:4] == ["ID", "NAME", "CREATED", "EXPIRES"]
    assert lines[2].split()[:2] == [made.id, "ci"]
    assert lines[2].split()[-3:] == ["1", "12", "3"]
    assert lines[-1] == "*: this laptop's own"


def test_of_a_deployment_that_is_down_the_keys_of_the_next_up_are_changed(record: Record, callers: Callers) -> None:
    state.save(replace(record, state="down"))
    made = command.add(NAME, Wanted(name="later"))
    assert made.effective == "with the next up"
    assert not let_in(callers, made.key)
    assert contract.digest(made.key) in keys.sent(NAME)
    found = command.run(NAME)
    assert (found.live, [row.requests for row in found.keys]) == (False, [None, None])
    assert output.keys_text(found).splitlines()[-1] == f"{NAME} is not up; these are the keys of its next up"


def test_a_server_that_does_not_hear_and_a_node_without_keys_are_named(
    record: Record, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_places, "HEARD_SECONDS", 0.3)
    monkeypatch.setattr(callers, "look", lambda: None)
    with pytest.raises(UserError, match="the keys are on its node, but its server has not read them") as caught:
        command.add(NAME, Wanted())
    assert caught.value.code == Exit.SERVER
    file = record.run_dir / KEYS_FILE
    file.write_text("{")
    with pytest.raises(UserError, match=r"keys.json of its node is no JSON .*; run mistralctl up .* --cloud local again"):
        command.run(NAME)
    file.unlink()
    with pytest.raises(UserError, match=r"its node has no file of keys; run mistralctl up .* --cloud local again"):
        command.run(NAME)


def test_too_many_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "MOST_KEYS", 2)
    command.add(NAME, Wanted())
    with pytest.raises(UserError, match="has 3 keys, and 2 are the most; revoke some"):
        command.add(NAME, Wanted())


def test_on_a_cloud_the_file_goes_over_standard_input(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(replace(record, cloud="aws", cluster="mctl-served"))
    scripts: list[tuple[str, str]] = []

    def run(name: str, script: str, *, given: str = "", seconds: float = 60) -> str:
        scripts.append((script, given))
        return on_the_node(script, given, record)

    monkeypatch.setattr(ssh, "run", run)
    made = command.add(NAME, Wanted(name="ci"))
    [(script, given)] = [one for one in scripts if one[1]]
    assert "keys.json" in script
    assert contract.digest(made.key) in given
    assert not [one for one in scripts if made.key in "".join(one)]


def on_the_node(script: str, given: str, record: Record) -> str:
    """What a script prints there: in a real shell, whose home folder is the node's."""
    home = Path(record.node_dir).parent
    with contextlib.suppress(FileExistsError):
        (home / ".mistralctl").symlink_to(record.node_dir)
    done = subprocess.run(
        ["bash", "-c", script],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": str(home), "PATH": os.defpath},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(params=["local", "aws", "object"])
def place(request: pytest.FixtureRequest, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> key_places.Place:
    """Every place in which two laptops can change keys."""
    if request.param == "object":
        return key_places.Bucket(NAME, f"file://{tmp_path}/bucket/keys.json", up=True)
    monkeypatch.setattr(ssh, "run", lambda name, script, given="", seconds=0: on_the_node(script, given, record))
    return key_places.Node(replace(record, cloud=request.param))


def test_whoever_was_quicker_is_not_lost_and_the_other_tries_again(
    place: key_places.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_places.changed(place, NAME, lambda found: found)
    quicker, read = keys.entry(GOOD, "quicker"), type(place).read
    reads = []

    def late(self: key_places.Place) -> key_places.Held:
        held = read(self)
        reads.append(held)
        if len(reads) == 1:
            assert place.replace(read(place), held.keys.changed([*held.keys.keys, quicker]))
        return held

    monkeypatch.setattr(type(place), "read", late)
    mine = keys.entry(GOOD[::-1], "mine")
    after = key_places.changed(place, NAME, lambda found: found.changed([*found.keys, mine]))
    assert len(reads) == 2
    assert [key.name for key in after.keys] == ["own", "quicker", "mine"]
    assert read(place).keys == after == keys.known(NAME)


def test_of_changes_at_the_same_moment_none_is_lost(place: key_places.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    key_places.changed(place, NAME, lambda found: found)
    monkeypatch.setattr(keys, "save", lambda name, found: None)  # two laptops have a file each

    def add(who: int) -> None:
        for number in range(4):
            key = keys.entry(f"{who}{number}{GOOD}", f"{who}-{number}")
            key_places.changed(place, NAME, lambda found, key=key: found.changed([*found.keys, key]))  # type: ignore[misc]

    with ThreadPoolExecutor(2) as laptops:
        list(laptops.map(add, range(2)))
    assert sorted(key.name for key in place.read().keys.keys) == sorted(
        ["own", *(f"{who}-{n}" for who in range(2) for n in range(4))]
    )


def test_who_is_never_quick_enough_is_told(place: key_places.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_places, "TRIES", 2)
    monkeypatch.setattr(type(place), "replace", lambda self, before, after: False)
    with pytest.raises(UserError, match=f"{NAME}: others change its keys again and again; try again") as caught:
        key_places.changed(place, NAME, lambda found: found.changed(found.keys))
    assert caught.value.code == Exit.CONFLICT


@pytest.fixture
def bucket(record: Record, tmp_path: Path) -> Path:
    """The object that holds the keys of the deployment, in which this laptop's own lies by now."""
    file = tmp_path / "bucket" / "keys.json"
    state.save(replace(record, task={"envs": {"MISTRALCTL_KEYS_URI": f"file://{file}"}}))
    key_places.join(NAME, f"file://{file}")
    return file


def test_keys_in_a_bucket_are_changed_there_and_not_on_the_node(
    record: Record, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_node = (record.run_dir / KEYS_FILE).read_text()
    made = command.add(NAME, Wanted(name="ci"))
    assert (made.effective, output.key_change_text(made).splitlines()[0].partition(", ")[2]) == (
        "within 5 seconds", "in force within 5 seconds",
    )  # fmt: skip
    assert [key.name for key in contract.read(bucket.read_text()).keys] == ["own", "ci"]
    assert (record.run_dir / KEYS_FILE).read_text() == on_node
    assert command.revoke(NAME, "ci").effective == "within 5 seconds"
    asked: list[str] = []

    def answers(record: Record, key: str = "") -> bool:
        asked.append(key)
        return len(asked) == 2  # after a while

    monkeypatch.setattr(readiness, "answers", answers)
    before = own()
    command.rotate(NAME, "", None, "10m")
    assert asked == [own(), own()]
    assert own() != before
    assert [key.expires is None for key in contract.read(bucket.read_text()).keys] == [False, True]
    found = command.run(NAME)
    assert [(row.name, row.own) for row in found.keys] == [("own", False), ("own", True)]


def test_a_rotation_that_the_server_does_not_hear_of_leaves_this_laptop_its_key(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_places, "HEARD_SECONDS", 0.1)
    monkeypatch.setattr(readiness, "answers", lambda record, key="": False)
    before = own()
    with pytest.raises(UserError, match="but its server does not let it in; the old one stays this laptop's own") as caught:
        command.rotate(NAME, "", None, "10m")
    assert (caught.value.code, own()) == (Exit.SERVER, before)
    assert all(key.expires is None for key in contract.read(bucket.read_text()).keys)


def test_up_joins_what_others_wrote_and_down_takes_its_own_key_out_again(
    record: Record, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = keys.entry(GOOD, "others")
    contract.write(bucket, contract.Keys(7, (others,)))
    for _ in range(2):
        key_places.join(NAME, f"file://{bucket}")
    there = contract.read(bucket.read_text())
    assert [key.name for key in there.keys] == ["others", "own"]
    assert there.serial > 7
    assert keys.known(NAME) == there  # so the task carries these
    assert key_places.leave(state.known(NAME)) == ""
    assert contract.read(bucket.read_text()).keys == (others,)
    assert key_places.leave(state.known(NAME)) == ""
    keys.prepare(NAME, None, running=False)
    key_places.join(NAME, f"file://{bucket}")
    bucket.write_text("{")
    for call in (
        lambda: command.run(NAME),
        lambda: command.add(NAME, Wanted()),
        lambda: key_places.join(NAME, f"file://{bucket}"),
    ):
        with pytest.raises(UserError, match=rf"^--keys-uri: file://{bucket} is no JSON .*; correct it, or delete it$"):
            call()
    assert bucket.read_text() == "{"  # nothing is written over what cannot be read
    left = key_places.leave(state.known(NAME))
    assert left.startswith(f"its key {contract.digest(own())[:12]} is still let in by file://{bucket}: ")
    assert output.down_text([DownResult(NAME, "up", left=left)]) == f"{NAME} is down; {left}"
    bucket.unlink()
    assert key_places.leave(state.known(NAME)) == ""
    monkeypatch.setattr(Local, "read", lambda *_: (_ for _ in ()).throw(UserError("no way")))
    key_places.join(NAME, f"file://{bucket}")
    found = command.run(NAME)
    assert (found.live, found.keys[0].requests) == (False, None)
    assert output.keys_text(found).splitlines()[-1] == f"{NAME} cannot be asked what was counted: no way"


def test_up_makes_a_key_once_and_takes_one_that_is_brought(record: Record, tmp_path: Path) -> None:
    before = keys.known(NAME)
    keys.prepare(NAME, None, running=True)
    assert keys.known(NAME) == before
    (tmp_path / "mine").write_text(GOOD)
    with pytest.raises(
        UserError, match=f"--key-file: {NAME} is up with another key; run mistralctl keys {NAME} rotate --key-file"
    ):
        keys.prepare(NAME, tmp_path / "mine", running=True)
    assert (own() != GOOD, keys.known(NAME)) == (True, before)
    keys.prepare(NAME, tmp_path / "mine", running=False)
    assert own() == GOOD
    assert [key.sha256 for key in keys.known(NAME).keys] == [contract.digest(GOOD)]
    keys.prepare(NAME, tmp_path / "mine", running=True)  # the same again
    state.forget(NAME)
    assert not keys.file(NAME).exists()


def test_a_deployment_that_was_down_gets_another_key(record: Record) -> None:
    """Its last life's may be known to whoever took its port since; what replaces a server keeps the key."""
    first, others = own(), command.add(NAME, Wanted("ci"))
    keys.prepare(NAME, None, running=True)
    assert own() == first
    state.save(replace(record, state="down"))
    keys.prepare(NAME, None, running=False)
    second = own()
    assert second != first
    assert [key.sha256 for key in keys.known(NAME).keys if key.name != "ci"] == [contract.digest(second)]
    assert others.id in [key.id for key in keys.known(NAME).keys]
    state.save(replace(record, state="down"))
    command.rotate(NAME, "", None, "1m")  # for the next life
    third = own()
    keys.prepare(NAME, None, running=False)
    assert own() == third != second


def test_the_task_has_hashes_and_a_changed_key_is_no_other_server() -> None:
    sourced = load({"model": "smollm2-135m-instruct", "name": NAME, "cloud": ["local"], "port": 8123}, {}, None)
    made = plan.make(sourced, checkpoints.resolve(sourced), Machine(24 << 30, 2))
    before = plan_command.render_plan(made)
    assert contract.read(before["envs"]["MISTRALCTL_KEYS"]) == keys.known(NAME)
    assert own() not in json.dumps(before)
    assert before["envs"]["MISTRALCTL_SECRETS"] == "[]"
    command.add(NAME, Wanted())
    after = plan_command.render_plan(made, secrets=["hf_token", "figures"])
    assert after["envs"]["MISTRALCTL_KEYS"] != before["envs"]["MISTRALCTL_KEYS"]
    assert after["envs"]["MISTRALCTL_SERVING_ID"] == before["envs"]["MISTRALCTL_SERVING_ID"]
    assert after["envs"]["MISTRALCTL_SECRETS"] == '["hf_token"]'  # figures are never waited for
    public = load({"model": "smollm2-135m-instruct", "cloud": ["aws"], "public": True}, {}, None)
    open_one = plan.make(public, checkpoints.resolve(public), None)
    assert plan_command.render_plan(open_one)["envs"]["MISTRALCTL_SECRETS"] == '["address"]'


def test_a_dry_run_makes_no_key(mistralctl: Run, home: Path) -> None:
    done = mistralctl("up", "smollm2-135m-instruct", "--cloud", "aws", "--dry-run")
    assert "MISTRALCTL_KEYS: ''\n" in done.stdout
    assert not list(home.iterdir())


def test_the_command_line(mistralctl: Run, record: Record, tmp_path: Path) -> None:
    state.save(replace(record, state="down"))
    given = {"MISTRALCTL_HOME": str(tmp_path / "laptop")}
    done = mistralctl("keys", NAME, "add", "--name", "ci", "--requests-per-minute", "5", "-o", "json", **given)
    made = json.loads(done.stdout)
    assert (made["action"], made["key_name"], made["effective"]) == ("added", "ci", "with the next up")
    listed = json.loads(mistralctl("keys", NAME, "list", "-o", "json", **given).stdout)
    assert [(row["name"], row["requests_per_minute"]) for row in listed["keys"]] == [("own", None), ("ci", 5)]
    assert made["key"] not in json.dumps(listed)
    assert mistralctl("keys", NAME, "rotate", **given).stdout.splitlines()[0].startswith("rotated own (")
    assert mistralctl("keys", NAME, "revoke", "ci", **given).returncode == 0
    for words, line in (
        (("keys", "nobody", "list"), "mistralctl: there is no deployment 'nobody'; mistralctl status lists what there is"),
        (("keys", NAME, "add", "--expires", "soon"), "mistralctl: --expires: 'soon' is not a duration"),
        (("keys", NAME, "add", "--name", "a b"), "mistralctl: key: name should match"),
        (
            ("keys", NAME, "add", "--requests-per-minute", "0"),
            "mistralctl: Invalid value for '--requests-per-minute': ",
        ),
    ):
        done = mistralctl(*words, **given)
        assert done.returncode in (2, 4)
        assert done.stderr.startswith(line)
        assert done.stderr.count("\n") == 1


def test_a_key_file_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match="one word of visible ASCII characters"):
        keys.brought(Path("/dev/zero"))
