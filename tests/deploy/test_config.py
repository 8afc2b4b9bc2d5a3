"""Every bad input gives one clear error or a valid spec, never anything else."""

from __future__ import annotations

import contextlib
import json
import string
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_contract import vllm_options
from mistralctl import checkpoints, plan, tasks
from mistralctl.config import load, parse_yaml
from mistralctl.errors import UserError
from mistralctl.fields import between, docs, dumped_schema, fields, json_schema
from mistralctl.finetune_spec import FinetuneSpec
from mistralctl.spec import DeploymentSpec
from mistralctl.tasks import serve

# Text of mistralctl.yaml, and how the error begins (after the file's path) and what it says to do.
BAD_FILES = [
    ("max_model_len: abc", ": max_model_len: should be a whole number, is text 'abc'"),
    ("max_model_len: '4k'", ": max_model_len: should be a whole number, is text '4k'"),
    ("max_model_len: '4096.0'", ": max_model_len: should be a whole number, is number 4096.0"),
    ("max_price: '2$'", ": max_price: should be a number, is text '2$'"),
    ("max_model_len: 1.5", ": max_model_len: should be a whole number, is number 1.5"),
    ("max_model_len: -1", ": max_model_len: -1 is out of range; it must be at least 16"),
    ("max_model_len: 99999999999", ": max_model_len: 99999999999 is out of range; it must be at most 1048576"),
    ("max_price: .nan", "a number"),
    ("max_price: 0", ": max_price: 0 is out of range; it must be more than 0"),
    ("spot: 'maybe'", ": spot: should be true or false, is text 'maybe'; write for example true"),
    ("spot: null", ":1: spot: should be true or false, is null; write for example true"),
    ("spot: [true]", ":1: spot: should be true or false, is list [true]; write true"),
    ("cloud: null", ":1: cloud: should be a list, is null; write for example [aws, gcp]"),
    ("cloud:\n- aws\n- gpc", ":3: cloud[1]: 'gpc' is not one of aws, gcp, azure, local; did you mean gcp?"),
    ("cloud: AWS", ":1: cloud[0]: 'AWS' is not one of aws, gcp, azure, local; did you mean aws?"),
    ("Cloud: aws", ":1: Cloud: unknown key 'Cloud'; did you mean cloud?"),
    ("\nmax_model_len: 16k", ":2: max_model_len: should be a whole number, is text '16k'; write 16384, or 16000"),
    ("max_model_len: 32,768", "max_model_len: should be a whole number, is text '32,768'; write 32768"),
    ("max_price: 1.50 USD", ":1: max_price: should be a number, is text '1.50 USD'; write 1.50"),
    ("max_model_len: [4096]", ":1: max_model_len: should be a whole number, is list [4096]; write 4096"),
    ("name: 123", ":1: name: '123' is not a name that every cloud accepts; use 1 to 40 small letters, digits and single hyphens"),
    ("name: My Model", "a letter first, no hyphen last, for example my-model"),
    ("region: [us-east-1]", ":1: region: should be text, is list ['us-east-1']; write us-east-1"),
    ("region: {us-east-1: a}", ":1: region: should be text, is mapping {'us-east-1': 'a'}; write for example us-east-1"),
    ("model: [a, b]", ":1: model: should be text, is list ['a', 'b']; write for example mistral-7b-v0.3"),
    (
        "vllm_args: {seed: 7, enforce_eager: true}",
        ":1: vllm_args: should be a list of arguments; write [--seed=7, --enforce-eager]",
    ),
    ("vllm_args: 7", ":1: vllm_args: should be a list, is whole number 7; write for example [--seed=7]"),
    ("vllm_args: seed=7", ":1: vllm_args: 'seed=7' is not an argument; write it in one piece, for example --seed=7"),
    (
        "vllm_args: ['-tp=2']",
        "'-tp=2' is a short argument of --tensor-parallel-size, which mistralctl sets itself: use --tensor-parallel",
    ),
    ("vllm_args: -O3", "'-O3' is a short argument of --optimization-level; write --optimization-level=3"),
    ("lora:\n- a=./x\n- a=./y", ": lora: the adapter 'a' is given twice; keep one of them"),
    ("lora:\n  a: ./x\n  a: ./y", ":3:3: the key 'a' stands twice; keep one of them"),
    ("lora: 7", ":1: lora: should be a mapping of names to URIs, is whole number 7; write for example {sql: s3://bucket/sql}"),
    (
        "image: [ami-1, ami-2]",
        ": image: 'ami-1' does not say its cloud; write CLOUD=ID for each, for example aws=ami-0123456789abcdef0",
    ),
    ("ttl: 12H\n", ": ttl: '12H' is not a duration; write 12h"),
    ("port: 010000_0", ": port: 010000_0 is out of range; it must be at most 65535"),
    ("cloud: gpc", ": cloud[0]: 'gpc' is not one of aws, gcp, azure, local; did you mean gcp?"),
    ("cloud: 3", ": cloud: should be a list, is whole number 3"),
    ("cloud: [gpc]", ": cloud[0]: 'gpc' is not one of aws, gcp, azure, local; did you mean gcp?"),
    ("cloud: [local, aws]", "local stands alone"),
    ("clouds: [gcp]", "unknown key 'clouds'; did you mean cloud?"),
    ("max-model-len: 12", "unknown key 'max-model-len'; did you mean max_model_len?"),
    ("port: 80", ": port: 80 is out of range; it must be at least 1024"),
    ("port: 8000\nport: 8001", ":2:1: the key 'port' stands twice; keep one of them"),
    ("a: &x [1]\nb: *x", "an alias (*) is not allowed here"),
    ("<<: {port: 1}", "a merge key (<<) is not allowed here"),
    ("[1, 2]", ": should be a mapping of options (name: value), is a list"),
    ("just words", ": should be a mapping of options (name: value), is a text"),
    ("1: 2", "the key 1 is not a word"),
    ("? [a]\n: b", "a key must be a plain word"),
    ("port: [", "expected"),
    ("\tport: 1", ":1:1: a tab stands where YAML takes spaces only"),
    ("port: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    ("idle: 30", ": idle: '30' is not a duration; write 30m for minutes, 30h for hours or 30d for days"),
    ("ttl: '30'", ": ttl: '30' is not a duration; write 30m for minutes"),
    ("idle: 1.5", ": idle: '1.5' is not a duration; write for example 30m"),
    ("ttl: null", ": ttl: 'null' is not a duration; write never to switch it off"),
    ("ttl:", ": ttl: 'null' is not a duration; write never to switch it off"),
    ("idle: off", ": idle: 'off' is not a duration; write never to switch it off"),
    ("idle: on", ": idle: 'on' is not a duration; write for example 30m"),
    ("idle: 0", ": idle: '0' is not a duration; write never to switch it off"),
    ("idle: 30 min", ": idle: '30 min' is not a duration; write 30m"),
    ("idle: 2Hours", ": idle: '2Hours' is not a duration; write 2h"),
    ("use_spot: true", "unknown key 'use_spot'; mistralctl calls it spot"),
    ("accelerators: {L4: 1}", ": accelerators: should be text; write L4:1"),
    ("accelerators: {L4: null}", ": accelerators: should be text; write L4:1"),
    ("accelerators: ['L4:1']", ": accelerators: should be text; write L4:1"),
    ("accelerators: [L4, A10G]", ": accelerators: takes one kind, 2 are given; write one of them, L4, or leave the line out"),
    ("accelerators: {A100: 4, A100-80GB: 2}", ": accelerators: takes one kind, 2 are given; write one of them, A100:4, or leave"),
    ("accelerators: []", ": accelerators: takes one kind, 0 are given"),
    ("accelerators: RTX4090", "is not a GPU that mistralctl plans with; one of"),
    (
        "model: mistralai/Mistral-7B-Instruct-v0.2",
        "is a repository of the hub; write mistral-7b-instruct-v0.2, or hf://mistralai/",
    ),
    ("model: Qwen/Qwen3-8B", "is a repository of the hub; write hf://Qwen/Qwen3-8B"),
    ("cloud:\t[aws]", ":1:7: a tab stands where YAML takes spaces only"),
    (
        "name: x\nresources: {cloud: aws}\nrun: vllm serve x\n",
        ": this is a SkyPilot task; mistralctl.yaml holds options of mistralctl",
    ),
    ("run: |\n  vllm serve x\n", ": this is a SkyPilot task"),
    ("service: {readiness_probe: /health}\nrun: x", ": this is a SkyPilot task"),
    ("services: {vllm: {image: x}}", ": this is a Docker Compose file"),
    ("apiVersion: v1\nkind: Pod", ": this is a Kubernetes manifest"),
    ("type: task\ncommands: [x]\nresources: {gpu: 24GB}", ": this is a dstack configuration"),
    ('{"model_type": "mistral"}', ": this is a model's config.json"),
    ("idle: 30x", ": idle: '30x' is not a duration; write for example 30m, 12h, 2d or never"),
    ("ttl: 0m", "out of range"),
    ("lora: [a]", ":1: lora: 'a' should be NAME=URI, for example sql=s3://bucket/sql"),
    ("lora: {a: 5}", ": lora.a: should be text, is whole number 5"),
    ("lora: {'../x': 's3://b/x'}", "is not an adapter's name"),
    ("lora: {x: 's3://b/../x'}", "contains '..'"),
    ("weights: 's3://'", "is incomplete; it should be s3://bucket/prefix"),
    ("weights: 's3:///x'", "is incomplete"),
    ("weights: 's3://bucket/../other'", "contains '..'; name the folder itself"),
    ("weights: bucket/x", "is not a URI"),
    ("weights: 'ftp://x/y'", "has the unknown scheme ftp://"),
    ("weights: 's3://key:secret@bucket/x'", "credentials come from the machine's own chain"),
    ("weights: 'file://relative'", "needs an absolute path"),
    ("weights: 'hf://onlyone'", "is incomplete"),
    (
        "keys_uri: s3://bucket/keys",
        ":1: keys_uri: 's3://bucket/keys' should be one object, not a folder: s3://bucket/keys/keys.json",
    ),
    ("keys_uri: az://account/keys.json", "should be one object, not a folder"),
    ("keys_uri: hf://owner/name/keys.json", "cannot hold keys, which change; use one of s3://, gs://, az://, file://"),
    ("keys_uri: s3://bucket/keys.json?versionId=1", "carries a query or credentials"),
    ("weights: 'pypi://p/x'", "needs a version"),
    ("name: Big", "is not a name that every cloud accepts"),
    ("name: " + "a" * 41, "is not a name that every cloud accepts"),
    ("name: a--b", "is not a name that every cloud accepts"),
    ("model: mistral-7b-instruct-v0.4", "did you mean mistral-7b-instruct-v0.3?"),
    ("accelerators: 'L4;1'", "is not an accelerator; write NAME or NAME:COUNT"),
    ("accelerators: 'L5:1'", "did you mean L4"),
    ("accelerators: 'L4:3'", "asks for 3 GPUs"),
    ("disk_tier: ultra", ": disk_tier: 'ultra' is not one of low, medium, high, best"),
    ("dtype: bf16", "is not one of auto, bfloat16, float16, float32; did you mean bfloat16?"),
    ("quantization: magic", "is not one of fp8, awq, gptq, compressed-tensors"),
    ("served_model_name: 'a b'", "is not a model name for the API"),
    ("region: 'US East'", "is misspelt"),
    ("vllm_args: '--seed 7'", "write it in one piece"),
    ("vllm_args: '--seed=7 --port=1'", "--port would set --port"),
    ("allow: here", ": allow: 'here' is not a network"),
    ("vllm_args: ['--seed 7']", "write it in one piece"),
    ("vllm_args: ['-O3']", "is a short argument"),
    ("model: 2023-09-27", ": model: unknown model '2023-09-27'"),
    ("port: 8000\nname: !!binary aGk=", ": name: should be plain text"),
    ("max_model_len: 1" + "0" * 5000, "max_model_len"),
    ("max_price: 0.00001", ": max_price 0.00001 is below the cheapest that would fit"),
    ("max_price: 2.50e-07", ": max_price 2.50e-07 is below the cheapest that would fit"),
    ("max_price: -0.00001", ": max_price: -0.00001 is out of range; it must be more than 0"),
    ("max_price: 12345678901234567890.0", ": max_price: 12345678901234567890.0 is out of range; it must be at most 1000"),
    ("port: 0x50", ": port: 0x50 is out of range"),
    ("ttl: 12:30", ": ttl: '12:30' is not a duration"),
    ("idle: 0.50", ": idle: '0.50' is not a duration"),
    ("max_price: '0.00001'", ": max_price 0.00001 is below the cheapest that would fit"),
    ("max_model_len: '000040000'", ": max_model_len: 000040000 is beyond the context"),
    ("cloud: [0.00001]", ": cloud[0]: 0.00001 is not one of"),
    ("lora: {a: 0.00001}", ": lora.a: should be text, is number 0.00001"),
    ("max_model_len: 1_000_000", ": max_model_len: 1_000_000 is beyond the context"),
    ("tensor_parallel: 0x3", ": tensor_parallel: 0x3 GPUs cannot share"),
]
# Text of mistralctl.yaml that is not quite as documented, and what is taken for it.
TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("cloud: aws", {"cloud": ("aws",)}),
    ("cloud: aws, gcp", {"cloud": ("aws", "gcp")}),
    ("vllm_args: --seed=7", {"vllm_args": ("--seed=7",)}),
    (
        "vllm_args: '--seed=7  --override-generation-config={\"a\": 1} --enforce-eager'",
        {"vllm_args": ("--seed=7", '--override-generation-config={"a": 1}', "--enforce-eager")},
    ),
    ("allow: 203.0.113.0/24", {"allow": ("203.0.113.0/24",)}),
    ("max_price: '2'", {"max_price": 2.0}),
    ("max_price: '2.5'", {"max_price": 2.5}),
    ("max_model_len: '4096'\nport: \"8001\"", {"max_model_len": 4096, "port": 8001}),
    ("\ufeffcloud: [aws]", {"cloud": ("aws",)}),
    ("cloud: [aws]\r\nidle: 1h\r\n", {"cloud": ("aws",), "idle": "1h"}),
    ("region: null", {"region": None}),
    ("max_price:", {"max_price": None}),
    ("lora: a=./x", {"lora": {"a": "./x"}}),
    ("lora: [a=./x, b=./y]", {"lora": {"a": "./x", "b": "./y"}}),
    ("lora: a=./x, b=./y", {"lora": {"a": "./x", "b": "./y"}}),
    ("image: [aws=ami-0123456789abcdef0]", {"image": {"aws": "ami-0123456789abcdef0"}}),
    ("image: aws=ami-0123456789abcdef0", {"image": {"aws": "ami-0123456789abcdef0"}}),
    ("image: [ami-0123456789abcdef0]", {"image": "ami-0123456789abcdef0"}),
    ("spot: 'true'", {"spot": True}),
    ("spot: 'yes'", {"spot": True}),
    ("spot: yes", {"spot": True}),
    ("spot: off", {"spot": False}),
    ("spot: No", {"spot": False}),
    ("spot: 1", {"spot": True}),
    ("name: yes", {"name": "yes"}),
    ("served_model_name: 7", {"served_model_name": "7"}),
    ("allow: 203.0.113.0/24, 198.51.100.7", {"allow": ("203.0.113.0/24", "198.51.100.7/32")}),
    ("port: '8_001'", {"port": 8001}),
    ("", {"idle": "30m"}),
]
EXAMPLES = [f"{name}: {field.about.example}" for name, field in fields(DeploymentSpec).items()]
BAD_FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"max_model_len": "40000"}, "--max-model-len: 40000 is beyond the context of mistral-7b-instruct-v0.1, 32768 tokens"),
    ({"max_model_len": "many"}, "--max-model-len: should be a whole number, is text 'many'"),
    ({"region": "us-east-1"}, "--region: needs exactly one cloud beside it"),
    ({"cloud": ["gcp"], "region": "us-east-1"}, "--region: gcp has no region 'us-east-1'; it is one of aws's"),
    ({"cloud": ["aws"], "region": "us-east-9"}, "--region: aws has no region 'us-east-9'; did you mean us-east-"),
    ({"cloud": ["aws"], "zone": "us-east-1a"}, "--zone: needs its region beside it"),
    ({"cloud": ["aws"], "region": "us-east-1", "zone": "us-east-2a"}, "--zone: 'us-east-2a' is not a zone of us-east-1"),
    ({"cloud": ["azure"], "region": "eastus", "zone": "1"}, "--zone"),
    ({"cloud": ["local"], "spot": True}, "--spot: means nothing on this machine"),
    ({"cloud": ["local"], "disk_tier": "high"}, "--disk-tier: means nothing on this machine"),
    ({"cloud": ["local"], "accelerators": "L4"}, "--accelerators: means nothing on this machine"),
    ({"cloud": ["local"], "region": "us-east-1"}, "--region: means nothing on this machine"),
    ({"accelerators": "L4:2", "tensor_parallel": "4"}, "--tensor-parallel: 4 does not go with --accelerators L4:2"),
    ({"tensor_parallel": "3"}, "--tensor-parallel: 3 GPUs cannot share 8 key-value heads evenly"),
    ({"accelerators": "T4"}, "--accelerators: mistral-7b-instruct-v0.1 does not fit: T4:1: no bf16"),
    ({"max_price": "0.01"}, "--max-price 0.01 is below the cheapest that would fit, 0.70 USD/h"),
    ({"model": "s3://bucket/mine"}, "MODEL: the size of mine is only known on the node; add --accelerators"),
    ({"model": "./no/such/folder"}, "no/such/folder is not there; name a folder with config.json"),
    (
        {"keys_uri": "file:///team/keys.json"},
        "--keys-uri: file:///team/keys.json is a file of this machine, which a node in a cloud cannot",
    ),
    ({"weights": "file:///no/such/folder"}, "--weights: there is no folder /no/such/folder"),
    ({"model": "smollm2-135m-instruct", "quantization": "fp8"}, "fp8 needs a GPU"),
    ({"quantization": "awq"}, "--quantization: awq needs weights that are so quantized, and these are not; leave it out"),
    ({"quantization": "gptq"}, "--quantization: gptq needs weights that are so quantized"),
    ({"quantization": "compressed-tensors"}, "--quantization: compressed-tensors needs weights that are so quantized"),
    ({"quantization": "bitsandbytes"}, "--quantization: 'bitsandbytes' is not one of fp8, awq, gptq, compressed-tensors"),
    ({"quantization": "fp8", "dtype": "float32"}, "--dtype: fp8 computes in bfloat16 or float16, not in float32"),
    ({"max_price": "-3"}, "--max-price: '-3' is out of range; it must be more than 0"),
    ({"port": "http"}, "--port: should be a whole number"),
    ({"max_price": "0.00001"}, "--max-price 0.00001 is below the cheapest that would fit"),
    ({"max_price": "0.50"}, "--max-price 0.50 is below the cheapest that would fit"),
    ({"max_model_len": "40_000"}, "--max-model-len: 40_000 is beyond the context"),
    ({"cloud": ["local"], "max_price": 0.00001}, "--max-price: means nothing on this machine"),
    ({"max_price": 0.00001}, "--max-price 0.00001 is below the cheapest that would fit"),
]
BAD_VARIABLES = [
    ({"MISTRALCTL_PORT": "x"}, "MISTRALCTL_PORT: should be a whole number, is text 'x'"),
    ({"MISTRALCTL_CLOUD": "aws,gpc"}, "MISTRALCTL_CLOUD[1]: 'gpc' is not one of"),
    ({"MISTRALCTL_LORA": "a"}, "MISTRALCTL_LORA: 'a' should be NAME=URI, for example sql=s3://bucket/sql"),
    ({"MISTRALCTL_LORA": '{"a": 5}'}, "MISTRALCTL_LORA.a: should be text, is whole number 5"),
    ({"MISTRALCTL_VLLM_ARGS": "seed=7"}, "MISTRALCTL_VLLM_ARGS: 'seed=7' is not an argument"),
    ({"MISTRALCTL_VLLM_ARGS": '["--port=1"]'}, "MISTRALCTL_VLLM_ARGS: --port would set --port"),
]


