"""What is pulled and what is left; names that try to leave their folder."""

from __future__ import annotations

import shutil
import socket
import zipfile
from dataclasses import replace
from pathlib import Path

import hub as hubs
import pytest
import sets
from mistral_weights import manifest as manifests
from mistral_weights import names
from mistral_weights.address import Address, parse
from mistral_weights.cli import main
from mistral_weights.describe import Describe, describe
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.events import SetAside
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from mistral_weights.secrets import Secrets
from mistral_weights.source import look
from mistral_weights.stores import Contents, Opening, StoredFile
from mistral_weights.stores.file import FileStore
from mistral_weights.stores.pypi import PypiStore
from mistral_weights.verify import Verify, verify
from test_pull import contents

BESIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "LICENSE"]
LEFT = [
    "README.md",
    "modeling_x.py",
    "optimizer.pt",
    "training_args.bin",
    "pytorch_model.bin.index.json",
    "original/a.safetensors",
]


@pytest.mark.parametrize(
    ("weights", "form", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors", "params.json"], "auto", ["model.safetensors"]),
        (
            ["model.safetensors", "model.safetensors.index.json", "consolidated.safetensors", "params.json"],
            "consolidated",
            ["consolidated.safetensors", "params.json"],
        ),
        (["consolidated.safetensors", "params.json", "pytorch_model.bin"], "auto", ["consolidated.safetensors", "params.json"]),
        (["x.Q4_1.gguf", "params.json"], "auto", ["x.Q4_1.gguf"]),
        (["adapter_model.safetensors", "adapter_config.json"], "auto", ["adapter_config.json", "adapter_model.safetensors"]),
    ],
)
def test_one_form_of_the_weights_and_what_lies_beside(weights: list[str], form: str, chosen: list[str]) -> None:
    assert names.select([*weights, *BESIDE, *LEFT], form) == tuple(sorted([*chosen, *BESIDE]))


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickles_are_refused(pickle: str) -> None:
    with pytest.raises(WeightsError, match="only as pickles, which can run code") as caught:
        names.select([pickle, *BESIDE])
    assert caught.value.kind is Kind.REFUSED


def test_nothing_to_serve() -> None:
    with pytest.raises(WeightsError, match="holds no safetensors or GGUF weights") as caught:
        names.select(BESIDE)
    assert caught.value.kind is Kind.NOT_FOUND


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "a/../../evil.json", "/etc/passwd", "a//b", "./a", "", "a\\..\\b", "C:evil", "a\nb", "a\0b", "x" * 256],
)
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        names.select([name, "model.safetensors"])
    assert caught.value.kind is Kind.REFUSED


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/tmp/evil.json"])
def test_a_source_whose_names_leave_the_folder_is_not_pulled(
    name: str, hub: hubs.Hub, tmp_path: Path, patience: Patience
) -> None:
    hub.add("test/evil", {"model.safetensors": b"x" * 100, name: b"{}"})
    with pytest.raises(WeightsError, match="could leave its folder") as caught:
        pull(Pull("hf://test/evil", tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.REFUSED
    assert not list(tmp_path.rglob("evil.json"))


def test_links_that_lead_out_are_refused_and_links_inside_are_files(tmp_path: Path, patience: Patience) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "tokenizer.json").symlink_to("model.safetensors")
    pull(Pull(f"file://{source}", tmp_path / "set", patience=patience))
    assert contents(tmp_path / "set") == {"model.safetensors": b"weights", "tokenizer.json": b"weights"}
    (tmp_path / "secret.json").write_text("{}")
    (source / "config.json").symlink_to("../secret.json")
    with pytest.raises(WeightsError, match="is a link that leads out of its folder") as caught:
        pull(Pull(f"file://{source}", tmp_path / "other", patience=patience))
    assert caught.value.kind is Kind.REFUSED


@pytest.mark.parametrize(
    ("uri", "revision", "address"),
    [
        ("hf://mistralai/Mistral-7B-v0.1", "", Address("hf", "mistralai/Mistral-7B-v0.1")),
        ("hf://a/b@main/sub/folder", "", Address("hf", "a/b", "sub/folder", "main")),
        ("hf://a/b", "abc", Address("hf", "a/b", "", "abc")),
        ("s3://bucket/a/b/", "", Address("s3", "bucket", "a/b")),
        ("gs://bucket", "", Address("gs", "bucket")),
        ("az://account/container/a", "", Address("az", "account/container", "a")),
        ("file:///a%20b/c", "", Address("file", "/a b/c")),
        ("pypi://pkg@1.0/a/b.gguf", "", Address("pypi", "pkg", "a/b.gguf", "1.0")),
        ("pypi://pkg#sha256=" + "AB" * 32, "1.0", Address("pypi", "pkg", "", "1.0", "ab" * 32)),
        ("pypi://pkg@1.0", "sha256:" + "cd" * 32, Address("pypi", "pkg", "", "1.0", "cd" * 32)),
    ],
)
def test_addresses(uri: str, revision: str, address: Address) -> None:
    assert parse(uri, revision) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("uri", "revision"),
    [("bucket/x", ""), ("ftp://x/y", ""), ("s3://", ""), ("s3:///x", ""), ("s3://b/../c", ""), ("file:///a/../b", ""), ("file://a", ""),
     ("hf://a", ""), ("hf://a/b@x", "y"), ("s3://b/c", "rev"), ("pypi://a", ""), ("pypi://a@1#sha256=12", ""), ("az://a/b", ""),
     ("s3://b/a\\b", "")],
)  # fmt: skip
def test_addresses_that_cannot_be(uri: str, revision: str) -> None:
    with pytest.raises(WeightsError) as caught:
        parse(uri, revision)
    assert (caught.value.kind, caught.value.exit_code) == (Kind.USAGE, 2)


