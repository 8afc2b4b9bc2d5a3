"""Every model type that is served computes what Hugging Face computes; every other is refused by name, by laptop and class alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import consolidated, prompts, write
from engines import engine, prompt_logprobs, runner
from mistral_contract import architecture
from mistral_node.contract import Code, LaunchError
from mistral_node.engine import cause
from mistral_node.weights import model_dir
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MinistralForCausalLM
from vllm.config import set_current_vllm_config
from vllm_mistral.model import MistralSWAForCausalLM, served

LIMIT = 5e-5
Measured = Callable[[str, float, float], None]
BASE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


def made(folder: Path, kind: str, **fields: Any) -> Path:
    """A tiny random checkpoint of a model type, whose weights are large enough for every part of it to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(BASE | fields), dtype="float32")).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15 if "embed" in name or "lm_head" in name else 1.6 / parameter.shape[1] ** 0.5)
            elif name.endswith(".bias"):
                parameter.normal_()
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def computed(folder: Path) -> Any:
    """Hugging Face's model of a folder in float32. Its mistral ignores `layer_types` and names ministral for them."""
    kind = MinistralForCausalLM if "layer_types" in json.loads((folder / "config.json").read_text()) else AutoModelForCausalLM
    return kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
YARN = rope("yarn", factor=16.0, original_max_position_embeddings=128)
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, head_dim of its own, llama3 rope": ("llama", {"tie_word_embeddings": True, "head_dim": 64, **LLAMA3}),
    "mistral, window": ("mistral", {"sliding_window": 48}),
    "mistral, head_dim of its own, linear rope": ("mistral", {"sliding_window": None, "head_dim": 96, **rope("linear", factor=4.0)}),
    "mistral, yarn rope": ("mistral", {"sliding_window": 64, **YARN}),
    "mistral, yarn rope with all its fields": (
        "mistral",
        {"sliding_window": None, **rope("yarn", factor=16.0, original_max_position_embeddings=128, beta_fast=20.0, beta_slow=2.0, mscale=1.0,
                                        mscale_all_dim=0.8, truncate=False)},
    ),
    "llama, yarn rope with an attention factor": ("llama", {**rope("yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=0.8)}),
    "mistral, layer_types": ("mistral", {"sliding_window": 48, "layer_types": KINDS}),
    "ministral": ("ministral", {"head_dim": 32, "sliding_window": 48, "layer_types": KINDS}),
    "ministral, window in every layer": ("ministral", {"head_dim": 64, "sliding_window": 48}),
}  # fmt: skip


@pytest.mark.parametrize("case", SERVED)
def test_what_is_served_equals_hugging_face(tmp_path: Path, case: str, measured: Measured) -> None:
    kind, fields = SERVED[case]
    folder = made(tmp_path / "weights", kind, **fields)
    said = architecture.read(json.loads((folder / "config.json").read_text()))
    assert model_dir(folder) == folder
    reference = computed(folder)
    assert said.parameters == reference.num_parameters()
    batch = prompts([300, 60])
    with engine(folder, max_model_len=None, num_gpu_blocks_override=512) as llm:
        model, config = runner(llm).model, llm.llm_engine.vllm_config
        assert config.model_config.max_model_len == said.context
        assert tuple(layer.self_attn.attn.sliding_window for layer in model.model.layers) == said.windows
        found = prompt_logprobs(llm, batch)
    measured(case, largest_difference_of(found, reference, batch), LIMIT)


def largest_difference_of(found: list[torch.Tensor], reference: Any, batch: list[list[int]]) -> float:
    """Over all positions; with the class of Hugging Face that the reference has, whatever its `layer_types`."""
    largest = 0.0
    for logprobs, ids in zip(found, batch, strict=True):
        with torch.no_grad():
            wanted = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        largest = max(largest, float((logprobs - wanted[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]).abs().max()))
    return largest


MINISTRAL3 = {
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "factor": 16.0,
    "original_max_position_embeddings": 128,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "granite": ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0}, "'granite'"),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False}, "'smollm3'"),
    "helium": ("helium", {"head_dim": 32}, "'helium'"),
    "ernie4_5": ("ernie4_5", {"head_dim": 32, "use_bias": False}, "'ernie4_5'"),
    "seed_oss": ("seed_oss", {"head_dim": 32, "attention_bias": False, "attention_out_bias": False}, "'seed_oss'"),
    "mistral-nowin": ("mistral", {"sliding_window": 64, "use_sliding_window": False}, "use_sliding_window = False"),
    "llama-window": ("llama", {"sliding_window": 64}, "sliding_window = 64"),
    "llama-bias": ("llama", {"attention_bias": True}, "attention_bias = True"),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "llama-partial": ("llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "llama-dynamic": ("llama", rope("dynamic", factor=4.0), "rope type 'dynamic'"),
    "mistral-longrope": (
        "mistral", rope("longrope", factor=4.0, original_max_position_embeddings=512, short_factor=[1.0] * 16, long_factor=[4.0] * 16),
        "rope type 'longrope'",
    ),
    "mistral-scaled": ("mistral", {"llama_4_scaling": {"original_max_position_embeddings": 128, "beta": 0.1}}, "llama_4_scaling"),
    "stablelm": ("stablelm", {"use_qkv_bias": False, **rope("default", partial_rotary_factor=0.25)}, "'stablelm'"),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": None}, "'qwen2'"),
    "qwen3": ("qwen3", {"head_dim": 32, "use_sliding_window": False}, "'qwen3'"),
    "phi3": ("phi3", {"sliding_window": 64}, "'phi3'"),
    "gemma": ("gemma", {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}, "'gemma'"),
    "cohere": ("cohere", {"logit_scale": 0.0625}, "'cohere'"),
    "glm": ("glm", {"head_dim": 32, "attention_bias": False}, "'glm'"),
    "starcoder2": ("starcoder2", {"use_bias": False}, "'starcoder2'"),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 32}, "'hunyuan_v1_dense'"),
    "exaone4": ("exaone4", {"sliding_window": 64}, "'exaone4'"),
    "ministral3": ("ministral3", {"head_dim": 32, **rope("yarn", **MINISTRAL3)}, "'ministral3'"),
    "mixtral": ("mixtral", {}, "'mixtral'"),
    "mistral3": ("mistral3", {}, "'mistral3'"),
    **{
        kind: (kind, {}, f"'{kind}'")
        for kind in ("olmo2", "diffllama", "nanochat", "apertus", "csm", "bitnet", "arcee", "jais2", "youtu", "dots1", "doge")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_refused_by_name(tmp_path: Path, case: str) -> None:
    kind, fields, named = REFUSED[case]
    config = AutoConfig.for_model(kind, **({} if kind == "mistral3" else BASE | fields))
    config.save_pretrained(tmp_path)
    with pytest.raises(architecture.Refused) as by_laptop:
        architecture.read(json.loads((tmp_path / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"served|computation|contradict|computed") as by_class:
        served(config)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(LaunchError) as by_launcher:
        model_dir(tmp_path)
    assert by_launcher.value.code is Code.WEIGHTS
    for refusal in (by_laptop, by_class, by_launcher):
        assert named in str(refusal.value)


def test_vllm_does_not_start_with_another_model(tmp_path: Path) -> None:
    folder = made(tmp_path / "granite", "granite", embedding_multiplier=12.0)
    with pytest.raises(ValueError, match="'granite'"), engine(folder):
        pass


def other_params(folder: Path) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"yarn": {"factor": 16, "original_max_position_embeddings": 128}}))


