"""What the contract says of quantized weights, held against vLLM's own classes."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from mistral_contract import quantization
from mistral_contract.quantization import METHODS, NotServed
from vllm.config import LoadConfig, ModelConfig
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
from vllm.model_executor.layers.quantization import QuantizationMethods, get_quantization_config
from vllm.model_executor.model_loader.weight_utils import get_quant_config

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def packed(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors with one group."""
    weights = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True} | weights
    group = {"weights": weights, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
            "ignore": ["lm_head"]} | more  # fmt: skip


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


CASES = {
    "awq": AWQ,
    "awq by AutoAWQ's names": without(without(AWQ, "bits"), "group_size") | {"w_bit": 4, "q_group_size": 64},
    "awq of 8 bits": AWQ | {"bits": 8},
    "awq without zero_point": without(AWQ, "zero_point"),
    "gptq": GPTQ,
    "gptq of 8 bits": GPTQ | {"bits": 8},
    "gptq of 2 bits": GPTQ | {"bits": 2},
    "gptq of 3 bits": GPTQ | {"bits": 3},
    "gptq in the order of activations": GPTQ | {"desc_act": True},
    "gptq in that order, a group a row": GPTQ | {"desc_act": True, "group_size": -1},
    "gptq in that order in some layers": GPTQ | {"dynamic": {"+:.*mlp.*": {"desc_act": True}}},
    "gptq without sym": without(GPTQ, "sym"),
    "gptq asymmetric": GPTQ | {"sym": False},
    "gptq without desc_act": without(GPTQ, "desc_act"),
    "gptq with layers of 8 bits": GPTQ | {"dynamic": {"+:.*mlp.*": {"bits": 8}, "-:.*layers.0.*": {}}},
    "fp8": FP8,
    "fp8 in blocks": FP8 | {"weight_block_size": [128, 128]},
    "fp8 in static blocks": FP8 | {"weight_block_size": [128, 128], "activation_scheme": "static"},
    "fp8 without a scheme": without(FP8, "activation_scheme"),
    "compressed-tensors": packed({}),
    "compressed-tensors by its Python name": packed({}, quant_method="compressed_tensors"),
    "compressed-tensors, asymmetric": packed({"symmetric": False}),
    "compressed-tensors in the order of activations": packed({"actorder": "group"}),
    "compressed-tensors in static order": packed({"actorder": "static"}),
    "compressed-tensors, sparse": packed({}, sparsity_config={"format": "dense", "targets": ["Linear"], "ignore": []}),
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "aqlm": {"quant_method": "aqlm", "nbits_per_codebook": 16},
    "hqq": {"quant_method": "hqq"},
}


@pytest.mark.parametrize("method", METHODS)
def test_vllm_has_each_method_and_computes_it_as_the_table_says(method: str) -> None:
    assert method in get_args(QuantizationMethods)
    found = get_quantization_config(method)
    least = max(found.get_min_capability(), 75)  # vLLM itself needs 7.5
    assert METHODS[method].capability == divmod(least, 10)
    method_of = found.get_supported_act_dtypes
    types = method_of() if inspect.ismethod(method_of) else method_of(found)  # type: ignore[call-arg] # compressed-tensors' is none
    assert sorted(METHODS[method].dtypes) == sorted(str(one).removeprefix("torch.") for one in types)
    online = METHODS[method].online
    assert online is None or online in ONLINE_QUANT_SHORTHAND_NAMES


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_what_is_refused_is_what_vllm_refuses(config: dict[str, Any]) -> None:
    try:
        name = str(config["quant_method"]).replace("_", "-") if "tensors" in config["quant_method"] else config["quant_method"]
        get_quantization_config(name).from_config(copy.deepcopy(config))
        vllm = ""
    except (ValueError, DeprecationWarning) as error:
        vllm = str(error)
    try:
        scheme = quantization.read({"quantization_config": config})
        ours = ""
        assert scheme is not None
    except NotServed as error:
        ours = str(error)
    assert bool(vllm) == bool(ours), f"vLLM: {vllm or 'serves it'}; the contract: {ours or 'serves it'}"


def plain(folder: Path, **more: Any) -> Path:
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100,
        "max_position_embeddings": 512, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


@pytest.mark.parametrize("wanted", METHODS)
def test_a_method_for_weights_that_are_not_quantized_is_refused_where_vllm_refuses_it(wanted: str, tmp_path: Path) -> None:
    try:
        quantization.check(wanted, None)
        name = quantization.vllm_name(wanted, None)
    except ValueError:
        name = ""
    model = ModelConfig(model=str(plain(tmp_path)), quantization=name or wanted, skip_tokenizer_init=True)
    if name:
        assert type(get_quant_config(model, LoadConfig())).__name__ == "OnlineQuantizationConfig"
    else:
        with pytest.raises((ValueError, TypeError)):
            get_quant_config(model, LoadConfig())


@pytest.mark.parametrize("config", [AWQ, GPTQ, FP8, packed({})], ids=lambda config: config["quant_method"])
@pytest.mark.parametrize("wanted", METHODS)
def test_another_method_than_that_of_the_weights_is_refused_as_by_vllm(
    wanted: str, config: dict[str, Any], tmp_path: Path
) -> None:
    scheme = quantization.read({"quantization_config": config})
    assert scheme is not None
    folder = str(plain(tmp_path, quantization_config=config))
    try:
        quantization.check(wanted, scheme)
    except ValueError:
        with pytest.raises(ValueError, match="does not match"):
            ModelConfig(model=folder, quantization=wanted, skip_tokenizer_init=True)
    else:
        ModelConfig(model=folder, quantization=quantization.vllm_name(wanted, scheme), skip_tokenizer_init=True)


def test_bitsandbytes_is_gone() -> None:
    with pytest.raises(ValueError, match="Invalid quantization method"):
        get_quantization_config("bitsandbytes")
    assert "bitsandbytes" not in METHODS


def test_the_float_types_are_torchs() -> None:
    for method in METHODS.values():
        assert all(getattr(torch, name).is_floating_point for name in method.dtypes)