def test_a_wheel_is_read_and_never_run(tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of a folder that pip is pointed at; its setup and modules would leave a trace."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_weights-1.2-py3-none-any.whl"
    trace = tmp_path / "trace"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_weights/__init__.py", f"open({str(trace)!r}, 'w')")
        archive.writestr("tiny_weights/data/tiny.Q4_1.gguf", b"GGUF" + bytes(100_000))
        archive.writestr("tiny_weights/data/config.json", "{}")
        archive.writestr(
            "tiny_weights-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\nLicense: MIT\n"
        )
        archive.writestr("tiny_weights-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_weights-1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    done = pull(Pull("pypi://tiny-weights@1.2", tmp_path / "set", patience=patience))
    assert contents(tmp_path / "set") == {"tiny.Q4_1.gguf": b"GGUF" + bytes(100_000), "config.json": b"{}"}
    assert (done.license, done.revision) == ("MIT", "1.2")
    pin = done.source.partition("#")[2]
    pull(Pull(f"pypi://tiny-weights@1.2/tiny_weights/data/tiny.Q4_1.gguf#{pin}", tmp_path / "file", patience=patience))
    assert list(contents(tmp_path / "file")) == ["tiny.Q4_1.gguf"]
    for uri, said in {
        f"pypi://tiny-weights@1.2#sha256={'0' * 64}": "another sha256",
        "pypi://tiny-weights@9": "no such wheel",
        "pypi://tiny-weights@1.2/nowhere": "has no nowhere",
    }.items():
        with pytest.raises(WeightsError, match=said):
            pull(Pull(uri, tmp_path / "none", patience=patience))
    assert not trace.exists()


def test_an_index_that_does_not_answer_is_not_one_without_the_wheel(
    tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    store = PypiStore(parse("pypi://tiny-weights@1.2"), Opening(Secrets(), tmp_path, patience))
    with pytest.raises(
        WeightsError, match=r"tiny-weights==1.2 cannot be had: its index does not answer; check the network"
    ) as caught:
        store.list()
    assert caught.value.kind is Kind.UNREACHABLE
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        with pytest.raises(WeightsError, match=r"did not arrive in 2 s; check the network") as caught:
            describe(Describe("pypi://tiny-weights@1.2", patience=replace(patience, tries=1, stall=60.0), seconds=2.0))
    assert caught.value.kind is Kind.UNREACHABLE


def test_a_wheel_whose_names_leave_the_folder_is_refused(
    tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "evil-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("evil/a.gguf", b"GGUF")
        archive.writestr("evil/../../../../tmp/evil.json", "{}")
    store = PypiStore(parse("pypi://evil@1.0"), Opening(Secrets(), tmp_path / "scratch", patience))
    monkeypatch.setattr(store, "_wheel", lambda: wheel)
    with pytest.raises(WeightsError, match="could leave its folder"):
        store.list()


def test_the_names_of_shards_count_those_that_are_absent() -> None:
    assert names.absent_shards(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "config.json"]) == (
        "model-00002-of-00003.safetensors",
    )
    assert names.absent_shards(["model.safetensors", "model-00001-of-00001.safetensors", "consolidated.00.safetensors"]) == ()


def test_of_a_name_that_counts_very_many_shards_the_first_absent_ones_are_named() -> None:
    many = [f"m{number}-00001-of-99999.safetensors" for number in range(500)]
    found = names.absent_shards(many)
    assert len(found) < 500 * 1000
    assert names.listed(found).startswith("m0-00002-of-99999.safetensors, ")


@pytest.mark.parametrize("form", ["auto", "folder"])
def test_a_source_with_more_files_than_any_set_is_refused(form: str) -> None:
    """70,000 empty files of a wheel took minutes to pull."""
    few = ["model.safetensors", *(f"{number}.json" for number in range(names.MOST_FILES - 1))]
    assert len(names.select(few, form)) == names.MOST_FILES
    with pytest.raises(WeightsError, match="has 10001 files to pull, and no set has more than 10000"):
        names.select([*few, "config.json"], form)


@pytest.mark.parametrize("name", [[], {}, 5, None])
def test_a_manifest_whose_names_are_no_texts_is_damaged(name: object) -> None:
    file = manifests.ManifestFile("config.json", 0, "0" * 64, "0" * 64, (), "size")
    found = manifests.Manifest("s3://b/m", "", "", "", 4096, (replace(file, name=name),))  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="damaged") as caught:
        manifests.read(manifests.render(found), "here")
    assert caught.value.kind is Kind.DAMAGED


def a_wheel(path: Path, files: dict[str, bytes], record: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("w-1.0.dist-info/RECORD", record)
    return path


def listing(wheel: Path, scratch: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PypiStore(parse("pypi://w@1.0"), Opening(Secrets(), scratch, patience))
    scratch.mkdir()
    (scratch / "wheel").mkdir()
    monkeypatch.setattr(store, "_wheel", lambda: wheel)
    store.list()


def test_a_wheel_that_unpacks_to_more_than_weights_do_is_refused_before_a_byte_is_written(
    tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 MB of zeros and of many files, and one that says a wrong size."""
    wheel = a_wheel(tmp_path / "w.whl", {"w/a.gguf": bytes(400 * 2**20)})
    assert wheel.stat().st_size < 2**20
    with pytest.raises(WeightsError, match="as no weights do") as caught:
        listing(wheel, tmp_path / "one", patience, monkeypatch)
    assert caught.value.kind is Kind.REFUSED
    assert not (tmp_path / "one" / "wheel" / "unpacked").exists()
    small = a_wheel(tmp_path / "small.whl", {"w/a.gguf": b"GGUF" + bytes(2**20)})
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(WeightsError, match="are still to come; free some space"):
            listing(small, tmp_path / "two", patience, monkeypatch)
    data = bytearray(small.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = (100).to_bytes(4, "little")  # the directory's size of the first file
    (tmp_path / "lies.whl").write_bytes(data)
    with pytest.raises(WeightsError, match="arrived damaged"):
        listing(tmp_path / "lies.whl", tmp_path / "three", patience, monkeypatch)


def test_a_wheel_that_names_a_place_before_its_beginning_is_damaged(
    tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = a_wheel(tmp_path / "w-1.0-py3-none-any.whl", {"w/model.safetensors": b"abc"})
    data = bytearray(wheel.read_bytes())
    data[-6:-2] = (len(data) // 2).to_bytes(4, "little")  # where its directory begins
    wheel.write_bytes(data)
    with pytest.raises(WeightsError, match="arrived damaged"):
        listing(wheel, tmp_path / "scratch", patience, monkeypatch)


@pytest.mark.parametrize("record", ["\udcff", "a,sha256=%%%,1\n", '"'], ids=["no text", "no base64", "no csv"])
def test_a_wheel_with_a_record_that_is_none(
    record: str, tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = record.encode("utf-8", "surrogateescape").decode("latin-1")
    wheel = a_wheel(tmp_path / "w.whl", {"w/a.gguf": b"GGUF" * 10}, data)
    try:
        listing(wheel, tmp_path / "one", patience, monkeypatch)
    except WeightsError as error:
        assert "\n" not in str(error)


def test_a_wheel_with_a_directory_that_is_larger_than_any(
    tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = a_wheel(tmp_path / "w.whl", {"w/a.gguf": b"GGUF"})
    data = bytearray(wheel.read_bytes())
    at = data.rindex(b"PK\x05\x06")
    data[at + 12 : at + 16] = (2**31).to_bytes(4, "little")
    wheel.write_bytes(data)
    with pytest.raises(WeightsError, match="directory of 2147483648 bytes"):
        listing(wheel, tmp_path / "one", patience, monkeypatch)


@pytest.mark.parametrize(
    ("one", "other"),
    [("config.json", "Config.JSON"), ("caf\u00e9.json", "cafe\u0301.json"), ("stra\u00dfe.json", "STRASSE.json")],
)
def test_two_names_that_are_one_file_on_some_machines_are_refused(one: str, other: str) -> None:
    with pytest.raises(WeightsError, match="one file on some machines"):
        names.select(["model.safetensors", one, other])


@pytest.mark.parametrize("unnamed", ["chat_template.jinja", "extra.safetensors", ".hidden", "templates/a.jinja"])
def test_what_was_added_to_a_pulled_set_is_found_and_set_aside(unnamed: str, tmp_path: Path, patience: Patience) -> None:
    source, folder = tmp_path / "source", tmp_path / "node" / "set"
    source.mkdir()
    for name, data in sets.a_set().items():
        (source / name).write_bytes(data)
    pull(Pull(f"file://{source}", folder, patience=patience))
    (folder / unnamed).parent.mkdir(exist_ok=True)
    (folder / unnamed).write_text("{{ evil }}")
    found = verify(Verify(str(folder)))
    assert [(one.name, one.what) for one in found.damages] == [(unnamed, "unexpected")]
    assert main(["verify", str(folder)]) == 6
    said: list[object] = []
    assert pull(Pull(f"file://{source}", folder, patience=patience), said.append).already_there
    [event] = [one for one in said if isinstance(one, SetAside)]
    assert event.names == (unnamed,)
    assert (Path(event.where) / unnamed).read_text() == "{{ evil }}"
    assert not (folder / unnamed).exists()
    assert verify(Verify(str(folder))).damages == ()


def test_a_listing_that_lies(tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, count, says in (
        (2**60, 1, "has 1152921504606846976 bytes by its store"),
        (-1, 1, "has -1 bytes"),
        (1, 2, "lists a file twice"),
    ):
        files = (StoredFile("model.safetensors", size, ""),) * count
        store = FileStore(tmp_path)
        monkeypatch.setattr(store, "list", lambda files=files: Contents(files, "file:///x"))
        with pytest.raises(WeightsError, match=says):
            look(store, parse("file:///x"), "auto", patience, lambda event: None)


def mirrored(tmp_path: Path, patience: Patience, seed: int) -> tuple[str, str]:
    """A set with a manifest in a folder, as a bucket has it: its URI and its digest."""
    source, folder = tmp_path / f"source{seed}", tmp_path / f"bucket{seed}"
    source.mkdir()
    for name, data in sets.a_set(seed).items():
        (source / name).write_bytes(data)
    return f"file://{folder}", pull(Pull(f"file://{source}", folder, patience=patience)).digest


def test_a_digest_pins_the_weights_and_not_whoever_wrote_their_manifest(tmp_path: Path, patience: Patience) -> None:
    uri, digest = mirrored(tmp_path, patience, 1)
    other, another = mirrored(tmp_path, patience, 2)
    assert digest != another
    target = tmp_path / "node" / "set"
    said: list[object] = []
    with pytest.raises(WeightsError, match=f"holds weights with the digest {another}, and {digest} is pinned") as caught:
        pull(Pull(other, target, digest=digest, patience=patience), said.append)
    assert caught.value.kind is Kind.REFUSED
    assert (said, target.exists()) == ([], False)  # nothing was fetched
    assert pull(Pull(uri, target, digest=digest, patience=patience)).digest == digest
    assert pull(Pull(uri, target, digest=digest, patience=patience)).already_there
    shutil.rmtree(tmp_path / "bucket1")
    shutil.copytree(tmp_path / "bucket2", tmp_path / "bucket1")  # somebody rewrites the bucket, manifest and all
    assert pull(Pull(uri, target, digest=digest, patience=patience)).already_there
    with pytest.raises(WeightsError, match="is pinned"):
        pull(Pull(uri, tmp_path / "new", digest=digest, patience=patience))
    assert pull(Pull(uri, target, digest=another, patience=patience)).digest == another  # asked for anew: replaced
    assert verify(Verify(str(target), digest=another)).digest == another
    for where in (str(target), uri):
        with pytest.raises(WeightsError, match="is pinned"):
            verify(Verify(where, digest=digest))
    assert main(["verify", str(target), "--digest", digest]) == 10
    assert main(["verify", str(target), "--digest", "sha256:0"]) == 2


def test_a_source_without_a_manifest_is_held_against_the_digest_before_it_appears(tmp_path: Path, patience: Patience) -> None:
    _, digest = mirrored(tmp_path, patience, 1)
    _, another = mirrored(tmp_path, patience, 2)
    target = tmp_path / "set"
    with pytest.raises(WeightsError, match="is pinned"):
        pull(Pull(f"file://{tmp_path}/source1", target, digest=another, patience=patience))
    assert not target.exists()
    done = pull(Pull(f"file://{tmp_path}/source1", target, digest=digest, patience=patience))
    assert (done.digest, done.unproven) == (digest, done.files)
