"""A pull brings what serving needs, as a whole, from every kind of store."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import hub as hubs
import pytest
import sets
from mistral_weights import manifest as manifests
from mistral_weights.cli import main
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.events import Event, FileFinished, Retrying, Waiting
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from mistral_weights.secrets import Secrets
from places import Place, spoil

MUTABLE = ("s3", "gs", "az")  # a commit of a hub does not change
OURS = {"mistral-weights.json", ".mistral-weights.state.json"}


def contents(folder: Path) -> dict[str, bytes]:
    """What a set's folder holds, without our own two files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name not in OURS}


def test_a_set_without_a_manifest_arrives_whole_and_gets_one(place: Place, tmp_path: Path, patience: Patience) -> None:
    files, uri, target = sets.a_set(), place.new(), tmp_path / "weights" / "set"
    place.put(uri, {**files, **sets.unneeded()})
    finished: list[Event] = []
    done = pull(Pull(uri, target, range_bytes=sets.RANGE, patience=patience), finished.append)
    assert contents(target) == files
    assert sorted(path.name for path in target.parent.iterdir()) == ["set"]
    assert done.files == tuple(sorted(files))
    assert (done.bytes, done.fetched, done.resumed) == (sum(map(len, files.values())),) * 2 + (0,)
    manifest = manifests.read((target / "mistral-weights.json").read_bytes(), "here")
    assert {file.name: file.sha256 for file in manifest.files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items()
    }
    by = {event.checked_by for event in finished if isinstance(event, FileFinished)}
    assert by == {"hf": {"sha256", "git-sha1"}, "s3": {"crc32"}, "gs": {"crc32c"}, "az": {"md5"}}[place.scheme]


def test_the_plain_way_brings_the_same(place: Place, tmp_path: Path, patience: Patience) -> None:
    files, uri = sets.a_set(), place.new()
    place.put(uri, files)
    pull(Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, plain=True, patience=patience))
    assert contents(tmp_path / "set") == files


def test_through_the_page_cache_brings_the_same(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    files, uri = sets.a_set(), stores["s3"].new()
    stores["s3"].put(uri, files)
    pull(Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, direct=False, patience=patience))
    assert contents(tmp_path / "set") == files
    assert main(["pull", uri, str(tmp_path / "kept"), "--keep-cached"]) == 0
    assert contents(tmp_path / "kept") == files


def test_a_warm_set_asks_nobody(place: Place, tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = place.new()
    place.put(uri, sets.a_set())
    request = Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, patience=patience)
    pull(request)
    for name in place.env:
        monkeypatch.delenv(name)
    done = pull(request)
    assert (done.already_there, done.fetched) == (True, 0)
    assert done.seconds < 0.5


def test_a_doubtful_set_is_read_again_and_a_damaged_one_repaired(
    stores: dict[str, Place], tmp_path: Path, patience: Patience
) -> None:
    place, files, target = stores["s3"], sets.a_set(), tmp_path / "set"
    uri = place.new()
    place.put(uri, files)
    request = Pull(uri, target, range_bytes=sets.RANGE, patience=patience)
    whole = pull(request).bytes
    shard = target / "model-00001-of-00002.safetensors"
    os.utime(shard)
    assert pull(request).already_there
    data = bytearray(shard.read_bytes())
    data[1_000_000] ^= 1
    shard.write_bytes(data)
    done = pull(request)
    assert (done.already_there, done.fetched, done.resumed) == (False, sets.RANGE, whole - sets.RANGE)
    assert contents(target) == files


