"""Whether a set can be put to an address: a small file is written and taken away, and what lies there is told from what a push left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import places
import pytest
from mistral_weights import names
from mistral_weights.objects import open_object
from mistral_weights.push import Push, push
from mistral_weights.seal import seal
from mistral_weights.writable import may_write, strangers


@pytest.fixture(params=["file", *(pytest.param(kind, marks=pytest.mark.servers) for kind in ("s3", "gs", "az"))])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that is empty yet."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    stores: dict[str, places.Place] = request.getfixturevalue("stores")
    return stores[request.param].new()


def test_nothing_of_a_trial_stays(uri: str) -> None:
    may_write(uri)
    assert strangers(uri) == ()


def test_files_of_somebody_else_are_named_and_those_of_a_push_are_not(uri: str, tmp_path: Path) -> None:
    assert strangers(uri) == ()
    open_object(f"{uri}/checkpoints/a/optimizer.pt").put(b"1", "")
    assert strangers(uri, ("checkpoints", "merged")) == ()
    open_object(f"{uri}/thesis.txt").put(b"years of work", "")
    open_object(f"{uri}/checkpoints.txt").put(b"1", "")
    found = [
        name for name in strangers(uri, ("checkpoints", "merged")) if not name.endswith(".lock")
    ]  # of the folder's own writer here
    assert found == ["checkpoints.txt", "thesis.txt"]
    open_object(f"{uri}/{names.UNFINISHED}").put(b"", "")
    assert strangers(uri, ("checkpoints", "merged")) == ()


def test_beside_a_whole_set_nothing_is_a_stranger(uri: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "adapter.bin").write_bytes(b"1")
    seal(tmp_path / "set", "somewhere", "one")
    push(Push(tmp_path / "set", uri))
    assert strangers(uri) == ()


def test_the_node_asks_for_it_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mistral_weights.writable", f"file://{tmp_path}/new"]
    assert subprocess.run(command, check=False).returncode == 0
    (tmp_path / "file").write_text("no folder")
    command[3] = f"file://{tmp_path}/file/below"
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith(f"file://{tmp_path}/file/below cannot be written: ")
    assert "Traceback" not in done.stderr
