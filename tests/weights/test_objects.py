"""One small object that changes: read if it has another version, replaced if it still has the one that was read; on every store that has such."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import places
import pytest
from mistral_weights import objects
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.objects import open_object
from mistral_weights.patience import Patience


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.servers] * (kind != "file")) for kind in objects.SCHEMES])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an object of each kind may lie, of which nothing is there yet."""
    if request.param == "file":
        return f"file://{tmp_path}/folder/keys.json"
    stores: dict[str, places.Place] = request.getfixturevalue("stores")
    return f"{stores[request.param].new()}/keys.json"


def refused(kind: Kind, says: str, call: Any) -> None:
    with pytest.raises(WeightsError) as caught:
        call()
    assert caught.value.kind is kind
    assert says in str(caught.value)


def test_an_object_is_read_once_a_version(uri: str) -> None:
    one = open_object(uri)
    refused(Kind.NOT_FOUND, "keys.json", one.get)
    first = one.put(b"one", "")
    found = one.get()
    assert found is not None
    assert (found.data, found.version) == (b"one", first)
    assert one.get(found.version) is None
    second = one.put(b"two, longer", found.version)
    changed = open_object(uri).get(found.version)
    assert changed is not None
    assert (changed.data, changed.version) == (b"two, longer", second)
    assert one.get(second) is None


def test_whoever_was_quicker_wins_and_the_other_is_told(uri: str) -> None:
    one, other = open_object(uri), open_object(uri)
    first = one.put(b"one", "")
    refused(Kind.CHANGED, "was changed by somebody else", lambda: other.put(b"other", ""))
    second = other.put(b"two", first)
    refused(Kind.CHANGED, "was changed by somebody else", lambda: one.put(b"lost", first))
    found = one.get(first)
    assert found is not None
    assert (found.data, found.version) == (b"two", second)


def test_of_many_writers_at_once_no_change_is_lost(uri: str) -> None:
    open_object(uri).put(b"[]", "")

    def append(who: int) -> None:
        one = open_object(uri)
        for number in range(3):
            while True:
                found = one.get()
                assert found is not None
                try:
                    one.put(json.dumps([*json.loads(found.data), [who, number]]).encode(), found.version)
                    break
                except WeightsError as error:
                    assert error.kind is Kind.CHANGED

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(4)))
    found = open_object(uri).get()
    assert found is not None
    assert sorted(json.loads(found.data)) == [[who, number] for who in range(4) for number in range(3)]


def test_what_is_read_while_another_writes_is_of_the_version_that_is_told(uri: str) -> None:
    one, other = open_object(uri), open_object(uri)
    written = {one.put(b"0", ""): b"0"}
    seen: dict[str, bytes] = {}
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            found = other.get()
            assert found is not None
            assert seen.setdefault(found.version, found.data) == found.data

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        try:
            for number in range(1, 100):
                data = b"%d" % number
                written[one.put(data, list(written)[-1])] = data
        finally:
            ended.set()
        reader.result()
    assert {version: written[version] for version in seen} == seen


def test_a_file_of_one_size_and_time_has_another_version(tmp_path: Path) -> None:
    one = open_object(f"file://{tmp_path}/keys.json")
    version = one.put(b"one", "")
    path = tmp_path / "keys.json"
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = one.get(version)
    assert found is not None
    assert found.data == b"two"
    refused(Kind.CHANGED, "was changed by somebody else", lambda: one.put(b"lost", version))


def test_what_is_no_small_object_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = open_object(uri)
    one.put(b"x" * 100, "")
    monkeypatch.setattr(objects, "MOST", 99)
    refused(Kind.REFUSED, "has more than 99 bytes; name another object", one.get)


@pytest.mark.parametrize(
    "wrong", ["hf://owner/name/keys.json", "pypi://a@1/keys.json", "keys.json", "s3://bucket/", "/keys.json"]
)
def test_what_names_no_object_is_refused(wrong: str) -> None:
    refused(Kind.USAGE, f"{wrong!r} names no object", lambda: open_object(wrong))


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_store_that_is_silent_or_gone_is_named_in_time(
    scheme: str, stores: dict[str, places.Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, brief = stores[scheme], Patience(connect=1.0, stall=0.5)
    uri = f"{place.new()}/keys.json"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in place.env.items():
            monkeypatch.setenv(name, value.replace(place.proxy.url, f"http://127.0.0.1:{silent.getsockname()[1]}"))
        one = open_object(uri, brief)
        refused(Kind.UNREACHABLE, "cannot be reached", one.get)
    refused(Kind.UNREACHABLE, "cannot be reached", one.get)


def test_who_has_no_right_is_told_which(stores: dict[str, places.Place], monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{stores['s3'].new()}/keys.json"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    refused(Kind.DENIED, "s3:GetObject", open_object(uri).get)
    refused(Kind.DENIED, "s3:PutObject", lambda: open_object(uri).put(b"", ""))


class Follower:
    """`python -m mistral_weights.follow` as the launcher runs it."""

    def __init__(self, uri: str) -> None:
        command = [sys.executable, "-m", "mistral_weights.follow", uri, "0.05"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))

    def says(self) -> dict[str, Any]:
        """The next line."""
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], 300)[0]
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def until(self, event: str) -> dict[str, Any]:
        """The next line of this kind."""
        while (found := self.says())["event"] != event:
            pass
        return found


@contextmanager
def following(uri: str) -> Iterator[Follower]:
    follower = Follower(uri)
    try:
        yield follower
        assert follower.process.stdin
        follower.process.stdin.close()
        assert follower.process.wait(300) == 0
    finally:
        follower.process.kill()
        follower.process.wait()


def test_each_version_is_told_once_and_what_goes_wrong_until_it_is_right_again(uri: str) -> None:
    one = open_object(uri)
    with following(uri) as follower:
        assert "keys.json" in follower.says()["message"]
        version = one.put("ä".encode(), "")
        assert follower.until("object") == {"event": "object", "text": "ä"}
        assert follower.says() == {"event": "same"}
        version = one.put(b"\xff", version)
        assert follower.until("object") == {"event": "object", "text": "\ufffd"}
        one.store.delete(one.name)  # type: ignore[attr-defined]
        assert "keys.json" in follower.until("problem")["message"]
        one.put(b"again", "")
        assert follower.until("object") == {"event": "object", "text": "again"}


def test_it_ends_with_whoever_listens(tmp_path: Path) -> None:
    follower = Follower(f"file://{tmp_path}/keys.json")
    assert follower.says()["event"] == "problem"
    assert follower.process.stdout
    follower.process.stdout.close()
    assert follower.process.wait(300) == 1
