"""What a set is before it is pulled: its form, its tensors, what is missing or cut short; one of many GGUF files; the hub's cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import hub as hubs
import places
import pytest
from mistral_weights.address import parse
from mistral_weights.describe import Describe, describe
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.mirror import Mirror, mirror
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from mistral_weights.verify import Verify, verify

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 14483498224\n"
CONFIG = json.dumps({"model_type": "mistral"}).encode()
Put = Callable[[dict[str, bytes]], str]


def tensors(**sizes: tuple[str, int]) -> bytes:
    """A safetensors file of tensors by name, each with its type and its bytes."""
    header, at = {}, 0
    for name, (dtype, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def index(*shards: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"layer.{n}": name for n, name in enumerate(shards)}}).encode()


@pytest.fixture(params=[*(pytest.param(kind, marks=pytest.mark.servers) for kind in ("hf", "s3", "gs", "az")), "file"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Put:
    """Puts a set into a store of each kind, or a folder; its URI."""

    def into_folder(files: dict[str, bytes]) -> str:
        folder = tmp_path / "place"
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return f"file://{folder}"

    def into_store(files: dict[str, bytes]) -> str:
        place: places.Place = request.getfixturevalue("stores")[request.param]
        uri = place.new()
        place.put(uri, files)
        return uri

    return into_folder if request.param == "file" else into_store


def test_the_headers_of_the_tensors_are_there_whole(put: Put, patience: Patience) -> None:
    big = {f"layer.{n}.weight": ("BF16", 2) for n in range(5000)}  # a header that is longer than the first read
    files = {"model-1.safetensors": tensors(a=("F32", 400), b=("I32", 128)), "model-2.safetensors": tensors(**big)}
    uri = put(files | {
        "config.json": CONFIG, "tekken.json": b"v" * (5 << 20), "LICENSE": b"x", "pytorch_model.bin": b"x",
    })  # fmt: skip
    got = describe(Describe(uri, patience=patience))
    assert got.form == "safetensors"
    for name, data in files.items():
        end = 8 + int.from_bytes(data[:8], "little")
        assert got.headers[name][:end] == data[:end]
    assert sorted(got.files) == ["LICENSE", "config.json", "model-1.safetensors", "model-2.safetensors", "tekken.json"]
    assert got.documents["config.json"] == CONFIG
    assert len(got.documents["tekken.json"]) == 4096


def test_mistrals_own_format_alone(put: Put, patience: Patience, tmp_path: Path) -> None:
    files = {"consolidated.safetensors": tensors(a=("BF16", 400)), "params.json": b'{"dim": 4}', "tokenizer.model.v3": b"x"}
    uri = put(files)
    got = describe(Describe(uri, patience=patience))
    assert (got.form, got.headers, got.documents["params.json"]) == (
        "consolidated", {"consolidated.safetensors": files["consolidated.safetensors"]}, b'{"dim": 4}',
    )  # fmt: skip
    assert sorted(pull(Pull(uri, tmp_path / "set", patience=patience)).files) == sorted(files)


WHOLE = tensors(a=("BF16", 100_000))
BROKEN = {
    "pointer": ({"model.safetensors": POINTER}, Kind.REFUSED, "model.safetensors at {uri} is a pointer of git-lfs, .* run git lfs pull"),
    "pointer of a GGUF": ({"m.gguf": POINTER}, Kind.REFUSED, "run git lfs pull"),
    "a shard is missing": (
        {"model-1.safetensors": WHOLE, "model.safetensors.index.json": index("model-1.safetensors", "model-2.safetensors")},
        Kind.DAMAGED, "{uri} lacks model-2.safetensors, which its index names",
    ),
    "pickles": ({"pytorch_model.bin": b"x"}, Kind.REFUSED, "only as pickles"),
    "many GGUF files": ({"a.Q2_K.gguf": b"x", "a.Q8_0.gguf": b"x"}, Kind.REFUSED, r"2 GGUF files \(a.Q2_K.gguf, a.Q8_0.gguf\)"),
    "a split GGUF": ({"a-00001-of-00002.gguf": b"x", "a-00002-of-00002.gguf": b"x"}, Kind.REFUSED, "join the parts"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_whole_is_refused(name: str, put: Put, patience: Patience) -> None:
    files, kind, says = BROKEN[name]
    uri = put({**files, "config.json": CONFIG})
    with pytest.raises(WeightsError, match=says.format(uri=uri)) as caught:
        describe(Describe(uri, patience=patience))
    assert caught.value.kind is kind


@pytest.mark.parametrize("name", ["pointer", "a shard is missing", "many GGUF files", "a split GGUF"])
def test_a_pull_refuses_it_before_a_byte_is_fetched(name: str, put: Put, patience: Patience, tmp_path: Path) -> None:
    files, kind, _ = BROKEN[name]
    with pytest.raises(WeightsError) as caught:
        pull(Pull(put({**files, "config.json": CONFIG}), tmp_path / "set", patience=patience))
    assert caught.value.kind is kind
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("place", ".set.lock")] == []


def test_one_of_many_gguf_files(put: Put, patience: Patience, tmp_path: Path) -> None:
    uri = put({"m.Q2_K.gguf": b"two" * 1000, "m.Q8_0.gguf": b"eight" * 1000, "config.json": CONFIG})
    one = f"{uri}/m.Q8_0.gguf"
    assert (got := describe(Describe(one, patience=patience))).form == "gguf"
    assert got.files == {"m.Q8_0.gguf": 5000}
    pulled = pull(Pull(one, tmp_path / "set", patience=patience))
    assert pulled.files == ("m.Q8_0.gguf",)
    assert pulled.source.endswith("/m.Q8_0.gguf")
    assert (tmp_path / "set" / "m.Q8_0.gguf").read_bytes() == b"eight" * 1000
    assert not (tmp_path / "set" / "m.Q2_K.gguf").exists()
    assert pull(Pull(one, tmp_path / "set", patience=patience)).already_there
    assert not verify(Verify(one, patience=patience)).damages
    with pytest.raises(WeightsError, match=r"has no m.Q4.gguf; its GGUF files are m.Q2_K.gguf, m.Q8_0.gguf"):
        describe(Describe(f"{uri}/m.Q4.gguf", patience=patience))


def test_one_of_the_gguf_files_of_a_mirror_is_checked_by_its_manifest(patience: Patience, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "from").mkdir(exist_ok=True)
        (tmp_path / "from" / f"{name}.gguf").write_bytes(name.encode() * 1000)
    mirror(Mirror(f"file://{tmp_path}/from/a.gguf", f"file://{tmp_path}/to", patience=patience))
    (tmp_path / "to" / "a.gguf").write_bytes(b"c" * 1000)
    with pytest.raises(WeightsError) as caught:
        pull(Pull(f"file://{tmp_path}/to/a.gguf", tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.DAMAGED
    with pytest.raises(WeightsError, match="is a file; name the bucket's folder"):
        mirror(Mirror(f"file://{tmp_path}/from/a.gguf", "s3://bucket/a.gguf", patience=patience))


@pytest.mark.parametrize(
    "uri",
    ["hf://a/b/x.gguf", "hf://a/b@main/c/x.gguf", "s3://b/x.gguf", "gs://b/c/x.gguf", "az://abc/d/x.gguf", "file:///a/x.gguf"],
)
def test_the_file_is_a_part_of_the_address(uri: str) -> None:
    address = parse(uri)
    assert (address.file, str(address)) == ("x.gguf", uri)
    assert "gguf" not in address.path + address.root


def snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """A snapshot as huggingface_hub keeps it: links to blobs beside it."""
    home = cache / "models--ORG--NAME"
    folder = home / "snapshots" / "0123abcd"
    for path in (home / "blobs", folder):
        path.mkdir(parents=True)
    for number, (name, data) in enumerate(files.items()):
        (home / "blobs" / str(number)).write_bytes(data)
        (folder / name).symlink_to(f"../../blobs/{number}")
    return folder


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path, patience: Patience) -> None:
    folder = snapshot(tmp_path, {"model.safetensors": WHOLE, "config.json": CONFIG})
    (tmp_path / "alias").symlink_to(folder)
    for where in (folder, tmp_path / "alias"):
        assert describe(Describe(f"file://{where}", patience=patience)).headers == {"model.safetensors": WHOLE}
        pull(Pull(f"file://{where}", tmp_path / f"set-{where.name}", patience=patience))
        assert (tmp_path / f"set-{where.name}" / "model.safetensors").read_bytes() == WHOLE


@pytest.mark.parametrize("where", ["../../../secret.json", "/etc/hostname", "../../../models--ORG--NAME2/x.json"])
def test_a_link_that_leaves_the_models_own_folder_is_refused(where: str, tmp_path: Path, patience: Patience) -> None:
    folder = snapshot(tmp_path, {"model.safetensors": WHOLE})
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "models--ORG--NAME2").mkdir()
    (tmp_path / "models--ORG--NAME2" / "x.json").write_text("{}")
    (folder / "config.json").symlink_to(where)
    with pytest.raises(WeightsError, match="is a link that leads out of its folder") as caught:
        describe(Describe(f"file://{folder}", patience=patience))
    assert caught.value.kind is Kind.REFUSED


@pytest.mark.parametrize("data", [WHOLE[:20], b"", b"<!DOCTYPE html>" * 20, (1 << 60).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_handed_on_as_it_is(data: bytes, put: Put, patience: Patience) -> None:
    """What the bytes mean is judged by who asked."""
    got = describe(Describe(put({"model.safetensors": data, "config.json": CONFIG}), patience=patience))
    assert (got.files["model.safetensors"], got.headers["model.safetensors"]) == (len(data), data)


def test_the_beginning_of_a_gguf_file(put: Put, patience: Patience) -> None:
    got = describe(Describe(put({"m.gguf": b"GGUF" + bytes(3 << 20)}), patience=patience))
    assert got.headers == {"m.gguf": b"GGUF" + bytes((1 << 20) - 4)}


def test_a_store_that_is_slow_costs_no_more_than_was_allowed(
    hub: hubs.Hub, stores: dict[str, places.Place], patience: Patience
) -> None:
    hub.add("test/slow", {f"model-{n}.safetensors": WHOLE for n in range(100)} | {"config.json": CONFIG})
    stores["hf"].proxy.delay = 0.2
    begun = time.monotonic()
    with pytest.raises(WeightsError, match=r"could not be read in 1 s; check the network"):
        describe(Describe("hf://test/slow", patience=patience, seconds=1.0))
    assert time.monotonic() - begun < 20
