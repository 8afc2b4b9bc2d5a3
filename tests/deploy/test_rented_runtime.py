"""The runtime of rented machines, with SkyPilot, ssh and the job's log replaced: what is asked of whom, in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_contract.envs import variable
from mistralctl import readiness, state, sweep
from mistralctl.clouds import NotUsed
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Observed
from mistralctl.phases import PhaseEvent
from mistralctl.runtime import rented, sky, ssh
from mistralctl.runtime.protocol import Attempt
from mistralctl.runtime.rented import Rented
from mistralctl.state import Record
from test_lifecycle import job, record

PHASE = 'mistralctl-phase {"phase": "%s", "event": "%s", "at": 1.0, "message": "%s"}\n'


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was asked, as it came; a machine is there from the launch on."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    state.folder("m").mkdir(parents=True)
    found: list[str] = []

    def launch(task: Any, cluster: str, log: Path, on_line: Callable[[str], None], on_request: Callable[[str], None]) -> int:
        found.append("launch")
        on_request("r1")
        return 3

    def noted(name: str, answer: Any = None) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            words = [str(one) for one in given if isinstance(one, str | int)] + [
                f"{key}={value}" for key, value in options.items()
            ]
            found.append(" ".join([name, *words]))
            return answer

        return call

    class Following:
        def __init__(self, name: str, cluster: str, number: int, log: Path, on_line: Callable[[str], None]) -> None:
            found.append(f"follow {number}")
            on_line(PHASE % ("engine", "end", ""))

        def wait(self, seconds: float, until: Callable[[], bool], failed: Callable[[], bool]) -> bool:
            return until()

        def close(self) -> None:
            found.append("close")

    machine = sky.Cluster("mctl-m", "UP", "aws", "us-east-1", None, "g6.xlarge", False, 0.8, 1.0, None)
    monkeypatch.setattr(sky, "launch", launch)
    monkeypatch.setattr(sky, "clusters", lambda names, refresh: {"mctl-m": machine} if "launch" in found else {})
    for name in ("cancel_jobs", "cancel_request"):
        monkeypatch.setattr(sky, name, noted(name))
    monkeypatch.setattr(sky, "replace_job", noted("replace_job", 4))
    monkeypatch.setattr(ssh, "write_secrets", lambda name, secrets: found.append(f"secrets {' '.join(secrets)}"))
    monkeypatch.setattr(ssh, "start_tunnel", noted("tunnel", 77))
    monkeypatch.setattr(ssh, "end_tunnel", lambda name: found.append(f"end tunnel {name}"))
    monkeypatch.setattr(rented, "Following", Following)
    monkeypatch.setattr(rented, "keep_log", noted("keep_log"))
    monkeypatch.setattr(readiness, "reached", lambda record: True)
    monkeypatch.setattr(sweep, "label_others", lambda record: record)
    monkeypatch.setattr(sweep, "tell_cloud", lambda record, until, **_: found.append(f"label {record.region}"))
    return found


def attempt(observed: Observed, old: Record | None = None) -> Attempt:
    heard: list[PhaseEvent] = []
    wanted = dataclasses.replace(record(), state="starting", region="", machine="")
    return Attempt(wanted, {"api_key": "k"}, observed, heard.append, state.save, 0.0, old)


def test_a_new_machine_is_launched_and_learnt(calls: list[str]) -> None:
    one = attempt(Observed())
    server = Rented().start(one)
    assert calls == ["launch", "secrets api_key", "follow 3"]
    assert (server.record.region, server.record.machine, server.record.price) == ("us-east-1", "g6.xlarge", 0.8)
    assert (state.known("m").request, server.record.request, server.record.setup_id) == ("r1", "", "")
    connected = Rented().connect(one, server)
    assert calls[3:] == ["end tunnel m", "tunnel m"]
    assert (connected.pid, state.known("m").pid) == (77, 77)


def test_as_soon_as_there_is_a_machine_it_is_said_that_it_costs_and_what_ends_it(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {"setup_minutes": "60", "idle_minutes": "30", "ttl_minutes": "720", "budget": "5.0000"}
    said: list[str] = []
    one = attempt(Observed())
    one.record.task["envs"] |= {variable(name): value for name, value in ends.items()}
    Rented().start(dataclasses.replace(one, note=said.append))
    after = "a set-up of 1h, 30m without a request, 12h of life, 5.00 USD"
    assert said == [
        f"m has a machine in aws/us-east-1, 0.8 USD an hour, which costs until it ends: mistralctl down m, or by itself after {after}"
    ]
    with pytest.raises(UserError, match=f"mistralctl down m takes it away; by itself it ends after {after}$"):
        Rented().give_up(one, KeyboardInterrupt())


def test_a_machine_that_is_there_is_labelled_anew_and_keeps_what_its_last_server_said(calls: list[str]) -> None:
    state.folder("m").joinpath("serve.log").write_text("dead\n")
    Rented().start(attempt(Observed("up", {}, region="us-east-1")))
    assert calls == ["keep_log", "label us-east-1", "launch", "cancel_jobs mctl-m but=3", "secrets api_key", "follow 3"]
    assert state.folder("m").joinpath("serve.before.log").read_text() == "dead\n"
    calls.clear()
    Rented().replace(attempt(Observed("up", {"m-other": 9}, region="us-east-1")))
    assert calls == ["label us-east-1", "secrets api_key", "replace_job mctl-m", "follow 4"]
    calls.clear()
    Rented().replace(attempt(Observed("up", job(), region="us-east-1")))
    assert calls == ["secrets api_key", "follow 7"]


@pytest.mark.parametrize("way", ["start", "replace"])
def test_the_tunnel_to_the_last_server_ends_before_the_next_one_starts(calls: list[str], way: str) -> None:
    old = dataclasses.replace(record(), pid=55, pid_started=1.0)
    getattr(Rented(), way)(attempt(Observed("up", {"m-other": 9}, region="us-east-1"), old))
    assert calls[0] == "end tunnel m"


def test_why_a_job_failed_is_said_with_its_log(calls: list[str]) -> None:
    server = Rented().start(attempt(Observed()))
    server.wait("engine")
    server.progress.line(PHASE % ("check", "fail", "no memory"))
    with pytest.raises(
        UserError, match=r"^no memory \(log: .*serve\.log; the machine goes by itself in a few minutes, or "
    ) as error:
        server.wait("ready")
    assert error.value.code == Exit.SERVER


def test_an_interrupted_launch_is_cancelled(calls: list[str]) -> None:
    assert Rented().cancel(record(request="r1")).request == ""
    assert calls == ["cancel_request r1"]


def give_up(error: BaseException) -> None:
    one = attempt(Observed())
    state.save(one.record)
    Rented().give_up(one, error)


def test_after_a_refusal_the_clouds_that_were_asked_are_swept(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[Any] = []
    monkeypatch.setattr(sweep, "after_refusal", lambda record, clouds, since, refused: swept.append((clouds, since)))

    answers: list[UserError] = []

    def identity(cloud: str) -> str:
        if answers:
            raise answers[0]
        return "me"

    monkeypatch.setattr(rented, "identity", identity)
    give_up(UserError("its server ended", Exit.SERVER))
    assert swept == []
    give_up(UserError("no capacity", Exit.CLOUD))
    assert swept == [(["aws"], 0.0)]
    answers.append(NotUsed("no credentials", Exit.CLOUD))
    with pytest.raises(NotUsed, match="no credentials"):
        give_up(UserError("refused", Exit.CLOUD))
    assert (state.known("m").state, len(swept)) == ("down", 1)
    with pytest.raises(
        UserError,
        match=r"^interrupted; m may have a machine by now: mistralctl up m --name m --cloud aws goes on with it, mistralctl down m ",
    ):
        give_up(KeyboardInterrupt())


def test_down_goes_by_what_skypilot_knows(calls: list[str]) -> None:
    assert Rented().observe(record(state="down"), None) == Observed()
    Rented().start(attempt(Observed()))
    assert Rented().observe(record(state="down"), None) == Observed("up")


def test_a_job_that_runs_on_the_machine_is_attached_to(calls: list[str]) -> None:
    lines: list[str] = []
    one = dataclasses.replace(attempt(Observed("up", job())), on_line=lines.append)
    found = Rented().attach(one)
    assert found is not None
    found.wait("engine")
    assert "follow 7" in calls
    assert "launch" not in calls
    assert lines == [PHASE % ("engine", "end", "")]
    assert Rented().attach(attempt(Observed("up", {}))) is None
    assert Rented().attach(attempt(Observed("up", None))) is None