def test_another_model_in_mistrals_own_format_is_refused(tmp_path: Path) -> None:
    folder = consolidated(write(tmp_path / "hf"), tmp_path / "own")
    assert model_dir(folder) == folder
    other_params(folder)
    with pytest.raises(LaunchError, match="yarn"):
        model_dir(folder)
    with pytest.raises(ValueError, match="rope type 'yarn'"), engine(folder, tokenizer_mode="mistral"):
        pass


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "model.safetensors").touch()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(LaunchError, match=r"cannot be read|is missing"):
        model_dir(tmp_path)


Tensors = dict[str, torch.Tensor]


@contextmanager
def bare(folder: Path) -> Iterator[Any]:
    """The class alone, before its weights are loaded: what vLLM makes of them then cannot be loaded twice."""
    with engine(folder) as llm:
        config = llm.llm_engine.vllm_config
        with set_current_vllm_config(config):
            yield MistralSWAForCausalLM(vllm_config=config, prefix="another")


def refused(model: Any, tensors: Tensors, *more: tuple[str, torch.Tensor]) -> str:
    """What the class says when it is given these tensors first."""
    model.loaded = False
    with pytest.raises(ValueError, match=r"; ") as caught:
        model.load_weights(iter([*tensors.items(), *more]))
    said = str(caught.value)
    assert (
        cause(["Traceback", f"(EngineCore pid=7) ERROR 11-28 10:00:00 [core.py:1] ValueError: {said}"]) == f"ValueError: {said}"
    )
    return said


