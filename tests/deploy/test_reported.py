"""Files of a node that are damaged, or that whoever took its server over wrote: each command goes on or says what is wrong in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mistralctl import documents, key_places, output, processes, readiness, reported, state
from mistralctl.commands import extend, keys, receipt, status
from mistralctl.errors import Exit, UserError
from mistralctl.runtime import facts
from mistralctl.state import Record

ODD: list[Any] = [
    None, True, -1, 0, 1.5, 10**30, 10**39, 1e308, -1e308, float("nan"), float("inf"), "", "x", "\x1b[31mRED\n", [], {}, [[]], [None],
    {"a": {"b": [1]}}, "[]",
]  # fmt: skip
RAW = [
    "", "[", "null", "[]", '"x"', "[" * 100_000 + "]" * 100_000, '{"state":' + "[" * 100_000 + "]" * 100_000 + "}", '{"ends_at":' + "9" * 5000 + "}",
    '{"a": 1, "a": 2}', '{"ends_at": 1e999}',
]  # fmt: skip
STATUS: dict[str, Any] = {
    "state": "ready", "serving_id": "s", "ends_at": time.time() + 3600, "ready_at": 1.0, "started_at": 1.0, "flags": ["--x"],
    "ended_because": "idle", "requests": {"last_at": 2.0}, "restarts": {"count": 1, "of": 2, "why": "it died"},
    "keys": {"uri": "s3://b/k", "problem": "denied", "since": 1.0}, "isolation": {"user": "u", "why": "no sudo"},
    "engine": {"vllm": "0.32", "torch": "2", "class": "C", "sliding_window": 8, "kv_cache_spec": "S"},
    "canary": {"state": "verified", "max_difference": 0.1, "tolerance": 0.2, "against": "made", "weights": None},
    "budget": {"usd": 5.0, "ends_at": time.time() + 7200}, "error": {"code": 1, "message": "no"},
}  # fmt: skip
USAGE: dict[str, Any] = {
    "version": 1,
    "serial": 9,
    "keys": {"abc": {"requests": 3, "tokens": 64, "refused": 0}},
    "refused": {"401": 7},
}
MACHINE: dict[str, Any] = {
    "at": 1.0, "image": "i", "system": "s", "kernel": "k", "cpus": 2, "memory_bytes": 1, "memory_available_bytes": 1, "disk_bytes": 1,
    "disk_free_bytes": 1, "gpus": [{"name": "L4"}], "gpu_problem": "", "cuda": "13", "devices": ["/dev/nvidia0"], "programs": {"gcc": None},
    "pull": {"fetched": 1, "seconds": 1.0, "uri": "u", "disk_written": 1, "disk_seconds": 1.0},
}  # fmt: skip


def changed(sound: dict[str, Any]) -> Iterator[str]:
    """Texts in which each field, also of the objects in it, is each odd value in turn, or is not there."""
    places = [(name,) for name in sound] + [
        (name, one) for name, inner in sound.items() if isinstance(inner, dict) for one in inner
    ]
    for place in places:
        for odd in (*ODD, KeyError):
            data = json.loads(json.dumps(sound))
            inner = data
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = odd
            if odd is KeyError:
                del inner[place[-1]]
            yield json.dumps(data)
    yield from RAW


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A deployment on this machine that is up by its record, and the folder of its node."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "home"))
    task = {
        "envs": {"MISTRALCTL_TTL_MINUTES": "720", "MISTRALCTL_IDLE_MINUTES": "30", "MISTRALCTL_WEIGHTS_ID": "w"},
        "resources": {},
    }
    record = Record("one", "local", "up", "m", "m", 1, str(tmp_path / "node"), "s", time.time() - 60, task=task)
    state.save(record)
    (record.run_dir / "shared").mkdir(parents=True)
    (record.run_dir / "keys").mkdir()
    (record.run_dir / "keys" / "keys.json").write_text(
        json.dumps({"version": 1, "serial": 5, "keys": [{"id": "abc", "name": "own", "sha256": "0" * 64, "created": 1.0}]})
    )
    return record


def test_what_a_launcher_writes_passes_whole() -> None:
    assert reported.status(json.dumps(STATUS)) == STATUS
    assert reported.usage(json.dumps(USAGE)) == USAGE
    assert reported.machine(json.dumps(MACHINE)) == MACHINE


def test_a_status_of_odd_values_is_shown(up: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "servers", lambda record: [1])
    monkeypatch.setattr(readiness, "answers", lambda record: True)
    for text in changed(STATUS):
        (up.run_dir / "status.json").write_text(text)
        found = status._here(up)
        shown = output.status_text([found])
        assert "\x1b" not in shown + found.why
        assert "\x1b" not in documents.as_json([found])
        json.loads(documents.as_json([found]), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_extend_of_a_status_of_odd_values_says_so(up: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extend, "HEARD_SECONDS", 0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for text in changed(STATUS):
        (up.run_dir / "status.json").write_text(text)
        with pytest.raises(UserError) as refused:
            extend._extend(up, "1h", 60)
        assert refused.value.code in (Exit.CONFLICT, Exit.SERVER, Exit.USAGE)


def test_counts_of_odd_values_are_shown(up: Record) -> None:
    for text in changed(USAGE):
        (up.run_dir / "shared" / "usage.json").write_text(text)
        found = keys.run("one")
        assert output.keys_text(found)
        assert documents.as_json(found)
        assert key_places.usage(up).get("serial", 0) >= 0


def test_a_machine_that_says_odd_things_of_itself_is_shown() -> None:
    for text in changed(MACHINE):
        found = reported.machine(text)
        assert found is None or output.node_text(found).isprintable() or "\n" in output.node_text(found)


def test_a_receipt_of_odd_values_is_written_and_shown(up: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "read", lambda record: MACHINE)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    manifest = Path(up.node_dir) / "weights" / "w" / "mistral-weights.json"
    manifest.parent.mkdir(parents=True)
    for text in (
        *changed({key: STATUS[key] for key in ("engine", "canary", "flags")}),
        *changed({"files": [{"name": "a", "size": 1, "sha256": "s", "blake3": "b"}]}),
    ):
        (up.run_dir / "status.json").write_text(text)
        manifest.write_text(text)
        receipt.write(up)
        output.receipt_text(receipt.run("one"))


def test_a_receipt_with_another_machine_in_it_is_shown(up: Record) -> None:
    written = json.dumps(dataclasses.asdict(receipt.write(up)))
    for odd in ODD:
        if odd is not None and not isinstance(odd, dict):
            continue
        data = json.loads(written) | {"node": odd, "gate": odd, "canary": odd, "engine": odd}
        receipt.path("one").write_text(json.dumps(data))
        output.receipt_text(receipt.run("one"))


@pytest.mark.parametrize("file", ["status.json", "shared/usage.json", "keys/keys.json"])
@pytest.mark.parametrize("how", ["pipe", "folder", "no text", "loop"])
def test_no_file_of_a_node_stops_a_command(up: Record, file: str, how: str) -> None:
    path = up.run_dir / file
    path.unlink(missing_ok=True)
    made: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "no text": lambda: path.write_bytes(b"\xff\xfe"),
        "loop": lambda: path.symlink_to(path),
    }  # fmt: skip
    made[how]()
    assert [one.name for one in status.run(None)] == ["one"]
    for command in (lambda: keys.run("one"), lambda: extend.run("one", "1h")):
        try:
            command()
        except UserError as refused:
            assert refused.code == Exit.CONFLICT  # noqa: PT017 - one of the two goes on
    receipt.write(up)
