"""A folder of any files as a set: sealed, put into a store, brought back whole or not at all, taken away."""

from __future__ import annotations

from pathlib import Path

import pytest
from mistral_weights.cli import main
from mistral_weights.errors import WeightsError
from mistral_weights.ls import Ls, ls
from mistral_weights.names import MANIFEST, UNFINISHED
from mistral_weights.pull import Pull, pull
from mistral_weights.push import Push, push
from mistral_weights.remove import Remove, remove
from mistral_weights.seal import seal, sealed

CHECKPOINT = {
    "optimizer.pt": b"moments",
    "trainer_state.json": b"{}",
    "rng_state.pth": b"r" * 9000,
    "optimizer_0/__0_0.distcp": b"shard",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    for name, data in CHECKPOINT.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CHECKPOINT}


def test_what_a_server_does_not_need_travels_in_a_sealed_folder(folder: Path, tmp_path: Path) -> None:
    manifest = seal(folder, "run", "step-7")
    assert [file.name for file in manifest.files] == sorted(CHECKPOINT)
    uri = f"file://{tmp_path}/bucket/a"
    assert push(Push(folder, uri)).sent == sum(map(len, CHECKPOINT.values()))
    assert ls(Ls(uri, form="folder")).revision == "step-7"
    pull(Pull(uri, tmp_path / "back", form="folder"))
    assert contents(tmp_path / "back") == CHECKPOINT
    found = sealed(tmp_path / "back")
    assert found is not None
    assert found.manifest == manifest


def test_a_folder_without_its_manifest_is_no_set(folder: Path, tmp_path: Path) -> None:
    assert sealed(folder) is None
    with pytest.raises(WeightsError, match="mistral-weights.json"):
        push(Push(folder, f"file://{tmp_path}/bucket/a"))
    with pytest.raises(WeightsError, match="no folder that was sealed"):
        pull(Pull(f"file://{folder}", tmp_path / "back", form="folder"))


@pytest.mark.parametrize("name", sorted(CHECKPOINT))
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_sealed_folder_that_has_changed_is_none(folder: Path, name: str, how: str) -> None:
    seal(folder, "run", "step-7")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    if how == "missing":
        (folder / name).unlink()
    assert sealed(folder) is None


def test_a_push_that_was_cut_off_is_not_brought(folder: Path, tmp_path: Path) -> None:
    seal(folder, "run", "step-7")
    target = tmp_path / "bucket" / "a"
    push(Push(folder, f"file://{target}"))
    (target / MANIFEST).unlink()
    (target / UNFINISHED).write_text("begun")
    with pytest.raises(WeightsError, match="never finished"):
        pull(Pull(f"file://{target}", tmp_path / "back", form="folder"))
    assert not (tmp_path / "back").exists()


def test_a_later_state_replaces_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/bucket/a"
    seal(folder, "run", "step-7")
    push(Push(folder, uri))
    (folder / "optimizer.pt").write_bytes(b"moments of later")
    seal(folder, "run", "step-8")
    assert push(Push(folder, uri)).sent == len(b"moments of later")
    assert ls(Ls(uri, form="folder")).revision == "step-8"


def test_only_what_the_manifest_names_is_removed(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "bucket" / "a"
    seal(folder, "run", "step-7")
    push(Push(folder, f"file://{target}"))
    (target / "of-somebody-else").write_text("stays")
    removed = remove(Remove(f"file://{target}"))
    assert removed.files == tuple(sorted(CHECKPOINT))
    assert [path.name for path in target.rglob("*") if path.is_file()] == ["of-somebody-else"]
    assert remove(Remove(f"file://{target}")).files == ()


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"file://{tmp_path}/bucket/a"
    seal(folder, "run", "step-7")
    assert main(["push", str(folder), uri]) == 0
    assert f"{uri} holds 4 files" in capsys.readouterr().out
    assert main(["pull", uri, str(tmp_path / "back"), "--format", "folder"]) == 0
    assert main(["remove", uri]) == 0
    assert "4 files removed" in capsys.readouterr().out


def test_links_are_not_sealed(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "optimizer.pt")
    with pytest.raises(WeightsError, match="no plain file"):
        seal(folder, "run", "step-7")
    assert not (folder / MANIFEST).exists()