def filled(model: Any, given: Tensors) -> Tensors:
    """The parameters of the class after it was given these tensors first."""
    model.loaded = False
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.load_weights(iter(given.items()))
    return {name: parameter.data.clone() for name, parameter in model.named_parameters()}


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: w for name, w in tensors.items() if name not in names}


def test_every_tensor_has_a_place_and_every_place_a_tensor(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights")
    own = load_file(consolidated(folder, tmp_path / "own") / "consolidated.safetensors")
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.1.self_attn"
    query, zeros, ones = f"{layer}.q_proj.weight", torch.zeros(64), torch.ones(64)
    with bare(folder) as model:
        assert f"{layer}.k_proj.bias is a bias" in refused(model, tensors | {f"{layer}.k_proj.bias": ones})
        assert "layers.1.attention.wk.bias is a bias" in refused(model, own | {"layers.1.attention.wk.bias": ones})
        for name in (
            f"{layer}.q_norm.weight",
            f"{layer}.q_proj.weight_scale",
            query.replace(".1.", ".2."),
            "base_model.x.lora_A.weight",
        ):
            assert f"{name} (float32) has no place" in refused(model, tensors | {name: ones})
        assert f"{query} (int8) has no place" in refused(model, tensors | {query: tensors[query].to(torch.int8)})
        for name, shape in ((query, (128, 64)), ("model.norm.weight", (64,)), ("lm_head.weight", (500, 128))):
            assert f"{name} has the shape {list(shape)}, and by its conf" in refused(model, tensors | {name: torch.zeros(shape)})
        assert "layers.1.attention.wq.weight has the shape [130, 128]" in refused(
            model, own | {"layers.1.attention.wq.weight": torch.zeros(130, 128)}
        )
        for name in (f"{layer}.v_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
            assert f"the weights have no {name.removesuffix('.weight')};" in refused(model, without(tensors, name))
        assert "the weights have no lm_head;" in refused(model, without(own, "output.weight"))
        half = {name: w for name, w in tensors.items() if "layers.1" not in name}
        assert "and 8 others; take the whole model" in refused(model, half)
        assert f"no {layer}.q_proj and" in refused(model, own | half)  # what one format lacks is not taken from the other
        assert "two files have lm_head.weight" in refused(model, tensors, ("lm_head.weight", tensors["lm_head.weight"]))

        # What changes nothing: biases of GPTQ that are all zero, tables of angles; and Hugging Face's weights count beside others.
        wanted = filled(model, tensors)
        assert all(bool(w.isfinite().all()) for w in wanted.values())
        tables = {f"{layer}.rotary_emb.inv_freq": zeros, f"{layer}.rotary_emb.cos_cached": zeros, f"{layer}.k_proj.bias": zeros}
        scrambled = {name: w + 1 for name, w in own.items()}
        for given in (tensors | tables, tables | own, own, scrambled | tensors, tensors | scrambled):
            found = filled(model, given)
            assert all(torch.equal(found[name], w) for name, w in wanted.items())
        model.load_weights(iter([("lm_head.weight", tensors["lm_head.weight"] + 1)]))  # a part of the weights, later
        assert torch.equal(model.lm_head.weight[:512], tensors["lm_head.weight"] + 1)


def test_a_head_that_is_not_the_embedding_although_they_are_tied(tmp_path: Path) -> None:
    """Hugging Face ties them only if they are equal."""
    folder = write(tmp_path / "weights", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    with bare(folder) as model:
        assert "lm_head is not model.embed_tokens" in refused(model, tensors, ("lm_head.weight", table + 1))
        assert "lm_head is not model.embed_tokens" in refused(model, {"lm_head.weight": table + 1} | tensors)
        assert "the weights have no model.embed_tokens" in refused(model, without(tensors, "model.embed_tokens.weight"))
        wanted = filled(model, tensors)
        found = filled(model, {"lm_head.weight": table.clone()} | tensors)
        assert all(torch.equal(found[name], w) for name, w in wanted.items())


def test_vllm_does_not_start_with_biases_that_the_configuration_does_not_know(tmp_path: Path) -> None:
    folder = made(tmp_path / "qwen2", "qwen2", use_sliding_window=False, sliding_window=None)
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name in BASE or name in ("rope_parameters", "rms_norm_eps")}
    (folder / "config.json").write_text(json.dumps(kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert model_dir(folder) == folder
    with pytest.raises(ValueError, match=r"[qk]_proj\.bias is a bias"), engine(folder):
        pass
