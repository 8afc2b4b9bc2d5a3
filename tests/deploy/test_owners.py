"""Whose a machine is: an id of the home, and the label of its own record, whatever this machine and its user are called meanwhile."""

from __future__ import annotations

import getpass
import os
import platform
import re
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from mistralctl import owners, state, sweep
from mistralctl.clouds.aws import api as aws
from mistralctl.commands import extend, reap, status
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Observed
from mistralctl.runtime import rented, sky
from mistralctl.runtime.protocol import Attempt
from mistralctl.tasks import digest
from test_status import ec2, remember, rent
from test_sweep import living

__all__ = ["ec2"]  # a fixture, found by its name
Run = Callable[..., CompletedProcess[str]]
USER = "0a1b2c3d"


def another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine and its user get other names."""
    monkeypatch.setattr(platform, "node", lambda: "renamed")
    monkeypatch.setattr(getpass, "getuser", lambda: "somebody")


def made(environ: dict[str, str]) -> str:
    owners.make(environ)
    return owners.current(environ)


def test_a_home_makes_one_id_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = [{"MISTRALCTL_HOME": str(tmp_path / name)} for name in ("a", "b")]
    first, second = (made(home) for home in homes)
    another_machine(monkeypatch)
    assert [owners.current(home) for home in homes] == [made(home) for home in homes] == [first, second]
    assert len({first, second, owners.former()}) == 3
    assert re.fullmatch(r"[a-z0-9_-]{1,63}", first)
    file = tmp_path / "a" / "owner"
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (f"{first}\n", 0o600)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert owners.current(homes[0] | {"MISTRALCTL_OWNER": "team"}) == digest("team")


def test_many_that_begin_at_once_agree(tmp_path: Path) -> None:
    environ = {"MISTRALCTL_HOME": str(tmp_path / "new")}
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: made(environ), range(64)))) == 1


@pytest.mark.parametrize("text", ["", "\n", "UPPER", "a b", "x" * 64, "two\nlines"])
def test_a_damaged_id_is_named_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "owner").write_text(text)
    with pytest.raises(
        UserError, match=r"owner does not hold an owner's id; write into it the value of the label mistralctl-owner"
    ) as caught:
        owners.current({"MISTRALCTL_HOME": str(tmp_path)})
    assert caught.value.code == Exit.CONFLICT
    assert (tmp_path / "owner").read_text() == text


def test_a_dry_run_makes_no_id_and_shows_the_one_that_is_there(mistralctl: Run, home: Path) -> None:
    def shown() -> str:
        done = mistralctl("up", "--cloud", "aws", "--dry-run", MISTRALCTL_OWNER="")
        label: str = yaml.safe_load(done.stdout)["resources"]["labels"]["mistralctl-owner"]
        return label

    assert shown() == shown() == owners.former()
    assert list(home.iterdir()) == []
    assert made({"MISTRALCTL_HOME": str(home / ".mistralctl")}) == shown() != owners.former()


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {"MISTRALCTL_HOME": str(tmp_path / "file" / "home")}
    assert owners.current(environ) == owners.former()
    with pytest.raises(UserError, match=r"owner cannot be written .*; set MISTRALCTL_HOME to a folder of yours"):
        owners.make(environ)


@pytest.fixture
def one(ec2: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A deployment whose machine bears its record's label (a1), on a laptop that would give another one now."""
    monkeypatch.setattr(aws, "regions", lambda: ["us-west-2"])
    monkeypatch.setattr("mistralctl.sweep.time.sleep", lambda seconds: None)
    monkeypatch.setenv("SKYPILOT_USER_ID", USER)
    owners.make(os.environ)
    another_machine(monkeypatch)
    record = remember("one")
    assert owners.current(os.environ) != "a1"
    return record


def test_every_command_goes_by_the_records_own_label(ec2: Any, one: Any) -> None:
    machine = rent(ec2, "one")
    assert sweep.tell_cloud(one, time.time() + 3600) == 1
    assert [now.state for now in status.run("one")] == ["lost"]  # its node does not answer, though the cloud says that it runs
    assert "though the cloud says that it runs" in status.run("one")[0].why
    [found] = reap.run(["aws"], all_owners=False, dry_run=True, confirm=bool).parts
    assert found.id == machine
    sweep.wait_until_gone(one, promised=False)
    assert living(ec2) == []


def test_reap_knows_the_older_hash_and_no_other_machine_of_a_recorded_owner(ec2: Any, one: Any) -> None:
    mine = {rent(ec2, "one"), rent(ec2, "older", owners.former()), rent(ec2, "newer", owners.current(os.environ))}
    rent(ec2, "two", "a1")  # that owner's, and no deployment of this home
    rent(ec2, "one", "b2")
    found = reap.run(["aws"], all_owners=False, dry_run=True, confirm=bool).parts
    assert {part.id for part in found} == mine


def test_extend_says_that_it_found_no_machine(ec2: Any, one: Any) -> None:
    with pytest.raises(
        UserError, match=r"one: aws lists no machine with the labels .*owner=a1; its labels were taken away, .*not changed"
    ) as caught:
        rented.Rented().extend(one, time.time() + 3600)
    assert caught.value.code == Exit.CLOUD


