"""The receipt: its keys are a contract, it is private, `down` closes it, and what a node does not say is not known."""

from __future__ import annotations

import json
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistral_contract import sets
from mistralctl import __version__, checkpoints, config, plan, state
from mistralctl.commands import receipt
from mistralctl.errors import UserError
from mistralctl.machine import this_machine
from mistralctl.state import Record
from mistralctl.tasks import serve

KEYS = ["schema", "name", "cloud", "region", "machine", "spot", "price", "model", "served_model_name", "up_at", "down_at", "versions",
        "weights", "revision", "files", "flags", "engine", "phases", "canary", "gate", "task", "node", "weights_digest", "evaluations"]  # fmt: skip
STATUS = {
    "flags": ["/weights", "--port", "8000"], "engine": {"class": "Ours", "vllm": "0.32.0", "torch": "2.13.0+cpu"},
    "canary": {"state": "verified", "max_difference": 0.001, "tolerance": 0.05, "against": "made on a CPU", "weights": "c" * 64},
}  # fmt: skip
FILE: dict[str, Any] = {"name": "model.safetensors", "size": 7, "sha256": "a" * 64, "blake3": "b" * 64}


@pytest.fixture
def record(home: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A deployment of this machine as `up` leaves it."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(home / ".mistralctl"))
    sourced = config.load({"model": "smollm2-135m-instruct", "cloud": ["local"], "name": "mine"}, {}, None)
    made = serve.render(
        plan.make(sourced, checkpoints.resolve(sourced), this_machine()), owner="tests", node=serve.Node(str(home / "node"))
    )
    found = Record(
        "mine", "local", "up", "smollm2-135m-instruct", "smollm2-135m-instruct", 8000, str(home / "node"), "1", time.time(),
        phases=({"phase": "engine", "seconds": 41.5},), task=made,
    )  # fmt: skip
    state.save(found)
    return found


def test_the_json_of_a_receipt_is_a_contract(record: Record, mistralctl: Run, home: Path) -> None:
    weights = home / "node" / "weights" / record.task["envs"]["MISTRALCTL_WEIGHTS_ID"]
    for file, content in ((home / "node" / "run" / "mine" / "status.json", STATUS),
                          (weights / "mistral-weights.json", {"files": [FILE | {"ranges": [], "checked_by": "size"}]})):  # fmt: skip
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    receipt.write(record)
    assert stat.S_IMODE(receipt.path("mine").stat().st_mode) == 0o600
    found = json.loads(mistralctl("receipt", "mine", "-o", "json").stdout)
    assert list(found) == ["version", *KEYS]
    assert found["versions"] == {"mistralctl": __version__, "skypilot": None, "vllm": "0.32.0", "torch": "2.13.0+cpu"}
    assert (found["files"], found["flags"], found["engine"], found["canary"]) == ([FILE], *(STATUS[k] for k in list(STATUS)))
    assert (found["weights"], found["down_at"]) == (record.task["envs"]["MISTRALCTL_WEIGHTS"], None)
    assert found["task"] == record.task
    digest = found["weights_digest"]
    assert digest == sets.digest([sets.File(FILE["name"], FILE["size"], FILE["sha256"])])
    lines = mistralctl("receipt", "mine").stdout.splitlines()
    assert lines[0] == "deployment  mine (smollm2-135m-instruct, served as smollm2-135m-instruct)"
    assert lines[3] == "down        not yet"
    assert lines[6] == f"            model.safetensors: 7 bytes, sha256 {'a' * 64}"
    assert lines[7:] == [
        f"digest      {digest}",
        "phases      engine 42 s",
        "check       verified, largest difference 0.001, 0.05 is allowed, made on a CPU",
        "gate        none",
        "flags       /weights --port 8000",
    ]
    receipt.close("mine")
    closed = json.loads(mistralctl("receipt", "mine", "-o", "json").stdout)
    assert time.time() - 60 < closed["down_at"] <= time.time()
    assert closed | {"down_at": None} == found


def test_what_a_node_does_not_say_is_not_known(record: Record) -> None:
    receipt.write(record)
    found = receipt.run("mine")
    assert isinstance(found, receipt.Receipt)
    assert (found.files, found.flags, found.engine, found.canary, found.gate) == ((), (), None, None, None)
    assert found.versions["vllm"] is None


def test_a_mirror_job_has_no_receipt(record: Record) -> None:
    state.save(replace(record, kind="mirror"))
    with pytest.raises(
        UserError, match="mine is a mirror job, so there is no endpoint to ask; mistralctl status mine says how far it is"
    ):
        receipt.run("mine")


def test_a_name_without_a_receipt_and_a_damaged_one(record: Record) -> None:
    receipt.close("mine")  # nothing to close
    with pytest.raises(UserError, match="mine was never brought up to its end, so it has no receipt"):
        receipt.run("mine")
    receipt.path("mine").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        receipt.run("mine")
