"""`--budget` and `--ttl never`: what the plan says, what the task has, what the cloud's label and `status` say, and who is asked."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistral_contract.envs import variable
from mistralctl import plan, state, sweep, tasks
from mistralctl.clouds import Part
from mistralctl.commands import extend, status
from mistralctl.commands import plan as plan_command
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.output import plan_text
from mistralctl.plan import Plan
from mistralctl.state import Record
from test_lifecycle import record

L4 = {"model": "mistral-7b-instruct-v0.1", "cloud": ["aws"], "accelerators": "L4:1"}


def planned(**options: Any) -> Plan:
    sourced = load(L4 | options, {}, None)
    return plan_command.run(sourced)


def test_a_budget_buys_time_by_the_dearest_that_may_be_rented() -> None:
    got = planned(budget=5)
    assert (got.price, got.budget_minutes, got.life_minutes) == (0.8048, 372, 372)
    said = "budget 5.00 USD buys 6 h 12 m of machine at 0.8048 USD/h (the dearest of these; nothing dearer is rented), set-up included"
    assert got.bought == [f"{said}, less than --ttl 12h"]
    assert got.bought[0] in plan_text(got).splitlines()
    assert planned(budget=50).bought == ["budget 50.00 USD buys 62 h 7 m" + said.partition("6 h 12 m")[2]]
    both = planned(cloud=["aws", "gcp"], budget=5)
    assert both.price == max(option.price or 0 for option in both.options)
    assert planned(budget=5, max_price=1.5).price == 1.5
    assert planned(budget=5, spot=True).price == pytest.approx(planned(spot=True).chosen.spot_price, abs=1e-4)
    assert (planned().price, planned().budget_minutes, planned().life_minutes, planned().bought) == (None, None, 720, [])


def test_the_task_has_budget_and_price_and_rents_nothing_dearer() -> None:
    without, task = plan_command.render_plan(planned()), plan_command.render_plan(planned(budget=5))
    assert (tasks.env(task, "budget"), tasks.env(task, "price")) == ("5.0000", "0.8048")
    assert (tasks.env(without, "budget"), tasks.env(without, "price")) == ("", "")
    assert (task["resources"]["max_hourly_cost"], "max_hourly_cost" in without["resources"]) == (0.8048, False)
    labels = [one["resources"]["labels"] for one in (without, task)]
    assert [label["mistralctl-ttl"] for label in labels] == ["720", "372"]
    assert labels[0]["mistralctl-resources"] == labels[1]["mistralctl-resources"]  # a budget later needs no other machine
    endless = plan_command.render_plan(planned(budget=5, ttl="never"))
    assert endless["resources"]["labels"]["mistralctl-ttl"] == "372"
    assert "12h of life, 5.00 USD" in tasks.what_ends(task)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--cloud", "local", "--budget", "5"), "--budget: this machine has no price (--cloud local); leave one of the two out"),
        (
            ("--cloud", "aws", "--accelerators", "L4:1", "--budget", "0.1"),
            "--budget: 0.1 USD buys 7 minutes at 0.8048 USD an hour, and a start alone takes about 15; give at least 0.21",
        ),
        (("--cloud", "aws", "--budget", "0"), "--budget: "),
        (("--cloud", "aws", "--budget", "nan"), "--budget: "),
        (("--cloud", "aws", "--budget", "five"), "--budget"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_refused_in_one_line(mistralctl: Run, options: tuple[str, ...], line: str) -> None:
    for verb in ("plan", "up"):
        done = mistralctl(verb, "smollm2-135m-instruct" if "local" in options else "mistral-7b-instruct-v0.1", *options)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("mistralctl: ")
        assert line in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_machine_without_a_price_needs_max_price() -> None:
    sourced = load(L4 | {"budget": 5, "region": "sa-east-1"}, {}, None)
    try:
        got = plan_command.run(sourced)
    except UserError as error:
        assert "add --max-price" in str(error)  # noqa: PT017 - which regions have a price is the snapshot's
    else:
        assert got.price
    assert plan_command.run(load(L4 | {"budget": 5, "region": "sa-east-1", "max_price": 2}, {}, None)).price == 2


def test_never_is_asked_for_where_nothing_bounds_the_price(mistralctl: Run, home: Path) -> None:
    never = ("up", "mistral-7b-instruct-v0.1", "--cloud", "aws", "--ttl", "never", "--offline")
    refused = mistralctl(*never)
    assert refused.returncode == Exit.USAGE
    end = "mistral-7b-instruct-v0-1 has no end (--ttl never) and no --budget: its machine may cost for ever"
    assert refused.stderr.splitlines()[-1] == f"mistralctl: {end}; add --budget USD or a --ttl, or say --yes"
    assert not (home / ".sky").exists()  # before SkyPilot is asked
    shown = mistralctl("plan", "mistral-7b-instruct-v0.1", "--cloud", "aws", "--ttl", "never")
    assert (shown.returncode, end in shown.stdout) == (0, True)
    assert planned(ttl="never").endless
    assert not planned(ttl="never", budget=5).endless
    assert not planned().endless


def budgeted(**changes: Any) -> Any:
    one = record(**changes)
    one.task["envs"] |= {variable("budget"): "1.0000", variable("price"): "0.5000", variable("ttl_minutes"): "720"}
    return one


@pytest.mark.parametrize("until", [None, 720])
def test_the_clouds_label_is_never_later_than_the_budget(monkeypatch: pytest.MonkeyPatch, until: int | None) -> None:
    told: list[dict[str, str]] = []
    machine = Part("aws", "machine", "i-1", "us-east-1a", "running", "g6.xlarge", 1e9, {})

    class Cloud:
        def relabel(self, part: Part, labels: dict[str, str]) -> None:
            told.append(labels)

    monkeypatch.setattr(sweep, "_listed", lambda record: [machine])
    monkeypatch.setattr(sweep, "listing", lambda cloud: Cloud())
    assert sweep.tell_cloud(budgeted(), None if until is None else 1e9 + until * 60) == 1
    assert told == [{"mistralctl-ttl": "120"}]


def test_no_life_is_extended_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    budget = {"usd": 1.0, "price": 0.5, "paid_from": now - 3600, "ends_at": now + 3600}
    monkeypatch.setattr(extend, "_launcher", lambda record: {"state": "ready", "ends_at": now + 1800, "budget": budget})
    with pytest.raises(
        UserError,
        match=r"^m: its budget of 1\.00 USD is spent before that; give it more: mistralctl up .* --cloud \w+ --budget USD$",
    ):
        extend._extend(budgeted(state="up"), "2h", 120)


def test_status_says_what_is_spent_of_it_by_the_clouds_clock() -> None:
    """The laptop is a day behind the cloud, and the node."""
    now, ahead = time.time(), 86400.0
    launcher = {"state": "ready", "ends_at": now + ahead + 1800, "requests": {"last_at": now + ahead - 60}}
    one = budgeted(state="up", price=0.5)
    one.task["envs"][variable("idle_minutes")] = "30"
    found = status._cloud(one, status.Machine("us-east-1a", "", now - 3600, ahead=ahead), status.Node(launcher, answers=True))
    assert (found.budget, found.cost, found.uptime_minutes) == (1.0, 0.5, 60.0)
    assert (found.ttl_left, found.idle_left) == (30.0, 29.0)
    starts = status._cloud(one, status.Machine("us-east-1a", "", now - 3600), status.Node())
    assert starts.ttl_left == 60.0  # of the two hours that it buys


def test_a_deallocated_machine_costs_its_disk() -> None:
    one = record(state="up", price=0.5, spot=True, cloud="azure")
    one.task["resources"]["disk_size"] = 128
    found = status._cloud(one, status.Machine("eastus", "deallocated", time.time() - 3600), status.Node())
    assert (found.state, found.cost) == ("stopped", None)
    day = round((found.price or 0) * 24, 2)
    assert 0.3 < day < 1
    assert found.why == (
        f"the cloud took its spot machine away; it is deallocated and its disk still costs {day:.2f} USD a day; run up again, or down"
    )
    assert plan.START_MINUTES == 15


class Node:
    """A machine whose run is at work; `told` is what was written to it and to its cloud."""

    def __init__(self, ends_at: str, state: str = "train") -> None:
        self.files = {"run/m/ends_at": ends_at, "run/m/status.json": json.dumps({"state": state})}
        self.told: list[float] = []

    def read(self, record: Record, file: str) -> str:
        return self.files.get(file, "")

    def write(self, record: Record, file: str, text: str) -> None:
        self.files[file] = text

    def extend(self, record: Record, until: float) -> None:
        self.told.append(until)


def run_of_training(monkeypatch: pytest.MonkeyPatch, home: Path, node: Node, **envs: str) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(home))
    told = {"MISTRALCTL_TTL_MINUTES": "60", **envs}
    state.save(replace(budgeted(state="starting"), kind="finetune", task={"envs": told}, created_at=time.time()))
    monkeypatch.setattr("mistralctl.runtime.of", lambda cloud: node)


def test_the_life_of_a_run_of_training_is_put_off_where_its_script_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = int(time.time())
    node = Node(f"{now + 600}\n")
    run_of_training(monkeypatch, tmp_path, node)
    done = extend.run("m", "2h")
    assert (done.ends_at, node.told, node.files["run/m/ends_at"]) == (now + 7800, [now + 7800], f"{now + 7800}\n")
    assert state.known("m").ends_at == now + 7800


@pytest.mark.parametrize(
    ("node", "envs", "says"),
    [
        (Node("1\n", "failed"), {}, "m is not at work; mistralctl status m says why"),
        (Node(""), {"MISTRALCTL_TTL_MINUTES": ""}, "m has no end"),
        (
            Node(f"{int(time.time()) + 600}"),
            {"MISTRALCTL_BUDGET": "1", "MISTRALCTL_PRICE": "1"},
            "its budget of 1.00 USD is spent before that",
        ),
        (Node(f"{int(time.time()) + 366 * 86400}"), {}, "365 days is the longest life"),
    ],
)
def test_a_life_of_training_that_is_not_put_off(
    monkeypatch: pytest.MonkeyPatch, node: Node, envs: dict[str, str], says: str, tmp_path: Path
) -> None:
    run_of_training(monkeypatch, tmp_path, node, **envs)
    with pytest.raises(UserError, match=says):
        extend.run("m", "2h")
    assert node.told == []