def test_a_firewall_without_a_rule_to_narrow_is_an_error(ec2: Any, one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistralctl.certificates.pin", lambda name, text: None)
    public = replace(one, public=True, port=8000, task={**one.task, "envs": {"MISTRALCTL_ALLOW": "[]"}})
    monkeypatch.setattr(rented, "value", lambda *_: ())
    rent(ec2, "one", "b2")
    with pytest.raises(UserError, match="the firewall of aws has no rule for port 8000 of its machine") as caught:
        rented.publish(public, "")
    assert caught.value.code == Exit.CLOUD


def relabelled(ec2: Any, **labels: str) -> str:
    """The machine that SkyPilot rented here for the deployment `one`, with other labels than its record says."""
    machine = rent(ec2, "one", "changed")
    tags = {"ray-cluster-name": f"mctl-one-{USER}", **labels}
    ec2.create_tags(Resources=[machine], Tags=[{"Key": key, "Value": value} for key, value in tags.items()])
    return machine


@pytest.mark.parametrize("known", [True, False], ids=["skypilot has it", "skypilot has forgotten it"])
def test_down_never_says_that_nothing_is_there_while_the_machine_runs(
    ec2: Any, one: Any, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sky, "clusters", lambda names, refresh: {"mctl-one": None} if known else {})
    with pytest.raises(UserError, match="SkyPilot says that its machine mctl-one is still there") if known else nothing():
        rented.Rented().sweep(one, promised=True)
    machine = relabelled(ec2)
    with pytest.raises(
        UserError, match=rf"it lists {machine} \(changed\), which bears another owner: it was not touched"
    ) as caught:
        rented.Rented().sweep(one, promised=True)
    assert caught.value.code == Exit.CLOUD
    assert living(ec2) == [machine]
    [now] = status.run("one")
    assert (now.state, now.why.partition(";")[0]) == ("lost", f"{machine} bears the owner changed, not a1 as its record says")


def test_up_labels_the_groups_of_its_new_machine_and_notices_one_without_its_labels(ec2: Any, one: Any) -> None:
    group = ec2.create_security_group(
        GroupName="sky-sg",
        Description="x",
        TagSpecifications=[{"ResourceType": "security-group", "Tags": [{"Key": "skypilot", "Value": "true"}]}],
    )["GroupId"]
    with pytest.raises(UserError, match=r"aws lists no machine with the labels .*mistralctl down one takes it away"):
        sweep.label_others(one)
    machine = rent(ec2, "one")
    ec2.modify_instance_attribute(InstanceId=machine, Groups=[group])
    assert sweep.label_others(one).account == "123456789012"
    [found] = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert {tag["Key"]: tag["Value"] for tag in found["Tags"]} == {"skypilot": "true", "mistralctl-owner": "a1"}


def test_another_account_is_not_an_empty_one(ec2: Any, one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sky, "clusters", lambda names, refresh: {})
    elsewhere = replace(one, account="999999999999")
    state.save(elsewhere)
    said = "its machine was rented in the aws account 999999999999, and these credentials are of 123456789012, where it cannot be seen"
    with pytest.raises(UserError, match=f"^one: {said}; sign in to 999999999999, then run mistralctl down one again$"):
        rented.Rented().sweep(elsewhere, promised=False)
    with pytest.raises(UserError, match=f"^one: {said}; sign in to 999999999999; its end was not changed$"):
        rented.Rented().extend(elsewhere, time.time() + 3600)
    [now] = status.run("one")
    assert (now.state, now.why) == ("lost", f"{said}; sign in to 999999999999")
    rented.Rented().sweep(replace(one, account="123456789012"), promised=False)


def test_a_label_that_is_refused_is_said_with_the_machine_that_runs(ec2: Any, one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: str) -> int:
        raise UserError("AWS refused CreateTags (UnauthorizedOperation); give this identity that right", Exit.CLOUD)

    monkeypatch.setattr(aws, "label_others", refuses)
    with pytest.raises(
        UserError, match=r"^one: AWS refused CreateTags .*; its machine runs: mistralctl up .* --cloud aws goes on with it then, "
    ) as caught:
        sweep.label_others(one)
    assert caught.value.code == Exit.CLOUD


class nothing:  # noqa: N801 - used like contextlib.nullcontext
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_another_persons_machine_of_the_same_name_is_no_matter(ec2: Any, one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sky, "clusters", lambda names, refresh: {})
    theirs = relabelled(ec2, **{"ray-cluster-name": "mctl-one-ffffffff"})
    rented.Rented().sweep(one, promised=False)
    assert living(ec2) == [theirs]
    assert status.run("one")[0].why.startswith("its machine is gone")


def test_up_on_a_machine_that_the_cloud_does_not_list_stops(ec2: Any, one: Any) -> None:
    observed = Observed("up", None, cloud="aws", region="us-west-2")
    record = replace(one, task={**one.task, "name": "one"})
    attempt = Attempt(record, {}, observed, lambda event: None, state.save, time.time(), one)
    with pytest.raises(UserError, match="aws lists no machine with the labels"):
        rented.Rented()._begin(attempt)


def test_a_machine_that_stays_keeps_its_label(mistralctl: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(home / ".mistralctl"))
    remember("one")

    def label(**variables: str) -> str:
        done = mistralctl("up", "--cloud", "aws", "--name", "one", "--dry-run", **variables)
        found: str = yaml.safe_load(done.stdout)["resources"]["labels"]["mistralctl-owner"]
        return found

    assert label(MISTRALCTL_OWNER="") == label(MISTRALCTL_OWNER="team") == "a1"
    remember("one", state="down")
    assert label(MISTRALCTL_OWNER="team") == digest("team")


def test_extend_is_the_commands_error_too(ec2: Any, one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = time.time() + 600
    monkeypatch.setattr(extend, "_launcher", lambda record: {"state": "ready", "ends_at": ends})
    monkeypatch.setattr(rented.Rented, "write", lambda *_: pytest.fail("the node was told"))
    state.save(replace(one, task={**one.task, "envs": {"MISTRALCTL_TTL_MINUTES": "60"}}))
    with pytest.raises(UserError, match="its end was not changed"):
        extend.run("one", "1h")
