"""`finetune` on the laptop: its task against golden files, the chats before anything is rented, and what is gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from mistral_contract import envs
from mistral_contract.envs import Finetune
from mistralctl import lifecycle, package_dir, reported, state, tasks, training
from mistralctl.commands import finetune as command
from mistralctl.commands.finetune import Planned, Step, Talk
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Observed
from mistralctl.machine import Machine
from mistralctl.phases import PhaseEvent
from mistralctl.runtime.protocol import Attempt
from mistralctl.state import Record
from mistralctl.tasks import finetune
from mistralctl.training import Tokens
from test_training import SEVEN, TINY, plan, sourced

Run = Callable[..., CompletedProcess[str]]
GOLDEN = Path(__file__).parent / "golden"
FEW = Tokens(884, 46, 20, 20, 142, "test")
CASES: dict[str, dict[str, Any]] = {
    "finetune-aws": {},
    "finetune-gcp": {
        "out": "gs://bucket/adapter",
        "method": "qlora",
        "spot": True,
        "accelerators": "L4:1",
        "eval_data": "held-out.jsonl",
    },
    "finetune-azure": {"out": "az://account/container/adapter", "method": "full", "budget": "40", "name": "mine"},
    "finetune-cpu": {"model": TINY.name},
    "finetune-local": {"out": "/out", "cloud": "local", "merge": True, "rank": "8"},
}


def planned(name: str) -> training.Run:
    given = CASES[name]
    found = plan(TINY, FEW, Machine(24 << 30, 2), **given) if name in ("finetune-local", "finetune-cpu") else plan(**given)
    return replace(found, eval_data="/held-out.json" if given.get("eval_data") else "")


def rendered(name: str) -> tasks.Task:
    run = planned(name)
    node = finetune.Node("/home/me/.mistralctl/node", "3.11") if run.local else finetune.RENTED
    return finetune.render(run, owner="0123456789ab", node=node)


@pytest.mark.parametrize("name", CASES)
def test_rendered_run(name: str, request: pytest.FixtureRequest) -> None:
    task, run = rendered(name), planned(name)
    text = tasks.dump(task).replace(str(package_dir("model").parent), "PACKAGE")
    text = text.replace(tasks.environment_id(run.device, "3.11"), f"{run.device}-HASH-OF-REQUIREMENTS")
    text = text.replace(finetune.tune_environment_id(run.device, "3.11"), "tune-HASH-OF-REQUIREMENTS")
    file = GOLDEN / f"{name}.yaml"
    if request.config.getoption("--golden"):
        file.write_text(text, "utf-8")
    assert text == file.read_text("utf-8")
    assert yaml.safe_load(tasks.dump(task)) == task


@pytest.mark.parametrize("name", CASES)
def test_the_node_reads_what_the_laptop_writes(name: str) -> None:
    written = rendered(name)["envs"]
    read = envs.read(Finetune, written)
    assert {env.name: env.write(getattr(read, env.field)) for env in envs.of(Finetune) if env.field != "node_dir"} == {
        key: value for key, value in written.items() if key.startswith(envs.PREFIX) and key != envs.variable("node_dir")
    }


def test_only_data_is_set_on_the_template() -> None:
    template = yaml.safe_load((package_dir("task_templates") / "finetune.yaml").read_text("utf-8"))
    got = rendered("finetune-aws")
    assert got.keys() == template.keys()
    assert (got["setup"], got["run"]) == (template["setup"], template["run"])
    assert got["envs"].keys() == template["envs"].keys()


def test_machines_are_asked_for_in_the_order_of_what_the_run_costs() -> None:
    """SkyPilot takes the cheapest by the hour of `any_of`, and `ordered` as it stands."""
    resources, run = rendered("finetune-aws")["resources"], planned("finetune-aws")
    assert [one["accelerators"] for one in resources["ordered"]] == [option.label for option in run.options]
    assert lifecycle.places(rendered("finetune-aws"))[0] == f"aws {run.chosen.label}"


def test_another_run_has_another_id_and_the_same_one_the_same() -> None:
    ids = {finetune.run_id(planned(name)) for name in CASES}
    assert len(ids) == len(CASES)
    one = planned("finetune-aws")
    assert finetune.run_id(one) == finetune.run_id(planned("finetune-aws"))
    for change in (
        {"contents": "other"},
        {"learning_rate": 1e-3},
        {"batch_tokens": 64},
        {"spec": one.spec.model_copy(update={"rank": 8})},
    ):
        assert finetune.run_id(replace(one, **change)) != finetune.run_id(one)
    same = replace(one, spec=one.spec.model_copy(update={"ttl": "2d", "spot": True, "save": "1m"}))
    assert finetune.run_id(same) == finetune.run_id(one)


def test_no_secret_is_in_the_task_and_the_node_waits_for_the_hubs_token() -> None:
    task = finetune.render(replace(planned("finetune-aws"), secret=True), owner="x")
    assert task["envs"]["MISTRALCTL_SECRETS"] == '["hf_token"]'
    assert "hf_" not in tasks.dump(task).replace("hf_token", "")


GOOD = '{"messages": [{"role": "user", "content": "Hi %d"}, {"role": "assistant", "content": "Ho"}]}'


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{GOOD % number}\n" for number in range(20)), "utf-8")
    return path


def local(*more: str) -> tuple[str, ...]:
    return ("finetune", "smollm2-135m-instruct", "--cloud", "local", *more)


def test_a_dry_run_checks_counts_and_prints_a_task(mistralctl: Run, chats: Path, tmp_path: Path) -> None:
    done = mistralctl(*local("--data", str(chats), "--out", str(tmp_path / "out"), "--dry-run"))
    assert done.returncode == 0, done.stderr
    task = yaml.safe_load(done.stdout)
    assert task["envs"]["MISTRALCTL_DATA"] == "chats.jsonl"
    assert task["file_mounts"][f"{task['envs']['MISTRALCTL_NODE_DIR']}/run/{task['name']}/data/chats.jsonl"] == str(chats)
    assert "note: 20 chats, about " in done.stderr
    assert not (tmp_path / "out").exists()
    as_json = mistralctl(*local("--data", str(chats), "--out", str(tmp_path / "out"), "--dry-run", "-o", "json"))
    assert json.loads(as_json.stdout)["plan"][0].startswith("20 chats, about ")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{"], "chats.jsonl:1: "),
        ([GOOD % 1, '{"messages": [{"role": "user", "content": "Hi"}]}'], "chats.jsonl:2: "),
        ([GOOD % 1, GOOD % 1], "chats.jsonl:2: the row repeats line 1; take one of them out"),
    ],
)
def test_a_malformed_row_ends_it_with_its_line(mistralctl: Run, tmp_path: Path, lines: list[str], says: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    done = mistralctl(*local("--data", str(path), "--out", str(tmp_path / "out")))
    assert done.returncode == Exit.USAGE
    assert says in done.stderr
    assert not (tmp_path / "home" / ".mistralctl" / "deployments").exists()


def test_chats_that_are_learnt_cannot_measure(mistralctl: Run, chats: Path, tmp_path: Path) -> None:
    done = mistralctl(*local("--data", str(chats), "--eval-data", str(chats), "--out", str(tmp_path / "out"), "--dry-run"))
    assert done.returncode == Exit.USAGE
    assert "what is learnt cannot measure what was learnt" in done.stderr


def test_missing_chats_and_a_folder_that_holds_something_else(mistralctl: Run, chats: Path, tmp_path: Path) -> None:
    done = mistralctl(*local("--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")))
    assert (done.returncode, done.stderr.strip()) == (
        Exit.NOT_FOUND, f"mistralctl: --data: {tmp_path / 'none'} is not a file; name one with chats",
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", "utf-8")
    done = mistralctl(*local("--data", str(chats), "--out", str(tmp_path / "out")))
    assert done.returncode == Exit.CONFLICT
    assert f"--out: {tmp_path / 'out'} holds something else (mine.txt); name a new folder" in done.stderr


def test_a_bucket_that_the_machine_cannot_write_is_refused_before_anything_is_rented(mistralctl: Run, chats: Path) -> None:
    done = mistralctl("finetune", "smollm2-135m-instruct", "--cloud", "aws", "--data", str(chats), "--out", "gs://bucket/adapter")
    assert done.returncode == Exit.CLOUD
    assert "--out: gs://bucket/adapter from aws: needs" in done.stderr
    assert "CANNOT HAVE IT" in done.stderr


class FakeJob:
    """A job whose log says what it is given; `error` is raised where it is waited for."""

    def __init__(self, attempt: Attempt, error: BaseException | None = None) -> None:
        self.record, self.events, self.error = attempt.record, list[PhaseEvent](), error
        self._attempt, self.closed = attempt, False

    def wait(self, phase: str, seconds: float | None = None) -> None:
        self._attempt.on_line(
            '(x, pid=1) mistralctl-progress {"step": 3, "steps": 9, "loss": 1.5, "tokens_per_second": 40.0, "left_seconds": 60}'
        )
        self._attempt.on_line("mistralctl-progress {broken")
        if self.error is not None:
            raise self.error
        self.events += [PhaseEvent(phase, "start", 1.0), PhaseEvent(phase, "end", 3.5)]

    def close(self) -> None:
        self.closed = True


class FakePlace:
    """A runtime that notes what is asked of it; `works`: a job of this task runs there already."""

    rents = False
    packages: tuple[str, ...] = ()

    def __init__(self, *, works: bool = False, error: BaseException | None = None) -> None:
        self.works, self.error, self.calls = works, error, list[str]()
        self.job: FakeJob | None = None

    def cluster(self, name: str) -> str:
        return ""

    def observe(self, record: Record | None, wanted: Record | None) -> Observed:
        return Observed("up", {})

    def attach(self, attempt: Attempt) -> FakeJob | None:
        self.job = FakeJob(attempt, self.error) if self.works else None
        return self.job

    def check(self, attempt: Attempt) -> None:
        self.calls.append("check")

    def start(self, attempt: Attempt) -> FakeJob:
        self.calls.append("start")
        self.job = FakeJob(attempt, self.error)
        return self.job

    def stop(self, record: Record) -> None:
        self.calls.append("stop")

    def read(self, record: Record, file: str) -> str:
        return '{"steps": 9}'

    def forget(self, record: Record) -> Record:
        return replace(record, state="down")


@pytest.fixture
def talk() -> tuple[Talk, list[Any]]:
    said: list[Any] = []
    return Talk(lambda event: None, said.append, said.append), said


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[FakePlace], FakePlace]:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "home"))

    def use(fake: FakePlace) -> FakePlace:
        monkeypatch.setattr("mistralctl.runtime.of", lambda cloud: fake)
        return fake

    return use


def here(tmp_path: Path, **flags: Any) -> tuple[Any, Planned]:
    given = {"model": TINY.name, "cloud": "local", "out": str(tmp_path / "out"), "name": "mine", **flags}
    return sourced(**given), Planned(plan(TINY, FEW, Machine(24 << 30, 2), **given), "")


def test_a_run_is_started_told_of_and_taken_away(place: Any, talk: Any, tmp_path: Path) -> None:
    fake = place(FakePlace())
    done = command.run(*here(tmp_path), talk[0])
    assert fake.calls == ["check", "start"]
    assert talk[1] == [Step(3, 9, 1.5, 40.0, 60, None)]
    assert (done.action, done.loss, done.result, [one.seconds for one in done.phases]) == ("trained", 1.5, {"steps": 9}, [2.5])
    assert done.up == f"mistralctl up smollm2-135m-instruct --lora mine=file://{tmp_path}/out --cloud local"
    assert state.known("mine").state == "down"
    receipt = json.loads((state.folder("mine") / "receipt.json").read_text("utf-8"))
    assert (receipt["kind"], receipt["result"]) == ("finetune", {"steps": 9})
    assert receipt["down_at"] is not None
    assert fake.job
    assert fake.job.closed


def test_a_run_that_is_at_work_is_followed(place: Any, talk: Any, tmp_path: Path) -> None:
    place(FakePlace(error=KeyboardInterrupt()))
    with pytest.raises(
        UserError, match=r"the run may go on on this machine: the same command follows it, mistralctl status mine"
    ) as error:
        command.run(*here(tmp_path), talk[0])
    assert error.value.code == Exit.INTERRUPTED
    fake = place(FakePlace(works=True))
    command.run(*here(tmp_path), talk[0])
    assert fake.calls == []
    assert "mine is at work already; this command follows it" in talk[1]


def test_a_run_with_other_options_is_not_taken_for_the_one_at_work(place: Any, talk: Any, tmp_path: Path) -> None:
    place(FakePlace(error=KeyboardInterrupt()))
    with pytest.raises(UserError):
        command.run(*here(tmp_path), talk[0])
    place(FakePlace(works=True))
    with pytest.raises(UserError, match="mine is at work with other chats or options; run mistralctl down mine first") as error:
        command.run(*here(tmp_path, rank="8"), talk[0])
    assert error.value.code == Exit.CONFLICT


def test_after_a_failure_the_same_command_goes_on(place: Any, talk: Any, tmp_path: Path) -> None:
    place(FakePlace(error=UserError("the disk is full", Exit.SERVER)))
    with pytest.raises(UserError, match="the disk is full; the same command goes on from the last checkpoint"):
        command.run(*here(tmp_path), talk[0])
    assert state.known("mine").failure == "the disk is full"
    fake = place(FakePlace())
    assert command.run(*here(tmp_path), talk[0]).action == "trained"
    assert fake.calls == ["stop", "check", "start"]
    assert state.known("mine").failure == ""


@contextmanager
def sealed(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> Iterator[None]:
    from mistralctl import weights

    monkeypatch.setattr(
        weights, "sealed_revision", lambda uri: next((rev for end, rev in found.items() if uri.endswith(end)), None)
    )
    yield


def test_what_lies_at_out_decides(place: Any, talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(FakePlace())
    given = here(tmp_path)
    ours = finetune.run_id(given[1].run)
    with sealed(monkeypatch, {"/out": f"{ours}-0123"}):
        assert command.run(*given, talk[0]).action == "unchanged"
    with sealed(monkeypatch, {"/out": "someone-else"}), pytest.raises(UserError, match="holds another run's result") as error:
        command.run(*given, talk[0], restart=True)
    assert error.value.code == Exit.CONFLICT
    with sealed(monkeypatch, {"checkpoints/b": "other-0123-step-00000002"}):
        with pytest.raises(UserError, match="holds checkpoints of another run"):
            command.run(*given, talk[0])
        assert command.run(*given, talk[0], restart=True).action == "trained"
    with sealed(monkeypatch, {"checkpoints/a": f"{ours}-0123-step-00000002"}):
        assert command.run(*given, talk[0]).action == "trained"


def test_a_folder_that_cannot_be_written_is_refused_first(place: Any, talk: Any) -> None:
    fake = place(FakePlace())
    given = {"cloud": "local", "out": "/proc/nowhere", "name": "mine"}
    with pytest.raises(UserError, match=r"--out: file:///proc/nowhere cannot be written"):
        command.run(sourced(**given), Planned(plan(TINY, FEW, Machine(24 << 30, 2), **given), ""), talk[0])
    assert fake.calls == []


def test_a_bucket_that_this_machine_may_not_write_is_the_roles_and_one_that_is_not_there_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mistralctl import weights

    run, said = plan(), list[str]()
    monkeypatch.setattr(weights, "strangers", lambda uri, below: ())

    def refused(uri: str) -> None:
        raise UserError("AccessDenied", Exit.CLOUD)

    def nowhere(uri: str) -> None:
        raise UserError("there is no such bucket", Exit.NOT_FOUND)

    with sealed(monkeypatch, {}):
        monkeypatch.setattr(weights, "may_write", refused)
        assert command._checked(run, "--out", said.append, restart=False) is False
        assert said == [
            "--out: whether s3://bucket/adapter can be written is only seen on the machine, before it trains: AccessDenied"
        ]
        monkeypatch.setattr(weights, "may_write", nowhere)
        with pytest.raises(UserError, match="--out: s3://bucket/adapter cannot be written: there is no such bucket"):
            command._checked(run, "--out", said.append, restart=False)


def test_a_bucket_that_holds_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mistralctl import weights

    monkeypatch.setattr(weights, "strangers", lambda uri, below: ("thesis.txt",) if below == ("checkpoints",) else ())
    with (
        sealed(monkeypatch, {}),
        pytest.raises(UserError, match=r"s3://bucket/adapter holds something else \(thesis.txt\)") as error,
    ):
        command._checked(plan(), "--out", print, restart=True)
    assert error.value.code == Exit.CONFLICT


def test_a_result_without_the_merged_weights_that_are_wanted_now_is_gone_on_with(
    place: Any, talk: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    place(FakePlace())
    given = here(tmp_path, merge=True)
    ours = finetune.run_id(given[1].run)
    assert ours == finetune.run_id(here(tmp_path)[1].run)
    with sealed(monkeypatch, {"/out": f"{ours}-0123", "/out/merged": f"{ours}-0123"}):
        assert command.run(*given, talk[0]).action == "unchanged"
    with sealed(monkeypatch, {"/out": f"{ours}-0123"}):
        assert command.run(*given, talk[0]).action == "trained"


def test_sky_takes_the_template_of_a_base_that_is_named_by_the_hub() -> None:
    envs_ = rendered("finetune-aws")["envs"]
    assert (envs_["MISTRALCTL_BASE"], envs_["MISTRALCTL_BASE_REVISION"]) == (
        "mistralai/Mistral-7B-Instruct-v0.1", SEVEN.revision,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("said", "state_", "why"),
    [
        (
            {"state": "train", "progress": {"step": 3, "steps": 9, "loss": 1.5, "left_seconds": 120}},
            "running", "step 3 of 9, loss 1.5, 2 minutes left",
        ),
        ({"state": "train", "progress": {"step": 1, "steps": 9, "loss": 1.5, "left_seconds": None}}, "running", "step 1 of 9, loss 1.5"),
        ({"state": "train", "progress": {"step": "\x1b[2J", "steps": 9, "loss": 1.5}}, "running", "training"),
        ({"state": "prove"}, "running", "proof in vLLM"),
        ({"state": "failed", "error": {"message": "the disk is full"}}, "failed", "the disk is full; the same command goes on"),
    ],
)  # fmt: skip
def test_status_says_how_far_a_run_is(
    said: dict[str, Any], state_: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mistralctl import processes
    from mistralctl.commands import status

    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    monkeypatch.setattr(processes, "alive", lambda record: state_ == "running")
    record = Record(
        "mine",
        "local",
        "starting",
        TINY.name,
        "",
        0,
        str(tmp_path / "node"),
        "",
        0.0,
        task=rendered("finetune-local"),
        kind="finetune",
    )
    record.run_dir.mkdir(parents=True)
    (record.run_dir / "status.json").write_text(json.dumps(said), "utf-8")
    state.save(record)
    [one] = status.run("mine")
    assert (one.state, one.why, one.base_url) == (state_, why, None)


def test_what_a_node_says_of_a_result_is_taken_by_type() -> None:
    assert reported.training('{"steps": 9, "loss": {"last": 0.5}, "libraries": {"trl": "1", "x": 2}}') == {
        "steps": 9, "loss": {"last": 0.5}, "libraries": {"trl": "1", "x": None},
    }  # fmt: skip
    assert reported.training("[1]") == reported.training("{") == {}
    assert reported.training('{"loss": 3}') == {"loss": None}
