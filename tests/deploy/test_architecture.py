"""Which models are served: real configurations, and the fields that change what is computed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from mistral_contract import architecture
from mistral_contract.architecture import FULL, SLIDING, Refused, config_file, read, read_params

# What every configuration here has; the sizes of Mistral 7B.
BASE: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "attention_dropout": 0.0,
}  # fmt: skip
LLAMA = BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "sliding_window": None}
LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
PARAMS: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": 32768,
    "rope_theta": 1e6,
}  # fmt: skip


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_mistral_7b() -> None:
    found = read(BASE)
    assert (found.parameters, found.window, found.context) == (7_241_732_096, 4096, 32768)
    assert (found.layers, found.heads, found.kv_heads, found.head_dim, found.rope_type, found.tied) == (
        32,
        32,
        8,
        128,
        "default",
        False,
    )


# What fine-tunes and other publishers put into config.json: served, with the window and the context that vLLM has.
@pytest.mark.parametrize(
    ("config", "window", "context"),
    [
        pytest.param(BASE | {"pad_token_id": 2, "_name_or_path": "mistralai/Mistral-7B-v0.1"}, 4096, 32768, id="zephyr"),
        pytest.param(BASE | {"unsloth_fixed": True, "unsloth_version": "2025.1", "rope_scaling": None}, 4096, 32768, id="unsloth"),
        pytest.param(BASE | {"_flash_attn_2_enabled": True, "use_flash_attention_2": True}, 4096, 32768, id="flash attention"),
        pytest.param(BASE | {"output_router_logits": False, "num_local_experts": 0, "mlp_bias": False}, 4096, 32768, id="fields of others, off"),
        pytest.param(BASE | {"axolotl_config": {"lora_r": 8}, "trained_by": "x", "quantization_note": "q"}, 4096, 32768, id="notes"),
        pytest.param(BASE | {"temperature": 0.7, "top_p": 0.9, "num_beams": 1, "return_dict": True}, 4096, 32768, id="generation"),
        pytest.param(BASE | {"model_max_length": 8192}, 4096, 8192, id="model_max_length"),
        pytest.param(LLAMA | {"max_sequence_length": 2048}, None, 2048, id="llama 2, an early one"),
        pytest.param(BASE | {"use_sliding_window": True}, 4096, 32768, id="window, twice"),
        pytest.param(BASE | {"use_sliding_window": False, "sliding_window": None}, None, 32768, id="no window, twice"),
        pytest.param(without(BASE, "sliding_window"), 4096, 32768, id="a missing window is 4096"),
        pytest.param(without(BASE, "max_position_embeddings"), 4096, 131072, id="a missing context"),
        pytest.param(BASE | {"layer_types": [FULL, SLIDING] * 16}, 4096, 32768, id="layer_types"),
        pytest.param(BASE | {"layer_types": [FULL] * 32}, None, 32768, id="layer_types, all full"),
        pytest.param(
            BASE | {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "head_dim": 128, "sliding_window": 32768},
            32768, 32768, id="ministral",
        ),
        pytest.param(BASE | {"head_dim": 128, "hidden_size": 5120, "sliding_window": None}, None, 32768, id="nemo"),
        pytest.param(
            LLAMA | {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "mlp_bias": False}, None, 32768, id="smollm2"
        ),
        pytest.param(LLAMA | {"rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 131072}, None, 131072, id="llama 3.1"),
        pytest.param(BASE | {"rope_scaling": {"type": "linear", "factor": 4.0}}, 4096, 131072, id="linear"),
        pytest.param(without(BASE, "rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 4096, 32768, id="new rope"),
        pytest.param(
            BASE | {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "finetuned": True},
                    "max_position_embeddings": 65536},
            4096, 65536, id="yarn",
        ),
        pytest.param(BASE | {"quantization_config": {"quant_method": "awq"}}, 4096, 32768, id="quantized: judged by its weights"),
    ],
)  # fmt: skip
def test_a_real_configuration_is_served(config: dict[str, Any], window: int | None, context: int) -> None:
    found = read(config)
    assert (found.window, found.context) == (window, context)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BASE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "model type 'qwen2' (Qwen2ForCausalLM) is not served"),
        (BASE | {"model_type": "ministral3"}, "model type 'ministral3'"),
        (BASE | {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"]}, "MiniCPMForCausalLM"),
        ({"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": BASE}, "Mistral3ForConditional"),
        (without(BASE, "model_type"), "model type None (MistralForCausalLM)"),
        (BASE | {"architectures": ["MistralModel"]}, "(MistralModel)"),
        (BASE | {"architectures": ["MistralForSequenceClassification"]}, "(MistralForSequenceClassification)"),
        (LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]}, "(LlamaForCausalLMEagle3)"),
        (BASE | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        (LLAMA | {"attention_bias": True}, "attention_bias = True"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias"),
        (BASE | {"use_qkv_bias": True}, "use_qkv_bias"),
        (BASE | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (BASE | {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
        (BASE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (BASE | {"rotary_emb_base": 1e6}, "rotary_emb_base"),
        (BASE | {"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
        (BASE | {"residual_multiplier": 0.22}, "residual_multiplier"),
        (BASE | {"attention_multiplier": 0.015625}, "attention_multiplier"),
        (BASE | {"logits_scaling": 8.0}, "logits_scaling"),
        (BASE | {"logit_scale": 0.0625}, "logit_scale"),
        (BASE | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (BASE | {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
        (BASE | {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
        (BASE | {"use_qk_norm": True}, "use_qk_norm"),
        (BASE | {"is_causal": False}, "is_causal = False"),
        (BASE | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (BASE | {"num_experts": 8}, "num_experts"),
        (BASE | {"moe": {"num_experts": 8}}, "moe"),
        (BASE | {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        (BASE | {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta = 0.1"),
        (BASE | {"ada_rms_norm_t_cond": True}, "ada_rms_norm_t_cond"),
        (BASE | {"attention_sink_size": 4}, "attention_sink_size"),
        (BASE | {"vision_config": {"hidden_size": 1}}, "vision_config"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window = 4096"),
        (BASE | {"use_sliding_window": False}, "use_sliding_window = False and sliding_window = 4096 contradict"),
        (BASE | {"max_window_layers": 28}, "max_window_layers = 28"),
        (BASE | {"sliding_window": 0}, "sliding_window = 0"),
        (BASE | {"sliding_window": [None, 4096]}, "sliding_window = [None, 4096]"),
        (BASE | {"layer_types": ["chunked_attention"] * 32}, "layer_types"),
        (BASE | {"layer_types": [SLIDING]}, "layer_types"),
        (BASE | {"layer_types": [SLIDING] * 32, "sliding_window": None}, "sliding_window is missing"),
        (BASE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        (BASE | {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "rope type 'longrope'"),
        (BASE | {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "the type 'linear' and the rope_type 'yarn'"),
        (BASE | {"rope_scaling": {"type": "linear"}}, "rope_parameters.factor = None"),
        (BASE | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_parameters.factor = 0.5"),
        (BASE | {"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "rope_parameters.factor = 4.0"),
        (BASE | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "rope_parameters.mrope_section"),
        (BASE | {"rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "default"}}}, "one rotary embedding"),
        (BASE | {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        (BASE | {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}}, "beyond the 16384 positions"),
        (BASE | {"rope_theta": None}, "rope_theta = None"),
        (BASE | {"model_max_length": 65536}, "65536 tokens is beyond the 32768 positions"),
        (BASE | {"num_key_value_heads": 5}, "do not fit together"),
        (BASE | {"hidden_size": 4100}, "head_dim is missing"),
        (BASE | {"hidden_size": "4096"}, "hidden_size = '4096'"),
        (BASE | {"vocab_size": True}, "vocab_size = True"),
        ({"model_type": "mistral"}, "hidden_size is missing"),
    ],
)  # fmt: skip
def test_another_computation_is_refused_in_one_line_that_names_it(config: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused) as refused:
        read(config)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "; " in str(refused.value)  # what to do


def test_key_value_heads_that_are_missing() -> None:
    """As Hugging Face: 8 in mistral, as many as query heads in llama, and where null is written."""
    assert read(without(BASE, "num_key_value_heads")).kv_heads == 8
    assert read(without(LLAMA, "num_key_value_heads")).kv_heads == 32
    assert read(BASE | {"num_key_value_heads": None}).kv_heads == 32


def test_params_json() -> None:
    found = read_params(PARAMS)
    assert (found.layers, found.head_dim, found.window, found.context, found.parameters) == (
        32,
        128,
        None,
        128_000,
        7_248_023_552,
    )
    assert read_params(PARAMS | {"max_seq_len": 32768, "sliding_window": 4096}).context == 32768
    assert read_params(PARAMS | {"sliding_window": [None, 64, 64, 64]}).windows == (None, 64, 64, 64) * 8
    off = {
        "moe": None,
        "yarn": None,
        "llama_4_scaling": None,
        "use_biases": False,
        "q_lora_rank": None,
        "causal": True,
        "activation": "silu",
    }
    assert read_params(PARAMS | off) == found


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"moe": {"num_experts": 8}}, "moe"),
        ({"yarn": {"factor": 16}}, "yarn"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        ({"vision_encoder": {"hidden_size": 1}}, "vision_encoder"),
        ({"use_biases": True}, "use_biases"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"causal": False}, "causal = False"),
        ({"activation": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "mamba"}, "'mamba'"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"_sliding_window": [1, 2]}, "_sliding_window"),
        ({"sliding_window": [4096, 64]}, "sliding_window"),
        ({"sliding_window": [None, 64, 64]}, "sliding_window"),
    ],
)
def test_another_computation_in_params_json_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        read_params(PARAMS | fields)


def test_which_file_describes_the_weights() -> None:
    assert config_file(["config.json", "model.safetensors"]) == "config.json"
    assert config_file(["params.json", "consolidated.safetensors"]) == "params.json"
    assert config_file(["config.json", "params.json", "consolidated.00.safetensors"]) == "params.json"
    assert config_file(["config.json", "params.json", "consolidated.safetensors", "model.safetensors"]) == "config.json"
    assert config_file([]) == "config.json"


ODD: list[Any] = [
    None,
    "",
    "x",
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    True,
    [],
    [1],
    [None],
    [[1]],
    {},
    {"a": 1},
    {"rope_type": ["x"]},
    1 << 80,
]


@pytest.mark.parametrize(
    "field", sorted({*BASE, *architecture.READ, *architecture.NEUTRAL, *PARAMS, "quantization_config", "no_rope_layers"})
)
def test_any_value_is_read_or_refused(field: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    configs = [
        (read, BASE),
        (read, BASE | {"rope_scaling": yarn}),
        (read_params, PARAMS),
        (read_params, PARAMS | {"sliding_window": 64}),
    ]
    for value in ODD:
        for how, config in configs:
            with suppress(Refused):
                how(config | {field: value})


@pytest.mark.parametrize("kind", architecture.ROPES)
def test_any_value_of_a_rotary_embedding_is_read_or_refused(kind: str) -> None:
    for name in {*architecture.COMMON_ROPE, *architecture.ROPES["yarn"], *architecture.ROPES["llama3"]}:
        for value in ODD:
            with suppress(Refused):
                read(BASE | {"rope_scaling": LLAMA3_ROPE | {"rope_type": kind, name: value}})


def test_every_type_that_is_served_is_in_the_message() -> None:
    assert all(kind in architecture.SERVED for kind in architecture.TYPES if kind != architecture.CONSOLIDATED)
