"""From the hub to each store and back to a folder; `verify` and `ls` on the way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import hub as hubs
import pytest
import sets
from mistral_weights import manifest as manifests
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.ls import Ls, ls
from mistral_weights.mirror import Mirror, mirror
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from mistral_weights.verify import Verify, verify
from places import Place, spoil
from test_pull import contents

TARGETS = ("s3", "gs", "az", "file")


def _target(kind: str, stores: dict[str, Place], tmp_path: Path) -> str:
    return f"file://{tmp_path}/mirror" if kind == "file" else stores[kind].new()


@pytest.mark.parametrize("kind", TARGETS)
def test_from_the_hub_to_each_store_and_back(
    kind: str, stores: dict[str, Place], hub: hubs.Hub, tmp_path: Path, patience: Patience
) -> None:
    files = sets.a_set()
    commit = hub.add("test/mirrored", {**files, **sets.unneeded()})
    target = _target(kind, stores, tmp_path)
    size = sum(map(len, files.values()))
    done = mirror(Mirror("hf://test/mirrored", target, patience=patience))
    assert (done.bytes, done.fetched, done.sent, done.revision) == (size, size, size, commit)
    again = mirror(Mirror("hf://test/mirrored", target, stage=tmp_path / "stage", patience=patience))
    assert again.sent == 0, "what the target holds is not sent again"
    pulled = pull(Pull(target, tmp_path / "back", patience=patience))
    assert contents(tmp_path / "back") == files
    assert (pulled.source, pulled.revision, pulled.license) == (f"hf://test/mirrored@{commit}", commit, "apache-2.0")
    proven = verify(Verify(target, patience=patience))
    assert (proven.damages, proven.unproven, proven.bytes) == ((), (), size)
    listed = ls(Ls(target, patience=patience))
    assert (listed.manifest, listed.bytes, {file.name for file in listed.files if file.wanted}) == (True, size, set(files))


@pytest.mark.parametrize("source", ["s3", "gs", "az", "file"])
@pytest.mark.parametrize("kind", TARGETS)
def test_from_each_store_to_each(source: str, kind: str, stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    files = sets.a_set(shard=200 * sets.KIB)
    if source == "file":
        uri = f"file://{tmp_path}/source"
        for name, data in files.items():
            (tmp_path / "source").mkdir(exist_ok=True)
            (tmp_path / "source" / name).write_bytes(data)
    else:
        uri = stores[source].new()
        stores[source].put(uri, files)
    target = _target(kind, stores, tmp_path)
    mirror(Mirror(uri, target, patience=patience))
    pull(Pull(target, tmp_path / "back", patience=patience))
    assert contents(tmp_path / "back") == files
    manifest = manifests.read((tmp_path / "back" / "mistral-weights.json").read_bytes(), "here")
    assert manifest.source == uri


@pytest.mark.parametrize("kind", ["s3", "gs", "az"])
def test_a_mirror_that_was_interrupted_is_no_source_until_it_is_finished(
    kind: str, stores: dict[str, Place], hub: hubs.Hub, tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, place = sets.a_set(), stores[kind]
    hub.add("test/interrupted", files)
    target = place.new()
    store = __import__(f"mistral_weights.stores.{kind}", fromlist=["x"])
    cls = {"s3": "S3Store", "gs": "GcsStore", "az": "AzureStore"}[kind]
    write = getattr(store, cls).write

    def fails(self: object, name: str, *rest: object) -> None:
        if name == "model-00002-of-00002.safetensors":
            raise WeightsError(Kind.UNREACHABLE, f"{name} could not be written; try again")
        write(self, name, *rest)

    request = Mirror("hf://test/interrupted", target, patience=replace(patience, tries=2))
    with monkeypatch.context() as patched:
        patched.setattr(getattr(store, cls), "write", fails)
        with pytest.raises(WeightsError, match="could not be written"):
            mirror(request)
    with pytest.raises(WeightsError, match="was never finished; run `mirror` to it again"):
        pull(Pull(target, tmp_path / "set", patience=patience))
    done = mirror(request)
    assert (done.fetched, done.sent < done.bytes) == (0, True), "what was fetched and sent is not fetched and sent again"
    pull(Pull(target, tmp_path / "set", patience=patience))
    assert contents(tmp_path / "set") == files


def test_a_mirror_over_another_revision_replaces_it(
    stores: dict[str, Place], hub: hubs.Hub, tmp_path: Path, patience: Patience
) -> None:
    hub.add("test/two", sets.a_set(1))
    repository, target = hub.repositories["test/two"], stores["s3"].new()
    mirror(Mirror("hf://test/two", target, patience=patience))
    repository.commits["e" * 40] = sets.a_set(2)
    mirror(Mirror("hf://test/two", target, "e" * 40, patience=patience))
    assert pull(Pull(target, tmp_path / "set", patience=patience)).revision == "e" * 40
    assert contents(tmp_path / "set") == sets.a_set(2)


@pytest.mark.parametrize("kind", TARGETS)
def test_random_bits_flipped_in_a_mirror_are_all_found_and_never_accepted(
    kind: str, stores: dict[str, Place], tmp_path: Path, patience: Patience
) -> None:
    files, dice = sets.a_set(shard=200 * sets.KIB), random.Random(kind)
    source = stores["s3"].new()
    stores["s3"].put(source, files)
    target = _target(kind, stores, tmp_path)
    mirror(Mirror(source, target, patience=patience))
    names = [name for name in files if files[name]] + ["mistral-weights.json"]

    def flip(name: str, at: int, bit: int) -> None:
        if kind == "file":
            path = tmp_path / "mirror" / name
            data = bytearray(path.read_bytes())
            data[at] ^= 1 << bit
            path.write_bytes(data)
        else:
            spoil(stores[kind], target, name, at, bit)

    def size(name: str) -> int:
        return (tmp_path / "mirror" / name).stat().st_size if kind == "file" else len(stores[kind].get(target, name))

    for number in range(8):
        name = names[number % len(names)]
        at, bit = dice.randrange(size(name)), dice.randrange(8)
        flip(name, at, bit)
        folder = tmp_path / f"set{number}"
        with pytest.raises(WeightsError) as caught:
            pull(Pull(target, folder, patience=patience))
        assert caught.value.kind in (Kind.DAMAGED, Kind.REFUSED), (name, at, bit)
        assert not folder.exists()
        try:
            found = [damage.name for damage in verify(Verify(target, patience=patience)).damages]
        except WeightsError as error:
            assert error.kind in (Kind.DAMAGED, Kind.REFUSED)
            found = ["mistral-weights.json"]
        assert found == [name], (at, bit)
        flip(name, at, bit)
    pull(Pull(target, tmp_path / "whole", patience=patience))
    assert contents(tmp_path / "whole") == files


def test_verify_finds_every_flipped_bit_of_a_folder(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    files, dice, folder = sets.a_set(shard=200 * sets.KIB), random.Random(3), tmp_path / "set"
    uri = stores["s3"].new()
    stores["s3"].put(uri, files)
    pull(Pull(uri, folder, range_bytes=64 * sets.KIB, patience=patience))
    assert verify(Verify(str(folder))).damages == ()
    for _ in range(200):
        path = folder / dice.choice([name for name in files if files[name]])
        at, bit = dice.randrange(path.stat().st_size), 1 << dice.randrange(8)
        with path.open("r+b") as handle:
            handle.seek(at)
            right = handle.read(1)
            handle.seek(at)
            handle.write(bytes([right[0] ^ bit]))
        (damage,) = verify(Verify(str(folder))).damages
        assert (damage.name, damage.what, damage.at) == (path.name, "content", (at // (64 * sets.KIB) * 64 * sets.KIB,))
        with path.open("r+b") as handle:
            handle.seek(at)
            handle.write(right)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_bytes(b"short")
    found = {damage.name: damage.what for damage in verify(Verify(str(folder))).damages}
    assert found == {"config.json": "missing", "tokenizer.json": "size"}


def test_a_manifest_shows_every_single_flipped_bit(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    uri = stores["s3"].new()
    stores["s3"].put(uri, {"model.safetensors": b"x" * 5000, "config.json": b"{}"})
    pull(Pull(uri, tmp_path / "set", patience=patience))
    data = (tmp_path / "set" / "mistral-weights.json").read_bytes()
    for at in range(len(data)):
        for bit in range(8):
            spoilt = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            with pytest.raises(WeightsError) as caught:
                manifests.read(spoilt, "here")
            assert caught.value.kind in (Kind.DAMAGED, Kind.REFUSED)


def test_a_target_that_refuses_is_said_before_anything_is_fetched(
    stores: dict[str, Place], hub: hubs.Hub, tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("test/refused", sets.a_set())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    asked = len(hub.requests)
    request = Mirror("hf://test/refused", "s3://weights/refused", stage=tmp_path / "stage", patience=patience)
    with pytest.raises(WeightsError, match="SignatureDoesNotMatch"):
        mirror(request)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", stores["s3"].env["AWS_SECRET_ACCESS_KEY"])
    for target in ("s3://no-such-bucket/x", "az://devstoreaccount1/no-such-container/x"):
        with pytest.raises(WeightsError, match="there is no (bucket|container)"):
            mirror(replace(request, target=target))
    assert len(hub.requests) == asked
    assert not (tmp_path / "stage").exists()


def test_a_hub_or_an_index_is_no_target(patience: Patience) -> None:
    for target in ("hf://a/b", "pypi://a@1"):
        with pytest.raises(WeightsError, match="weights cannot be written to") as caught:
            mirror(Mirror("s3://a/b", target, patience=patience))
        assert caught.value.kind is Kind.USAGE


def test_ls_says_what_a_pull_would_bring_and_whether_it_may(hub: hubs.Hub, patience: Patience) -> None:
    files = sets.a_set()
    hub.add("test/listed", {**files, **sets.unneeded()}, gated=True)
    with pytest.raises(WeightsError, match="test/listed is gated; open"):
        ls(Ls("hf://test/listed", patience=patience))
    hub.repositories["test/listed"].gated = False
    listed = ls(Ls("hf://test/listed", patience=patience))
    assert {file.name: file.checked_by for file in listed.files if file.wanted} == {
        name: "sha256" if len(data) > hubs.SMALL else "git-sha1" for name, data in files.items()
    }
    assert {file.name for file in listed.files if not file.wanted} == set(sets.unneeded())