TAKEN_VARIABLES = [
    ({"MISTRALCTL_SPOT": "yes"}, {"spot": True}),
    ({"MISTRALCTL_CLOUD": "aws, gcp"}, {"cloud": ("aws", "gcp")}),
    ({"MISTRALCTL_ALLOW": "203.0.113.0/24"}, {"allow": ("203.0.113.0/24",)}),
    ({"MISTRALCTL_LORA": "a=./x"}, {"lora": {"a": "./x"}}),
    ({"MISTRALCTL_LORA": '{"a": "./x"}'}, {"lora": {"a": "./x"}}),
    ({"MISTRALCTL_VLLM_ARGS": "--seed=7"}, {"vllm_args": ("--seed=7",)}),
    ({"MISTRALCTL_VLLM_ARGS": '["--seed=7", "--enforce-eager"]'}, {"vllm_args": ("--seed=7", "--enforce-eager")}),
    ({"MISTRALCTL_REGION": ""}, {"region": None}),
]


def whole(flags: dict[str, Any], environ: dict[str, str], file: Path | None, folder: Path) -> tasks.Task:
    """The pure chain from options to a task."""
    sourced = load(flags, environ, file, folder)
    return serve.render(plan.make(sourced, checkpoints.resolve(sourced), _machine()), owner="x")


