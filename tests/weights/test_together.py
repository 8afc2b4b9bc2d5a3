"""Several writers, readers and runs at once: each file is whole, and nobody fails because of another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import sets
from mistral_contract import untrusted
from mistral_weights import disk
from mistral_weights import mirror as mirrors
from mistral_weights import pull as pulls
from mistral_weights.arrival import Wanted
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.events import silent
from mistral_weights.fetch import fetch
from mistral_weights.mirror import Mirror, mirror
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from mistral_weights.stores import StoredFile
from mistral_weights.stores.file import PIECE, FileStore
from mistral_weights.transfer import Conditions, Reader, Transfer
from places import Place

SOON = 0.3  # what another is given to come in between, if it can


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    for name, data in sets.a_set(shard=300 * sets.KIB).items():
        (made / name).write_bytes(data)
    return made


def test_two_that_write_one_file_to_a_folder_each_leave_it_whole(tmp_path: Path) -> None:
    store, target = FileStore(tmp_path / "bucket"), tmp_path / "bucket" / "model.safetensors"
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1" * (3 * PIECE))
    other.write_bytes(b"2" * (2 * PIECE))
    begun: list[Future[None]] = []
    with ThreadPoolExecutor() as pool:

        def advance(size: int) -> None:
            if not begun:
                begun.append(pool.submit(store.write, target.name, other, None))
                wait(begun, SOON)

        store.write(target.name, one, None, advance)
        begun[0].result()
    assert files_in(tmp_path / "bucket") == {target.name: other.read_bytes()}


def test_two_that_replace_one_small_file_each_leave_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, begun, sync = tmp_path / "state.json", list[Future[None]](), os.fsync
    with ThreadPoolExecutor() as pool:

        def fsync(handle: int) -> None:
            sync(handle)
            if not begun:
                begun.append(pool.submit(disk.write_whole, path, b"other"))
                wait(begun, SOON)

        monkeypatch.setattr(disk.os, "fsync", fsync)
        disk.write_whole(path, b"the first one")
        begun[0].result()
    assert files_in(tmp_path) == {path.name: b"other"}


def test_what_a_killed_writer_left_is_no_part_of_the_next_file(tmp_path: Path) -> None:
    (tmp_path / ".state.json.partial").write_bytes(b"pieces" * 100)
    disk.write_whole(tmp_path / "state.json", b"whole")
    assert files_in(tmp_path) == {"state.json": b"whole"}


def test_what_is_fetched_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chats.jsonl").write_bytes(b"{}\n")
    synced, sync = [], os.fsync

    def fsync(handle: int) -> None:
        synced.append(((tmp_path / "here" / "chats.jsonl").exists(), os.fstat(handle).st_size))
        sync(handle)

    monkeypatch.setattr(disk.os, "fsync", fsync)
    assert fetch(f"file://{tmp_path}/chats.jsonl", tmp_path / "here" / "chats.jsonl") == 3
    assert synced[0] == (False, 3)


def test_a_file_that_is_written_into_while_it_is_read_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1" * (2 * PIECE))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    store = FileStore(tmp_path)
    pieces = store.read(store.stored(path.name), 0, 2 * PIECE)
    assert next(pieces) == b"1" * PIECE
    with path.open("r+b") as file:
        file.write(b"2" * (2 * PIECE))
    with pytest.raises(WeightsError, match="changed while it was read") as raised:
        list(pieces)
    assert raised.value.kind is Kind.CHANGED


def test_workers_that_cannot_begin_end_the_transfer() -> None:
    def new_reader() -> Reader:
        raise OSError("no file is free")

    def renew(one: Wanted) -> Wanted:
        return one

    transfer = Transfer(Conditions(sets.RANGE, 2, False, Patience(), new_reader, renew), silent)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            transfer.run([Wanted(StoredFile("model.safetensors", 10, "1"))])
        except OSError as error:
            raised.append(error)

    runner = threading.Thread(target=run, daemon=True)
    runner.start()
    runner.join(30)
    assert [str(error) for error in raised] == ["no file is free"]


def test_two_mirrors_of_one_source_do_not_take_each_others_stage_away(
    stores: dict[str, Place], patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = stores["s3"]
    uri, targets = place.new(), [place.new(), place.new()]
    place.put(uri, sets.a_set(shard=50 * sets.KIB))
    begun: list[Future[Any]] = []
    push: Callable[..., Any] = mirrors.push
    with ThreadPoolExecutor() as pool:

        def slow(*arguments: Any) -> Any:
            if not begun:
                begun.append(pool.submit(mirror, Mirror(uri, targets[1], patience=patience)))
                wait(begun, 2)
            return push(*arguments)

        monkeypatch.setattr(mirrors, "push", slow)
        done = [mirror(Mirror(uri, targets[0], patience=patience)), begun[0].result()]
    for one in done:
        assert one.files == done[0].files
        for name, data in sets.a_set(shard=50 * sets.KIB).items():
            assert place.get(one.target, name) == data


def test_a_file_that_changes_after_its_check_is_not_noted_as_right(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Pull(f"file://{source}", tmp_path / "set")
    pull(request)
    path, right = tmp_path / "set" / "tokenizer.json", (source / "tokenizer.json").read_bytes()
    os.utime(path, (1_000_000_000, 1_000_000_000))
    damages: Callable[..., Any] = pulls.damages

    def checked(*arguments: Any) -> Any:
        found = damages(*arguments)
        path.write_bytes(bytes(len(right)))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pulls, "damages", checked)
        assert pull(request).already_there
    pull(request)
    assert path.read_bytes() == right


def test_a_set_that_another_pull_replaces_is_looked_at_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, aside = Pull(f"file://{source}", tmp_path / "set"), tmp_path / "aside"
    pull(request)
    contents, looks = untrusted.contents, list[Path]()

    def between(path: Path, most: int) -> bytes:
        looks.append(path)
        if len(looks) > 1:
            return contents(path, most)
        request.folder.rename(aside)
        try:
            return contents(path, most)
        finally:
            aside.rename(request.folder)

    monkeypatch.setattr(untrusted, "contents", between)
    assert pull(request).already_there
