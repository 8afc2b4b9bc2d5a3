"""One file of any kind, brought from a store as a whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import places
import pytest
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.fetch import fetch
from mistral_weights.objects import open_object

CHATS = b'{"messages": []}\n' * 1000


@pytest.fixture(params=["file", *(pytest.param(kind, marks=pytest.mark.servers) for kind in ("s3", "gs", "az"))])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where chats lie, beside a file that is not asked for."""
    if request.param == "file":
        folder = f"file://{tmp_path}/store"
    else:
        stores: dict[str, places.Place] = request.getfixturevalue("stores")
        folder = stores[request.param].new()
    open_object(f"{folder}/chats.jsonl").put(CHATS, "")
    open_object(f"{folder}/other.jsonl").put(b"other", "")
    return f"{folder}/chats.jsonl"


def test_a_file_comes_whole(uri: str, tmp_path: Path) -> None:
    target = tmp_path / "data" / "chats.jsonl"
    assert fetch(uri, target) == len(CHATS)
    assert target.read_bytes() == CHATS
    assert [path.name for path in target.parent.iterdir()] == ["chats.jsonl"]


def test_what_is_not_there_or_too_large_is_said(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_bytes(CHATS)
    for name, most, kind, says in (
        ("none.jsonl", 0, Kind.NOT_FOUND, "none.jsonl is not there; name a file in file://"),
        ("chats.jsonl", 100, Kind.REFUSED, f"has {len(CHATS):,} bytes; at most 100 are read here"),
    ):
        with pytest.raises(WeightsError, match=says) as error:
            fetch(f"file://{tmp_path}/{name}", tmp_path / "to" / "x", most)
        assert error.value.kind is kind
    assert not (tmp_path / "to").exists()


def test_the_node_asks_for_it_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_bytes(CHATS)
    command = [sys.executable, "-m", "mistral_weights.fetch", f"file://{tmp_path}/chats.jsonl", str(tmp_path / "to.jsonl")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "to.jsonl").read_bytes() == CHATS
    command[3] = f"file://{tmp_path}/none.jsonl"
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith(f"file://{tmp_path}/none.jsonl is not there")