def _machine() -> Any:
    from mistralctl.machine import Machine

    return Machine(24 << 30, 2)


def one_line(error: UserError, *parts: str) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("text", "says"), BAD_FILES, ids=[text[:40] for text, _ in BAD_FILES])
def test_bad_files(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(UserError) as error:
        whole({}, {}, file, tmp_path)
    one_line(error.value, str(file) if "does not fit" not in says else "", says)


@pytest.mark.parametrize(("text", "fields"), TAKEN, ids=[repr(text) for text, _ in TAKEN])
def test_what_a_file_says_in_another_form_is_taken(text: str, fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(text.encode())
    spec = load({}, {}, tmp_path / "m.yaml").spec
    assert {name: getattr(spec, name) for name in fields} == fields


@pytest.mark.parametrize(("environ", "given"), TAKEN_VARIABLES, ids=str)
def test_what_a_variable_says_is_taken(environ: dict[str, str], given: dict[str, Any], tmp_path: Path) -> None:
    spec = load({}, environ, None, tmp_path).spec
    assert {name: getattr(spec, name) for name in given} == given


@pytest.mark.parametrize(("flags", "says"), BAD_FLAGS, ids=[str(flags) for flags, _ in BAD_FLAGS])
def test_bad_flags(flags: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        whole(flags, {}, None, tmp_path)
    one_line(error.value, says)


@pytest.mark.parametrize(("environ", "says"), BAD_VARIABLES)
def test_bad_variables(environ: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        whole({}, environ, None, tmp_path)
    one_line(error.value, says)


@pytest.mark.parametrize("own", vllm_options.SET)
def test_what_mistralctl_sets_itself_is_refused_however_it_is_spelt(own: str, tmp_path: Path) -> None:
    spellings = {own, own + "=x", own.replace("-", "_").replace("__", "--", 1), own + ".x=1"}
    option = next(option for option in vllm_options._data()["options"] if own in option["names"])
    spellings |= {name for name in option["names"] if name.startswith("--")}
    for spelling in spellings:
        with pytest.raises(UserError) as error:
            whole({"vllm_args": [spelling]}, {}, None, tmp_path)
        one_line(error.value, "--vllm-arg", f"would set {own}, which mistralctl sets itself: {vllm_options.SET[own]}")
    with pytest.raises(UserError) as error:  # vLLM's parser takes any beginning that one option has alone
        whole({"vllm_args": [own[:-1]]}, {}, None, tmp_path)
    one_line(error.value, "--vllm-arg")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-such-flag=16"], "--no-such-flag is no option of vLLM 0.32.0"),
        (["--enable-log-request"], None),  # the beginning of one option alone
        (["--enable-logs-requests"], "is no option of vLLM 0.32.0; did you mean --enable-log-requests?"),
        (["--guided-decoding-backend=outlines"], "is no option of vLLM 0.32.0: write --structured-outputs-config.backend=NAME"),
        (["--disable-log-requests", "--enforce-eager", "--max-logprobs=20"], "--enable-log-requests only"),
        (["--enforce-eager", "--max-logprobs=20", "--enable-log-requests"], None),
        (["--max-lora-rank=64"], "--max-lora-rank would set --max-lora-rank, which mistralctl sets itself: it follows from the adapters"),
        (['--rope-scaling={"rope_type":"dynamic","factor":2.0}'], "the positions are the model's (config.json)"),
        (["--swap-space=16"], "nothing is swapped"),
        (["--kv-cache-dtype=fp8"], "--kv-cache-dtype is closed in a deployment: plan computes the memory with vLLM's default"),
        (["--disable-sliding-window"], "--disable-sliding-window is closed in a deployment: the window is the model's"),
        (["--no-disable-sliding-window"], "the window is the model's"),
        (["--gpu-memory-utilization=0.95"], "plan computes with it"),
        (["--device-memory-utilization=0.95"], "would set --gpu-memory-utilization"),
        (["--chat-template=x.jinja"], "it comes with the model"),
        (["--enable-auto-tool-choice", "--tool-call-parser=hermes"], "it follows from the model"),
        (["--seed", "7"], "--seed needs a value; write it in one piece, for example --seed=VALUE"),
        (["--seed=x"], "--seed should be a whole number, not 'x'"),
        (["--seed=1.5"], "--seed should be a whole number, not '1.5'"),
        (["--seed="], "--seed should be a whole number, not ''"),
        (["--seed.x=1"], "should be a whole number"),
        (["--enforce-eager=true"], "--enforce-eager takes no value; write --enforce-eager"),
        (["--no-enforce-eager"], None),
        (["--no-seed"], "--no-seed is no option of vLLM"),
        (["--scheduling-policy=lifo"], "--scheduling-policy should be one of fcfs, priority, not 'lifo'"),
        (["--scheduling_policy=priority"], None),
        (["--max-log"], "--max-log could be any of --max-log-len, --max-logprobs"),
        (["--max-num-queued-tokens=64k"], None),
        (["--max-num-queued-tokens=1.5K"], "should be a size like 64k, not '1.5K'"),
        (["--default-chat-template-kwargs={"], "--default-chat-template-kwargs should be JSON, not '{'"),
        (["--compilation-config.mode=3", "--compilation-config.cudagraph_mode=NONE"], None),
        (["--compilation_config.mode=3"], None),
        (["--compilation-config.mode=9"], "should have one of NONE, STOCK_TORCH_COMPILE"),
        (["--compilation-config.mode=vllm_compile"], None),
        (["--compilation-config.cudagraph_num_of_warmups=x"], "should have a whole number as cudagraph_num_of_warmups, not 'x'"),
        (["--compilation-config.modes=3"], "--compilation-config.modes has no key 'modes'; did you mean mode?"),
        (['--compilation-config={"cudagraph_mode": "NONE"}'], "write each key as --compilation-config.KEY=VALUE"),
        (['--reasoning-config={"reasoning_start_str": "a"}', "--reasoning-config.reasoning_end_str=b"], "as a whole and by a key"),
        (["--structured-outputs-config=[]"], "should be a JSON object"),
        (["--compilation-config.backend=x.y"], "may not set backend in a deployment"),
        (["--structured-outputs-config.backend=outlines"], None),
        (["--structured-outputs-config.backend=lm-format"], "should have one of auto"),
        (['--structured-outputs-config={"reasoning_parser_plugin":"/x.py"}'], "may not set reasoning_parser_plugin"),
        (["--structured-outputs-config.disable_any_whitespace=true"], "needs the backend xgrammar or guidance beside disable_any_whitespace"),
        (['--structured-outputs-config={"backend":"xgrammar","disable_any_whitespace":true}'], None),
        (["--speculative-config.model=x"], "speculative decoding is not planned with"),
        (["--logits-processors=x.Y"], "it loads other code"),
        (["--grpc-port=50051"], "it opens a port or a route"),
        (["--help"], "--help is no option of a server"),
        (["--help=Frontend"], "--help is no option of a server"),
        (["-tp=2"], "is a short argument"),
        (["--"], "is not an argument"),
        (["--seed=" + "7" * 5000], "longer than 4096"),
    ],
)  # fmt: skip
def test_options_of_vllm_are_judged_as_its_parser_does(arguments: list[str], says: str | None, tmp_path: Path) -> None:
    if says is None:
        assert json.loads(whole({"vllm_args": arguments}, {}, None, tmp_path)["envs"]["MISTRALCTL_VLLM_ARGS"]) == arguments
        return
    with pytest.raises(UserError) as error:
        whole({"vllm_args": arguments}, {}, None, tmp_path)
    one_line(error.value, "--vllm-arg", says)


@pytest.mark.parametrize(
    "tag", ["!!timestamp", "!!float", "!!int", "!!bool", "!!null", "!!binary", "!!set", "!!omap", "!!pairs", "!!merge", "!x"]
)
@pytest.mark.parametrize("text", ["", "x", "''", "1", "{a: b}", "[a]"])
@pytest.mark.parametrize("key", ["ttl", "port", "spot", "region", "lora"])
def test_a_value_that_is_none_of_its_tag_is_named(tag: str, text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "mistralctl.yaml"
    path.write_text(f"{key}: {tag} {text}\n")
    with contextlib.suppress(UserError):
        load({}, {}, path)


def test_a_value_of_any_length_is_named_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mistralctl.yaml"
    for key in ("model", "ttl", "port", "allow", "lora", "budget", "cloud"):
        path.write_text(f"{key}: {'9' * 100_000}\n")
        with pytest.raises(UserError) as refused:
            load({}, {}, path)
        assert len(str(refused.value)) <= 600


def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load({}, {}, Path("/dev/zero"))


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)]
    with pytest.raises(UserError) as error:
        parse_yaml("\n".join(lines), "m.yaml")
    one_line(error.value, "m.yaml:2:", "an alias (*) is not allowed here")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load({}, {}, tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError):
        load({}, {}, tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load({}, {}, tmp_path / "large.yaml")
    with pytest.raises(UserError):
        load({}, {}, tmp_path)


def test_flags_before_variables_before_the_file_before_defaults(tmp_path: Path) -> None:
    (tmp_path / "mistralctl.yaml").write_text("port: 9001\nidle: 1h\nttl: 2h\nspot: true\n")
    environ = {"MISTRALCTL_PORT": "9002", "MISTRALCTL_IDLE": "3h", "MISTRALCTL_HOME": "/x"}
    got = load({"port": "9003", "spot": False}, environ, None, tmp_path)
    assert (got.spec.port, got.spec.idle, got.spec.ttl, got.spec.spot, got.spec.dtype) == (9003, "3h", "2h", False, "auto")
    assert (got.place("port"), got.place("idle"), got.place("ttl")) == (
        "--port", "MISTRALCTL_IDLE", f"{tmp_path / 'mistralctl.yaml'}:3: ttl",
    )  # fmt: skip


def test_the_shipped_schema_and_page_are_those_of_the_spec() -> None:
    root = Path(__file__).parents[2]
    assert (root / "deploy" / "mistralctl" / "mistralctl.schema.json").read_text("utf-8") == dumped_schema(DeploymentSpec)
    assert (root / "docs" / "options.md").read_text("utf-8") == docs(DeploymentSpec)
    page = (root / "docs" / "finetune.md").read_text("utf-8")
    assert page == between(page, FinetuneSpec)


def _as_an_editor_reads_it(text: str) -> Any:
    """YAML without Python's own types of it."""
    return yaml.safe_load(text.removeprefix("\ufeff")) or {}


@pytest.mark.parametrize("text", [text for text, _ in TAKEN] + EXAMPLES, ids=repr)
def test_the_schema_accepts_what_load_accepts(text: str, tmp_path: Path) -> None:
    (tmp_path / "mistralctl.yaml").write_text(text)
    load({}, {}, None, tmp_path)
    jsonschema.validate(_as_an_editor_reads_it(text), json_schema(DeploymentSpec))


@pytest.mark.parametrize(
    "text", ["modle: x", "cloud: gpc", "cloud: aws gcp", "spot: maybe", "port: 80", "lora: sql", "max_price: 2$"]
)
def test_the_schema_refuses_what_load_refuses(text: str, tmp_path: Path) -> None:
    (tmp_path / "mistralctl.yaml").write_text(text)
    with pytest.raises(UserError):
        load({}, {}, None, tmp_path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_as_an_editor_reads_it(text), json_schema(DeploymentSpec))


_words = st.text(string.ascii_letters + string.digits + "-._:/@%{}[]&*!|>#'\" \n\t\\~é\x00", max_size=30)
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | _words | st.dates() | st.binary(max_size=8)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3), max_leaves=6
)
_good = {
    "model": st.sampled_from(["mistral-7b-v0.3", "smollm2-135m-instruct", "hf://a/b"]), "name": st.sampled_from(["a", "m-1"]),
    "cloud": st.lists(st.sampled_from(["aws", "gcp", "azure", "local"]), max_size=2),
    "region": st.sampled_from(["us-east-1", "eastus"]),
    "accelerators": st.sampled_from(["L4", "A100:8", "T4:1"]), "spot": st.booleans(), "max_price": st.floats(0.1, 50),
    "max_model_len": st.integers(16, 40000), "tensor_parallel": st.integers(1, 8), "port": st.integers(1024, 65535),
    "idle": st.sampled_from(["30m", "never", "2h"]), "dtype": st.sampled_from(["auto", "float16", "float32"]),
    "vllm_args": st.lists(st.sampled_from(["--seed=7", "--port=1", "-x"]), max_size=2),
    "lora": st.dictionaries(_words, st.sampled_from(["s3://b/x", "hf://a/b"]), max_size=2),
}  # fmt: skip
_keys = st.sampled_from(list(DeploymentSpec.model_fields))
_mappings = st.fixed_dictionaries({}, optional=_good) | st.dictionaries(_keys | _words, _values, max_size=5)


@settings(max_examples=150, deadline=None)
@given(data=_mappings)
def test_any_mapping_gives_a_clear_error_or_a_valid_task(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = folder / "generated.yaml"
    file.write_text(yaml.safe_dump(data, allow_unicode=True), "utf-8")
    _error_or_task({}, file, folder)
    _error_or_task({key: value for key, value in data.items() if key in DeploymentSpec.model_fields}, None, folder)


@settings(max_examples=200, deadline=None)
@given(text=_words | st.text(max_size=60))
def test_any_text_gives_a_clear_error_or_a_mapping(text: str) -> None:
    try:
        assert isinstance(parse_yaml(text, "m.yaml"), dict)
    except UserError as error:
        one_line(error, "m.yaml")


def _error_or_task(flags: dict[str, Any], file: Path | None, folder: Path) -> None:
    try:
        got = whole(flags, {}, file, folder / "nowhere")
    except UserError as error:
        one_line(error)
        return
    assert yaml.safe_load(tasks.dump(got)) == got
