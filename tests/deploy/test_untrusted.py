"""JSON that others wrote is read within bounds, by every reader of ours: one line, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_contract import adapters, architecture, figures, gguf, phases, quantization, routes, safetensors, sets, untrusted

HOSTILE = {
    "nested lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "never closed": b'{"a":' * 100_000,
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a float out of range": b'{"a": 1e999}',
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a number of 400 digits": b'{"a": ' + b"9" * 400 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "no text": b"\xff\xfe",
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "too large": b'{"a": "' + b"x" * untrusted.MOST_BYTES + b'"}',
}
READERS: dict[str, Callable[[bytes], object]] = {
    "config.json": lambda data: architecture.read_file("config.json", data),
    "params.json": lambda data: architecture.read_file("params.json", data),
    "figures": lambda data: figures.read(data),
    "adapter": lambda data: adapters.judge({adapters.CONFIG: len(data)}, lambda _name, start, stop: data[start:stop], None),
    "safetensors": lambda data: safetensors.read(len(data) + 8, len(data).to_bytes(8, "little") + data),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_reader_takes_it(reader: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as refused:
        READERS[reader](HOSTILE[kind])
    said = str(refused.value)
    assert said.isprintable()
    assert len(said) <= untrusted.LONGEST_LINE


def test_what_is_read_is_the_object_and_a_number_without_a_limit_passes() -> None:
    assert untrusted.read('{"model_max_length": 1000000000000000019884624838656, "x": [1.5, "\\ud83d\\ude00"]}') == {
        "model_max_length": 1000000000000000019884624838656, "x": [1.5, "😀"],
    }  # fmt: skip
    deepest = untrusted.MOST_DEPTH - 1
    assert untrusted.read('{"a":' + "[" * deepest + "]" * deepest + "}")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(untrusted.NotRead, match="no plain file"):
        untrusted.read_file(tmp_path / "config.json")
    (tmp_path / "sparse.json").touch()
    os.truncate(tmp_path / "sparse.json", 1 << 40)
    with pytest.raises(untrusted.NotRead, match="1099511627776 bytes"):
        untrusted.read_file(tmp_path / "sparse.json")


@pytest.mark.parametrize(
    "values", [[float("nan")], [float("inf")], [10**400], ["0"], [True], [None], [[0.0]], [], [0.0, 0.0]], ids=str
)
def test_what_is_no_finite_number_is_no_figure(values: list[Any]) -> None:
    with pytest.raises(ValueError, match="not as many finite numbers"):
        figures.difference(values, [0.0])
    with pytest.raises(ValueError, match="not as many finite numbers"):
        figures.difference([0.0], values)
    stored = {"prompt_token_ids": [1], "forced_token_ids": [2], "logprobs": values}
    with pytest.raises(ValueError, match=r"\S"):
        figures.read(json.dumps(stored))


@pytest.mark.parametrize("tokens", [[10**30], [-1], ["1"], [1.0], [True], [[1]], list(range(200_000))], ids=lambda t: str(t)[:20])
def test_token_ids_are_bounded(tokens: list[Any]) -> None:
    with pytest.raises(ValueError, match="token ids are missing or wrong"):
        figures.read(json.dumps({"prompt_token_ids": tokens, "forced_token_ids": [2], "logprobs": [-1.0]}))


def header(**entry: Any) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        (2**63 + 5).to_bytes(8, "little") + b"{}",
        header(shape=[-1]), header(shape=[2**60]), header(shape=[1] * 100), header(shape=[1.0]), header(shape="1"), header(shape=[True]),
        header(shape=[10**39] * 8), header(data_offsets=[4, 0]), header(data_offsets=[0, 2**60]), header(data_offsets=[-4, 0]),
        header(data_offsets=[0, 4, 8]), header(data_offsets=None), header(dtype=None), header(dtype=["F32"]), header(dtype="\x1b[2J"),
    ],
    ids=lambda data: str(data[:60]),
)  # fmt: skip
def test_headers_of_safetensors_that_lie(data: bytes) -> None:
    with pytest.raises(safetensors.Damaged) as refused:
        safetensors.read(len(data) + 4, data)
    assert str(refused.value).isprintable()


def test_tensors_that_overlap_or_leave_a_gap() -> None:
    for second in ([2, 6], [6, 10], [0, 4]):
        text = json.dumps(
            {name: {"dtype": "F32", "shape": [1], "data_offsets": at} for name, at in (("a", [0, 4]), ("b", second))}
        ).encode()
        data = len(text).to_bytes(8, "little") + text
        with pytest.raises(safetensors.Damaged):
            safetensors.read(len(data) + second[1], data)


def gguf_of(keys: int, body: bytes, tensors: int = 0) -> bytes:
    return gguf.MAGIC + struct.pack("<IQQ", 3, tensors, keys) + body


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "data",
    [
        gguf_of(2**60, b""), gguf_of(0, b"", 2**60), gguf_of(1, struct.pack("<Q", 2**40)), gguf_of(1, struct.pack("<Q", 2**64 - 1)),
        gguf_of(1, entry(b"a", 9, struct.pack("<IQ", 4, 2**60))), gguf_of(1, entry(b"a", 9, struct.pack("<IQ", 4, 2**20))),
        gguf_of(1, entry(b"a", 9, struct.pack("<IQ", 9, 1))), gguf_of(1, entry(b"a", 99, b"")),
        gguf_of(2, entry(b"a", 4, b"\0" * 4) * 2), gguf_of(0, struct.pack("<QI", 0, 2**31) + b"\0" * 64, 1),
    ],
    ids=lambda data: str(data[8:40]),
)  # fmt: skip
def test_gguf_headers_that_lie(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        gguf.read(data, len(data))


@pytest.mark.parametrize("heads", [0, "x", float("nan"), float("inf"), True, -3, 10**39])
def test_sizes_of_a_gguf_file_that_are_none(heads: Any) -> None:
    values = {
        "general.architecture": "llama", "llama.embedding_length": 64, "llama.attention.head_count": heads, "llama.context_length": 128,
        "llama.block_count": 2, "llama.feed_forward_length": 64, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 100,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"\S"):
        gguf.model(gguf.Metadata(values, frozenset({"output.weight"})))


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", [None, 4096, 10**39, -1, 0, 1.5e300, "16", [16], True, {"a": 1}])
def test_ranks_that_no_adapter_has(field: str, value: Any) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]} | {field: value}
    data = json.dumps(config).encode()
    with pytest.raises(adapters.AdapterError, match=r"\S"):
        adapters.judge({adapters.CONFIG: len(data)}, lambda _name, start, stop: data[start:stop], None)


def test_a_pattern_of_ranks_that_would_take_for_ever_is_refused() -> None:
    with pytest.raises(adapters.AdapterError, match="take for ever"):
        adapters.ranks({"r": 8, "rank_pattern": {"((a+)+)+": 8}})


@pytest.mark.parametrize(
    ("patterns", "says"),
    [({f"x{number}": 8 for number in range(4097)}, "4097 patterns"), ({f".*{number}": 8 for number in range(33)}, "33 patterns"),
     ({"(?i)q_proj": 8}, "is no pattern")],
)  # fmt: skip
def test_patterns_of_ranks_are_bounded_and_of_one_expression(patterns: dict[str, int], says: str) -> None:
    """Each is tried on each module: 500 of them took 9 s, and 20,000, of 350 kB, minutes."""
    with pytest.raises(adapters.AdapterError, match=says):
        adapters.ranks({"r": 8, "rank_pattern": patterns})


def test_the_first_pattern_that_matches_the_end_of_a_module_has_its_rank() -> None:
    found = adapters.ranks({"r": 8, "rank_pattern": {"layers.1.mlp.up_proj": 4, "up_proj": 16}})
    assert [
        adapters.rank_of(found, f"model.layers.{name}") for name in ("1.mlp.up_proj", "2.mlp.up_proj", "1.mlp.down_proj")
    ] == [4, 16, 8]


@pytest.mark.parametrize(
    "found",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [0, 0]},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["x"] * 100_000},
        {"quant_method": "gptq", "bits": 10**39, "group_size": 128, "desc_act": False, "sym": True},
        {"quant_method": "compressed-tensors", "config_groups": [[[]]]},
    ],
)
def test_quantization_that_lies(found: dict[str, Any]) -> None:
    with pytest.raises(quantization.NotServed):
        quantization.read({"quantization_config": found})


def a_set(folder: Path, **named: bytes) -> Path:
    folder.mkdir()
    for name, data in named.items():
        (folder / name).write_bytes(data)
    (folder / "mistral-weights.json").write_text(json.dumps(sets.describe(folder, "mistral-weights.json")))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja", "extra.safetensors", "generation_config.json", "modeling_evil.py", ".hidden", "additional_chat_templates/a.jinja",
        "CONFIG", "config\u0301", "mistralctl-canary.json", "mistral-weights.json ",
    ],
)  # fmt: skip
def test_what_the_manifest_does_not_name_is_found(tmp_path: Path, name: str) -> None:
    folder = a_set(tmp_path / "set", config=b"{}", weights=b"x" * 100)
    assert sets.check(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(sets.Wrong, match="does not name"):
        sets.check(folder)


@pytest.mark.parametrize("how", ["link", "folder link", "hard link", "pipe"])
def test_links_and_pipes_in_a_set_are_found(tmp_path: Path, how: str) -> None:
    folder = a_set(tmp_path / "set", config=b"{}")
    {
        "link": lambda: (folder / "a.jinja").symlink_to(tmp_path / "nowhere"),
        "folder link": lambda: (folder / "templates").symlink_to(tmp_path),
        "hard link": lambda: (folder / "b.json").hardlink_to(folder / "config"),
        "pipe": lambda: os.mkfifo(folder / "c.json"),
    }[how]()
    with pytest.raises(sets.Wrong, match="does not name"):
        sets.check(folder)


def test_a_named_file_that_was_exchanged_is_found(tmp_path: Path) -> None:
    folder = a_set(tmp_path / "set", config=b"{}", template=b"aaaa")
    (folder / "template").write_bytes(b"bbbb")
    with pytest.raises(sets.Wrong, match="is not the file that its manifest names"):
        sets.check(folder)
    (folder / "template").unlink()
    with pytest.raises(sets.Wrong, match="lacks template"):
        sets.check(folder)
    (folder / "template").symlink_to(folder / "config")
    with pytest.raises(sets.Wrong, match="no plain file"):
        sets.check(folder)


@pytest.mark.parametrize(
    "files", [None, [1], [{"name": "a"}], [{"name": "../a", "sha256": "", "size": 1}], [{"name": "a", "sha256": "", "size": "1"}]]
)
def test_a_manifest_that_names_no_files(tmp_path: Path, files: Any) -> None:
    (tmp_path / "mistral-weights.json").write_text(json.dumps({"files": files}))
    with pytest.raises(sets.Wrong, match="should list files"):
        sets.check(tmp_path)


PHASE = '{"phase": "engine", "event": "start", "at": %s}'


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"phase": ' * 100_000, PHASE % ("1" + "0" * 400), PHASE % "NaN", PHASE % "[1]", PHASE.replace('"start"', "[1]") % 1,
     "null"],
    ids=lambda text: str(text[:60]),
)  # fmt: skip
def test_a_line_of_a_log_that_looks_like_a_phase_is_none(text: str) -> None:
    assert phases.parse(f"{phases.MARK}{text}") is None


def test_a_phase_says_nothing_that_a_terminal_obeys() -> None:
    found = phases.parse(
        phases.MARK + json.dumps({"phase": "a\x1b[2J", "event": "fail", "at": 1, "message": "b\x1b]0;c\x07" + "d" * 10_000})
    )
    assert found is not None
    assert found.phase.isprintable()
    assert found.message.isprintable()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"rows": ' * 100_000, '{"routes": 1e999, "rows": []}', '{"routes": 1, "rows": {}}']
)
def test_a_report_of_a_gate_that_is_none(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert routes.read(text).rows == ()