def test_the_full_check_finds_a_flip_that_hides_its_time(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    place, files, target = stores["s3"], sets.a_set(), tmp_path / "set"
    uri = place.new()
    place.put(uri, files)
    request = Pull(uri, target, range_bytes=sets.RANGE, patience=patience)
    pull(request)
    shard = target / "model-00002-of-00002.safetensors"
    stat = shard.stat()
    with shard.open("r+b") as handle:
        handle.seek(77)
        handle.write(bytes([files[shard.name][77] ^ 128]))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert pull(request).already_there
    assert pull(replace(request, full_check=True)).fetched == sets.RANGE
    assert contents(target) == files


def test_a_revision_is_pinned_to_its_commit(hub: hubs.Hub, tmp_path: Path, patience: Patience) -> None:
    old = hub.add("test/pinned", sets.a_set(1))
    repository = hub.repositories["test/pinned"]
    repository.commits["f" * 40] = sets.a_set(2)
    repository.main = "f" * 40
    done = pull(Pull("hf://test/pinned", tmp_path / "old", old, range_bytes=sets.RANGE, patience=patience))
    assert (done.revision, done.source, done.license) == (old, f"hf://test/pinned@{old}", "apache-2.0")
    assert contents(tmp_path / "old") == sets.a_set(1)
    newest = pull(Pull("hf://test/pinned", tmp_path / "new", range_bytes=sets.RANGE, patience=patience))
    assert newest.revision == "f" * 40
    with pytest.raises(WeightsError, match=r"test/pinned has no revision nowhere; look at http\S+/test/pinned/commits") as caught:
        pull(Pull("hf://test/pinned", tmp_path / "none", "nowhere", patience=patience))
    assert caught.value.kind is Kind.NOT_FOUND


def test_a_gated_model_names_the_page_and_a_token_opens_it(hub: hubs.Hub, tmp_path: Path, patience: Patience) -> None:
    hub.add("test/gated", sets.a_set(), gated=True)
    request = Pull("hf://test/gated", tmp_path / "set", range_bytes=sets.RANGE, patience=patience)
    with pytest.raises(WeightsError, match=r"test/gated is gated; open http://[\d.:]+/test/gated, accept its terms") as caught:
        pull(request)
    assert caught.value.kind is Kind.DENIED
    secrets = tmp_path / "secrets.json"

    def later() -> None:
        time.sleep(0.3)
        secrets.write_text(json.dumps({"api_key": "k", "hf_token": hubs.TOKEN}))

    threading.Thread(target=later).start()
    pull(replace(request, secrets=Secrets(secrets, wait=300)))
    assert contents(tmp_path / "set") == sets.a_set()
    assert hubs.TOKEN not in "".join(path.read_text(errors="replace") for path in (tmp_path / "set").iterdir())


def test_a_link_that_expires_in_the_middle_is_made_anew(hub: hubs.Hub, tmp_path: Path, patience: Patience) -> None:
    hub.add("test/expiring", sets.a_set(shard=4 * 2**20), link_seconds=0.15)
    slow = replace(patience, tries_refused=5)
    pull(Pull("hf://test/expiring", tmp_path / "set", range_bytes=64 * sets.KIB, connections=2, patience=slow))
    assert contents(tmp_path / "set") == sets.a_set(shard=4 * 2**20)


def test_two_pulls_of_one_set_share(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    place, files, uri = stores["s3"], sets.a_set(), stores["s3"].new()
    place.put(uri, files)
    place.proxy.delay = 0.02
    request = Pull(uri, tmp_path / "set", range_bytes=64 * sets.KIB, connections=2, patience=patience)
    events: list[Event] = []
    results = []
    threads = [threading.Thread(target=lambda: results.append(pull(request, events.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done.already_there for done in results) == [False, True, True]
    assert sum(done.fetched for done in results) == sum(map(len, files.values()))
    assert any(isinstance(event, Waiting) for event in events)
    assert [path.name for path in tmp_path.iterdir() if "set" in path.name] == ["set"]


@pytest.mark.parametrize("kind", MUTABLE)
def test_an_object_that_changes_in_the_middle_starts_again(
    kind: str, stores: dict[str, Place], tmp_path: Path, patience: Patience
) -> None:
    place = stores[kind]
    old, new, uri = sets.a_set(1), sets.a_set(2), place.new()
    place.put(uri, old)
    name = "model-00001-of-00002.safetensors"
    said: list[str] = []
    place.proxy.delay = 0.01

    def report(event: Event) -> None:
        kind = type(event).__name__
        if kind == "Advanced" and "changed" not in said:
            said.append("changed")
            place.put(uri, {name: new[name]})
        elif kind == "FileRestarted":
            said.append(event.name)  # type: ignore[union-attr]

    pull(Pull(uri, tmp_path / "set", range_bytes=64 * sets.KIB, connections=2, patience=patience), report)
    assert contents(tmp_path / "set") == {**old, name: new[name]}
    assert said[:2] == ["changed", name]


@pytest.mark.parametrize("kind", MUTABLE)
def test_an_object_that_changes_between_two_runs_starts_again(
    kind: str, stores: dict[str, Place], tmp_path: Path, patience: Patience
) -> None:
    place = stores[kind]
    old, new, uri = sets.a_set(1), sets.a_set(2), place.new()
    place.put(uri, old)
    request = Pull(
        uri,
        tmp_path / "set",
        range_bytes=64 * sets.KIB,
        connections=2,
        patience=replace(patience, tries=1, connect=300.0, stall=300.0),
    )
    place.proxy.plan("500", after=30)
    with pytest.raises(WeightsError):
        pull(request)
    place.proxy.plan("")
    place.put(uri, new)
    done = pull(request)
    assert contents(tmp_path / "set") == new
    assert done.resumed <= sum(len(data) for name, data in old.items() if new[name] == data)


def test_a_folder_that_is_no_set_is_left_alone(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    uri = stores["s3"].new()
    stores["s3"].put(uri, sets.a_set())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(WeightsError, match="is there, but is no set of weights") as caught:
        pull(Pull(uri, tmp_path / "mine", patience=patience))
    assert caught.value.kind is Kind.USAGE
    assert contents(tmp_path / "mine") == {"thesis.txt": b"mine"}


def test_another_set_is_not_overwritten(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    one, other = stores["s3"].new(), stores["s3"].new()
    for uri in (one, other):
        stores["s3"].put(uri, sets.a_set())
    pull(Pull(one, tmp_path / "set", patience=patience))
    with pytest.raises(WeightsError, match=f"holds {one}, not {other}"):
        pull(Pull(other, tmp_path / "set", patience=patience))


@pytest.mark.parametrize("scheme", [*MUTABLE, "file"])
def test_a_fresh_pull_brings_what_has_changed_and_leaves_the_old_until_then(
    scheme: str, stores: dict[str, Place], tmp_path: Path, patience: Patience
) -> None:
    def put(uri: str, files: dict[str, bytes]) -> None:
        if scheme != "file":
            stores[scheme].put(uri, files)
            return
        for name, data in files.items():
            Path(uri.removeprefix("file://")).mkdir(exist_ok=True)
            Path(uri.removeprefix("file://"), name).write_bytes(data)

    first, second = sets.a_set(1), sets.a_set(2)
    uri, other = (f"file://{tmp_path / name}" if scheme == "file" else stores[scheme].new() for name in ("a", "b"))
    put(uri, first)
    request = Pull(uri, tmp_path / "sets" / "set", range_bytes=sets.RANGE, patience=patience, fresh=True)
    assert not pull(request).already_there
    unchanged = pull(request)
    assert (unchanged.already_there, unchanged.fetched) == (True, 0)
    put(uri, second)
    assert pull(replace(request, fresh=False)).already_there
    assert contents(request.folder) == first
    changed = pull(request)
    assert (changed.already_there, contents(request.folder)) == (False, second)
    with pytest.raises(WeightsError):
        pull(replace(request, uri=other))
    assert contents(request.folder) == second
    put(other, first)
    assert not pull(replace(request, uri=other)).already_there
    assert contents(request.folder) == first
    assert [path.name for path in request.folder.parent.iterdir()] == ["set"]


def test_a_fresh_pull_keeps_what_is_there_when_the_store_is_out_of_reach(
    stores: dict[str, Place], tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = stores["s3"].new()
    stores["s3"].put(uri, sets.a_set(1))
    request = Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, patience=patience, fresh=True)
    assert not pull(request).already_there
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    said: list[object] = []
    assert pull(request, said.append).already_there
    assert [type(event).__name__ for event in said if not isinstance(event, Retrying)] == ["Kept"]
    with pytest.raises(WeightsError):
        pull(replace(request, folder=tmp_path / "other"))


def test_an_incomplete_source_is_refused(place: Place, tmp_path: Path, patience: Patience) -> None:
    files, uri = sets.a_set(), place.new()
    del files["model-00002-of-00002.safetensors"]
    place.put(uri, files)
    with pytest.raises(WeightsError, match=r"lacks model-00002-of-00002\.safetensors") as caught:
        pull(Pull(uri, tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.DAMAGED
    assert not (tmp_path / "set").exists()


def test_what_the_store_promised_must_arrive(hub: hubs.Hub, tmp_path: Path, patience: Patience) -> None:
    files = sets.a_set()
    hub.add("test/lies", files)
    name = "model-00001-of-00002.safetensors"
    hub.repositories["test/lies"].hidden_oids[name] = "0" * 64
    with pytest.raises(WeightsError, match=f"{name} has sha256 .* was promised") as caught:
        pull(Pull("hf://test/lies", tmp_path / "set", range_bytes=sets.RANGE, patience=patience))
    assert caught.value.kind is Kind.DAMAGED
    assert not (tmp_path / "set").exists()
    hub.repositories["test/lies"].hidden_oids.clear()
    pull(Pull("hf://test/lies", tmp_path / "set", range_bytes=sets.RANGE, patience=patience))
    assert contents(tmp_path / "set") == files


def test_a_pull_through_a_proxy_of_the_environment(
    stores: dict[str, Place], tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a proxy set, the plain reader does the work: the SDK knows proxies."""
    place, uri = stores["s3"], stores["s3"].new()
    place.put(uri, sets.a_set())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="cannot be reached"):
        pull(Pull(uri, tmp_path / "set", patience=replace(patience, tries=1)))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pull(Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, patience=patience))
    assert contents(tmp_path / "set") == sets.a_set()


def test_spoiling_works(place: Place) -> None:
    """The tests' own tool for flipping bits does what it says."""
    uri = place.new()
    place.put(uri, {"a.json": b"abc"})
    spoil(place, uri, "a.json", 1)
    assert place.get(uri, "a.json") == b"acc"
