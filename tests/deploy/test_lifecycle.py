"""What `up` and `down` decide for every pair of what is there and what is wanted; and that the steps are run, and taken back."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mistralctl import apply, gate, package_dir, readiness, state, tasks
from mistralctl.commands import connect, env, extend
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Do, Observed, Step, decide, remembered, take_down
from mistralctl.phases import PhaseEvent
from mistralctl.runtime import protocol, sky
from mistralctl.runtime.local import Local
from mistralctl.runtime.protocol import Attempt
from mistralctl.runtime.rented import Rented
from mistralctl.state import Record
from mistralctl.tasks import Task, resources_id, serving_name, setup_id

PACKAGE = package_dir("model").parent / "deploy" / "mistralctl"


def made(serving: str = "a", resources: str = "r1", weights: str = "w", **more: Any) -> Task:
    """A task for a cloud with only what is decided by: what serves, what machine, what set-up."""
    envs = dict.fromkeys(
        ("NODE_DIR", "ENV_ID", "REVISION", "WEIGHTS_ID", "LORA", "LORA_VERSIONS", "ALLOW", "TTL_MINUTES"), ""
    ) | {"NAME": "m", "SERVING_ID": serving, "WEIGHTS": weights}  # fmt: skip
    place = {"infra": "aws/us-east-1", "accelerators": "L4:1", "labels": {"mistralctl-resources": resources}}
    return {"name": "m", "resources": place | more, "envs": {f"MISTRALCTL_{key}": value for key, value in envs.items()}}


def here(serving: str = "a") -> Task:
    return made(serving) | {"resources": {}}


WANTED, HERE = made(), here()


def record(task: Task = WANTED, **changes: Any) -> Record:
    """A deployment that is up with a task."""
    rented = bool(task["resources"])
    given: dict[str, Any] = {"state": "up", "cloud": "aws" if rented else "local", "setup_id": setup_id(task)} | changes
    if rented:
        given |= {"cluster": "mctl-m", "machine": "g6.xlarge", "region": "us-east-1"}
        given["resources_id"] = resources_id(task)
    serving = task["envs"]["MISTRALCTL_SERVING_ID"]
    return Record("m", given.pop("cloud"), given.pop("state"), "m", "m", 8000, "~/.mistralctl", serving, 1.0, task=task, **given)


def job(task: Task = WANTED) -> dict[str, int]:
    return {serving_name(task): 7}


OPEN = [Do.CONNECT, Do.WALK]
OPEN_HERE = [Do.WALK]
OTHER_SERVER, OTHER_SET_UP, OTHER_MACHINE = made("b"), made("b", weights="other"), made("b", resources="r2")
NEW = Observed()
IDLE = Observed("up", {}, beside=True)
# what is wanted, what the record says, what is there, the steps
UP: dict[str, tuple[Task, Record | None, Observed, list[Do]]] = {
    "nothing is there": (WANTED, None, NEW, [Do.CHECK, Do.RENT, *OPEN]),
    "it was taken down": (WANTED, record(state="down"), NEW, [Do.CHECK, Do.RENT, *OPEN]),
    "the same task answers": (WANTED, record(), Observed("up", answers=True), [Do.KEEP]),
    "the same task runs, its tunnel is gone": (WANTED, record(), Observed("up", job()), [Do.CHECK, Do.ADOPT, *OPEN]),
    "an up that was killed left its engine starting": (
        WANTED, record(state="starting"), Observed("up", job()), [Do.CHECK, Do.ADOPT, *OPEN],
    ),
    "another server is wanted on the same machine": (
        OTHER_SERVER, record(), Observed("up", job()), [Do.CHECK, Do.REPLACE, *OPEN],
    ),
    "other weights are wanted on the same machine": (
        OTHER_SET_UP, record(), Observed("up", job()), [Do.CHECK, Do.STOP, Do.SET_UP, *OPEN],
    ),
    "another machine is wanted": (
        OTHER_MACHINE, record(), Observed("up", job()), [Do.CHECK, Do.END_MACHINE, Do.RENT, *OPEN],
    ),
    "another machine is wanted, and a launch was interrupted": (
        OTHER_MACHINE, record(state="starting", request="r"), Observed("half made", interrupted=True),
        [Do.CHECK, Do.END_MACHINE, Do.RENT, *OPEN],
    ),
    "its server has died": (WANTED, record(), Observed("up", {}), [Do.CHECK, Do.START, *OPEN]),
    "its server has died, other weights are wanted": (OTHER_SET_UP, record(), Observed("up", {}), [Do.CHECK, Do.SET_UP, *OPEN]),
    "its machine's set-up was not seen through": (
        WANTED, record(state="starting", setup_id=""), Observed("up", {}), [Do.CHECK, Do.SET_UP, *OPEN],
    ),
    "SkyPilot's runtime on the machine does not work": (WANTED, record(), Observed("up"), [Do.CHECK, Do.SET_UP, *OPEN]),
    "its machine is stopped": (WANTED, record(), Observed("stopped"), [Do.CHECK, Do.SET_UP, *OPEN]),
    "its machine is half made": (WANTED, record(state="starting"), Observed("half made"), [Do.CHECK, Do.SET_UP, *OPEN]),
    "its spot machine was taken": (WANTED, record(spot=True), NEW, [Do.CHECK, Do.RENT, *OPEN]),
    "its spot machine was taken, which stopped it": (WANTED, record(spot=True), Observed("stopped"), [Do.CHECK, Do.SET_UP, *OPEN]),
    "idle or its lifetime took the machine": (WANTED, record(), NEW, [Do.CHECK, Do.RENT, *OPEN]),
    "a launch was interrupted": (
        WANTED, record(state="starting", request="r"), Observed("half made", interrupted=True), [Do.CANCEL, Do.LOOK],
    ),
    "the record was lost, SkyPilot knows the machine": (WANTED, None, Observed("up", job(OTHER_SERVER)), [Do.CHECK, Do.STOP, Do.SET_UP, *OPEN]),
    "it is up on a cloud and wanted here": (HERE, record(), IDLE, [Do.REFUSE]),
    "it is up here and wanted on a cloud": (WANTED, record(HERE), NEW, [Do.REFUSE]),
    "it was taken down here and is wanted on a cloud": (WANTED, record(HERE, state="down"), NEW, [Do.CHECK, Do.RENT, *OPEN]),
    "public": (made(ports=[8000]), None, NEW, [Do.CHECK, Do.RENT, *OPEN]),
    "here: nothing is there": (HERE, None, IDLE, [Do.CHECK, Do.SET_UP, *OPEN_HERE]),
    "here: it was taken down": (HERE, record(HERE, state="down"), IDLE, [Do.CHECK, Do.SET_UP, *OPEN_HERE]),
    "here: the same task answers": (HERE, record(HERE), Observed("up", {"": 7}, answers=True, beside=True), [Do.KEEP]),
    "here: the same task does not answer": (
        HERE, record(HERE), Observed("up", {"": 7}, beside=True), [Do.CHECK, Do.REPLACE, *OPEN_HERE],
    ),
    "here: another server is wanted": (
        here("b"), record(HERE), Observed("up", {"": 7}, answers=True, beside=True), [Do.CHECK, Do.REPLACE, *OPEN_HERE],
    ),
    "here: its process is gone": (HERE, record(HERE), IDLE, [Do.CHECK, Do.SET_UP, *OPEN_HERE]),
    "here: an up was killed": (
        HERE, record(HERE, state="starting"), Observed("up", {"": 7}, interrupted=True, beside=True), [Do.CANCEL, Do.LOOK],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UP)
def test_up(case: str) -> None:
    task, old, observed, expected = UP[case]
    steps = decide(old, task, observed)
    assert [step.do for step in steps] == expected
    assert all(step.text and "\n" not in step.text for step in steps)
    assert [step.do for step in steps if step.ask] == [one for one in expected if one is Do.END_MACHINE]


DOWN: dict[str, tuple[Record, Observed, list[Do]]] = {
    "up": (record(), Observed("up"), [Do.END_MACHINE, Do.SWEEP, Do.FORGET]),
    "half made": (record(state="starting"), Observed(), [Do.END_MACHINE, Do.SWEEP, Do.FORGET]),
    "its machine is gone": (record(), Observed(), [Do.END_MACHINE, Do.SWEEP, Do.FORGET]),
    "down already": (record(state="down"), Observed(), [Do.FORGET]),
    "down, and SkyPilot knows a machine": (record(state="down"), Observed("up"), [Do.END_MACHINE, Do.SWEEP, Do.FORGET]),
    "here: up": (record(HERE), Observed("up", {"": 7}, beside=True), [Do.STOP, Do.FORGET]),
    "here: its process is gone": (record(HERE), IDLE, [Do.FORGET]),
    "here: down already": (record(HERE, state="down"), IDLE, [Do.FORGET]),
}


@pytest.mark.parametrize("case", DOWN)
def test_down(case: str) -> None:
    old, observed, expected = DOWN[case]
    assert [step.do for step in take_down(old, observed)] == expected


PIN, OTHER_PIN = (f"sha256:{digit * 64}" for digit in "ab")


def pinned(task: Task, digest: str) -> Task:
    return task | {"envs": task["envs"] | {"MISTRALCTL_WEIGHTS_DIGEST": digest}}


@pytest.mark.parametrize(
    ("wanted", "kept", "steps"),
    [
        (PIN, PIN, [Do.KEEP]),
        ("", PIN, [Do.KEEP]),
        (OTHER_PIN, PIN, [Do.CHECK, Do.STOP, Do.SET_UP, *OPEN]),
        (PIN, "", [Do.CHECK, Do.STOP, Do.SET_UP, *OPEN]),
    ],
)
def test_a_server_of_other_weights_than_those_that_are_pinned_is_set_up_again(wanted: str, kept: str, steps: list[Do]) -> None:
    old, task = record(weights_digest=kept), pinned(WANTED, wanted)
    assert [step.do for step in decide(old, task, Observed("up", job(), answers=True))] == steps


def test_what_the_steps_say() -> None:
    assert [step.text for step in decide(None, WANTED, NEW)] == [
        "ask whether the quotas allow it and the weights may be read", "rent a machine (aws/us-east-1 L4:1), set it up, start its server",
        "open the tunnel to it", "wait until its node has walked every route and opened, and walk them again from here",
    ]  # fmt: skip
    [_, gone, *_] = decide(record(), OTHER_MACHINE, Observed("up", job()))
    assert gone == Step(
        Do.END_MACHINE, "end g6.xlarge in us-east-1, with what is on its disk",
        "m: what was changed needs another machine; g6.xlarge in us-east-1 and what is on its disk go away",
    )  # fmt: skip
    [refused] = decide(record(), HERE, IDLE)
    assert refused.text == "m runs on aws; run mistralctl down m, or give another --name"
    [refused] = decide(record(HERE), WANTED, NEW)
    assert refused.text == "m runs on this machine; run mistralctl down m, or give another --name"


@pytest.mark.parametrize(
    ("old", "task", "expected"),
    [
        (None, WANTED, [Do.CHECK, Do.RENT, *OPEN]),
        (record(), WANTED, [Do.KEEP]),
        (record(), OTHER_SERVER, [Do.CHECK, Do.REPLACE, *OPEN]),
        (record(state="starting"), WANTED, [Do.CHECK, Do.SET_UP, *OPEN]),
        (record(state="starting", request="r"), WANTED, [Do.CANCEL, Do.LOOK]),
        (None, HERE, [Do.CHECK, Do.SET_UP, *OPEN_HERE]),
        (record(HERE), HERE, [Do.KEEP]),
        (record(HERE), here("b"), [Do.CHECK, Do.REPLACE, *OPEN_HERE]),
    ],
)
def test_a_dry_run_goes_by_the_record_alone(old: Record | None, task: Task, expected: list[Do]) -> None:
    assert [step.do for step in decide(old, task, remembered(old, task))] == expected


class FakeServer:
    def __init__(self, record: Record, fake: Fake) -> None:
        self.record, self._fake = record, fake
        self.events: list[PhaseEvent] = []

    def wait(self, phase: str, seconds: float | None = None) -> None:
        self._fake.note(f"wait {phase}")

    def close(self) -> None:
        self._fake.note("close")


class Fake:
    """A runtime that notes what it was told and fails at one call with one error."""

    rents = True
    packages: tuple[str, ...] = ()

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.fails, self.error = fails, error
        self.calls: list[str] = []

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails and self.error is not None:
            raise self.error

    def cluster(self, name: str) -> str:
        return f"fake-{name}"

    def observe(self, record: Record | None, wanted: Record | None) -> Observed:
        return NEW

    def check(self, attempt: Attempt) -> None:
        self.note("check")

    def start(self, attempt: Attempt) -> FakeServer:
        attempt.keep(dataclasses.replace(attempt.record, request="r"))
        self.note("start")
        return FakeServer(attempt.record, self)

    def attach(self, attempt: Attempt) -> FakeServer | None:
        return None

    def replace(self, attempt: Attempt) -> FakeServer:
        self.note("replace")
        return FakeServer(attempt.record, self)

    def connect(self, attempt: Attempt, server: protocol.Server) -> Record:
        self.note("connect")
        return dataclasses.replace(server.record, pid=7)

    def reconnect(self, record: Record) -> Record:
        return record

    def cancel(self, record: Record) -> Record:
        self.note("cancel")
        return dataclasses.replace(record, request="")

    def stop(self, record: Record) -> None:
        self.note("stop")

    def remove(self, record: Record) -> bool:
        self.note("remove")
        return True

    def sweep(self, record: Record, *, promised: bool) -> None:
        self.note(f"sweep {promised}")

    def forget(self, record: Record) -> Record:
        self.note("forget")
        return dataclasses.replace(record, state="down")

    def give_up(self, attempt: Attempt, error: BaseException) -> None:
        self.note("give up")

    def logs(self, record: Record, *, follow: bool, lines: int | None) -> Iterator[str]:
        yield ""

    def read(self, record: Record, file: str) -> str:
        return ""

    def write(self, record: Record, file: str, text: str) -> None:
        pass

    def exchange(self, record: Record, text: str, old: str) -> bool:
        return True

    def extend(self, record: Record, until: float) -> None:
        pass


@pytest.fixture(autouse=True)
def walked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A gate that finds nothing open, and says that it was there."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    monkeypatch.setattr(gate, "pass_through", lambda record, hear: (dataclasses.replace(record, gate={"routes": 1}), "Paris"))


def run(fake: Fake, old: Record | None = None, task: Task = WANTED, observed: Observed = NEW) -> apply.Up:
    wanted = dataclasses.replace(record(task), state="starting", setup_id="")
    attempt = Attempt(wanted, {}, observed, lambda event: None, state.save, 0.0, old)
    up = apply.Up(fake, attempt, lambda steps: fake.note("quotas"))
    up.run(decide(old, task, observed))
    return up


def test_a_new_machine_ends_up() -> None:
    fake = Fake()
    up = run(fake)
    assert fake.calls == ["check", "quotas", "start", "connect", "wait ready", "close"]
    left = state.known("m")
    assert (left.state, up.record.state, up.answer) == ("up", "up", "Paris")
    assert (left.state, left.pid, left.setup_id, left.request) == ("up", 7, setup_id(WANTED), "")
    assert left.gate["routes"] == 1


def test_a_machine_that_goes_is_noted_as_gone_before_the_next_is_rented() -> None:
    fake = Fake("start", UserError("no", Exit.CLOUD))
    state.save(record())
    with pytest.raises(UserError, match="no"):
        run(fake, record(), OTHER_MACHINE, Observed("up", job()))
    assert fake.calls == ["check", "quotas", "remove", "forget", "start", "give up"]


def test_what_an_interrupted_launch_left_is_ended_and_looked_at_again() -> None:
    old = record(state="starting", request="r")
    fake = Fake()
    run(fake, old, observed=Observed("half made", interrupted=True))
    assert fake.calls == ["cancel"]
    assert (state.known("m").state, state.known("m").request) == ("starting", "")


FAILURES: dict[str, tuple[BaseException, list[str], str | None]] = {
    "check": (UserError("full", Exit.MACHINE), ["check"], None),
    "quotas": (UserError("no quota", Exit.CLOUD), ["check", "quotas"], None),
    "start": (UserError("refused", Exit.CLOUD), ["check", "quotas", "start", "give up"], "starting"),
    "connect": (UserError("no way", Exit.NETWORK), ["check", "quotas", "start", "connect", "give up", "close"], "starting"),
    "wait ready": (
        UserError("died", Exit.SERVER), ["check", "quotas", "start", "connect", "wait ready", "give up", "close"], "starting",
    ),
}  # fmt: skip


@pytest.mark.parametrize("step", FAILURES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_whatever_step_fails_is_taken_back_and_the_record_says_how_far_it_came(step: str, interrupted: bool) -> None:
    error, calls, left = FAILURES[step]
    fake = Fake(step, KeyboardInterrupt() if interrupted else error)
    with pytest.raises(type(fake.error or error)):
        run(fake)
    assert fake.calls == calls
    found = state.read("m")
    assert (found and found.state) == left


@pytest.mark.parametrize(("code", "stopped"), [(Exit.SERVER, True), (Exit.NETWORK, False)])
def test_a_server_that_does_not_pass_the_gate_is_stopped(monkeypatch: pytest.MonkeyPatch, code: Exit, stopped: bool) -> None:
    def wrong(*_: object) -> None:
        raise UserError("open", code)

    monkeypatch.setattr(gate, "pass_through", wrong)
    fake = Fake()
    with pytest.raises(UserError, match="open"):
        run(fake)
    assert ("stop" in fake.calls, fake.calls[-2:]) == (stopped, ["give up", "close"])
    assert state.known("m").state == "starting"


@pytest.mark.parametrize(
    ("task", "observed", "call"),
    [
        (WANTED, Observed("up", {}), "replace"),
        (WANTED, Observed("up", job()), "replace"),
        (OTHER_SERVER, Observed("up", job()), "replace"),
        (OTHER_SET_UP, Observed("up", job()), "start"),
        (WANTED, Observed("stopped"), "start"),
    ],
)
def test_a_machine_that_is_there_is_used(task: Task, observed: Observed, call: str) -> None:
    fake = Fake()
    run(fake, record(), task, observed)
    assert call in fake.calls
    assert ("stop" in fake.calls) == (task is OTHER_SET_UP)
    assert state.known("m").state == "up"


def test_down_runs_its_steps() -> None:
    fake = Fake()
    assert apply.down(take_down(record(), Observed("up")), fake, record())
    assert fake.calls == ["remove", "sweep True", "forget"]
    assert state.known("m").state == "down"
    fake = Fake("sweep True", UserError("still lists", Exit.CLOUD))
    state.save(record())
    with pytest.raises(UserError, match="still lists"):
        apply.down(take_down(record(), Observed("up")), fake, record())
    assert state.known("m").state == "up"  # so that the next `down` goes on


@pytest.mark.parametrize("implementation", [Local, Rented, Fake])
def test_every_runtime_has_the_protocol(implementation: type) -> None:
    wanted = {name: member for name, member in vars(protocol.Runtime).items() if inspect.isfunction(member) and name[0] != "_"}
    for name, member in wanted.items():
        given = inspect.signature(getattr(implementation, name)).parameters
        assert list(given)[: len(inspect.signature(member).parameters)] == list(inspect.signature(member).parameters), name


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield str(path.relative_to(PACKAGE)), node


def test_no_function_has_more_than_five_arguments() -> None:
    """But the commands of cli*.py, which have one for each option."""
    for file, one in functions():
        if file.startswith("cli") and one.decorator_list:
            continue
        given = [
            arg.arg for arg in (*one.args.posonlyargs, *one.args.args, *one.args.kwonlyargs) if arg.arg not in ("self", "cls")
        ]
        assert len(given) <= 5, f"{file}: {one.name} has {len(given)} arguments"


def test_decide_is_pure() -> None:
    tree = ast.parse((PACKAGE / "lifecycle.py").read_text("utf-8"))
    at_once = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in at_once} == {
        "__future__",
        "collections.abc",
        "dataclasses",
        "enum",
        "typing",
        "mistralctl.tasks",
    }


def test_only_the_runtimes_the_plan_and_its_table_know_which_is_this_machine() -> None:
    """Whoever else asks, asks the runtime of a record, or the plan."""
    allowed = {
        "clouds/__init__.py",
        "plan.py",
        "training.py",
        "rights.py",
        "output.py",
        "commands/plan.py",
        "runtime/__init__.py",
    }
    known = set()
    for path in PACKAGE.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        known |= {str(path.relative_to(PACKAGE))} if "LOCAL" in names else set()
    assert known <= allowed


def test_where_the_server_answers_no_cloud_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "answers", lambda record: True)
    asked: list[str] = []

    def clusters(names: list[str], refresh: bool) -> dict[str, sky.Cluster]:
        asked.extend(names)
        return {}

    monkeypatch.setattr(sky, "clusters", clusters)
    wanted = dataclasses.replace(record(), state="starting")
    assert decide(record(), WANTED, Rented().observe(record(), wanted))[0].do is Do.KEEP
    assert asked == []
    moved = dataclasses.replace(wanted, port=8001)  # what was up at 8000 does not answer for 8001
    assert decide(record(), WANTED, Rented().observe(record(), moved))[1].do is Do.RENT
    assert asked == ["mctl-m"]
    assert Rented().observe(record(state="starting", request="r"), wanted).interrupted
    assert asked == ["mctl-m"]  # an interrupted launch is ended first


def test_a_kind_of_task_is_a_file_and_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package_dir("task_templates")
    assert {path.stem for path in folder.glob("*.yaml")} == {*tasks.kinds()} == {"serve", "mirror", "finetune"}
    (tmp_path / "bake.py").write_text('from mistralctl.tasks import Kind\nKIND = Kind("bake", "a baking job", serves=False)\n')
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    assert tasks.kinds()["bake"] == tasks.kind("bake")
    state.save(record(kind="bake"))
    for ask in (lambda: env.run("m"), lambda: connect.run("m"), lambda: extend.run("m", "1h")):
        with pytest.raises(
            UserError, match=r"^m is a baking job, so there is no endpoint to ask; mistralctl status m says how far it is$"
        ):
            ask()


def test_an_old_record_is_a_servers() -> None:
    state.save(record())
    file = state.folder("m") / "record.json"
    old = json.loads(file.read_text())
    del old["kind"]
    file.write_text(json.dumps(old))
    assert state.known("m").kind == "serve"


def _mypy_checks_that_the_fake_has_the_protocol(fake: Fake) -> protocol.Runtime:
    return fake


def test_a_name_keeps_the_digest_of_its_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mistralctl import config
    from mistralctl.commands import plan as plan_command

    monkeypatch.setenv("MISTRALCTL_HOME", str(home / ".mistralctl"))
    sourced = config.load({"model": "mistral-7b-instruct-v0.1", "cloud": ["aws"], "name": "m"}, {}, None)
    first = plan_command.render(sourced)
    assert first["envs"]["MISTRALCTL_WEIGHTS_DIGEST"] == ""
    state.save(dataclasses.replace(record(first), weights_digest=PIN, state="down"))
    again = plan_command.render(sourced)
    assert again["envs"]["MISTRALCTL_WEIGHTS_DIGEST"] == PIN
    assert again["envs"]["MISTRALCTL_SERVING_ID"] == first["envs"]["MISTRALCTL_SERVING_ID"]
    anew = config.load(
        {"model": "mistral-7b-instruct-v0.1", "cloud": ["aws"], "name": "m", "weights_digest": OTHER_PIN}, {}, None
    )
    assert plan_command.render(anew)["envs"]["MISTRALCTL_WEIGHTS_DIGEST"] == OTHER_PIN
    elsewhere = config.load({"model": "mistral-7b-instruct-v0.1", "cloud": ["aws"], "name": "m", "weights": "s3://b/x"}, {}, None)
    assert plan_command.render(elsewhere)["envs"]["MISTRALCTL_WEIGHTS_DIGEST"] == ""
