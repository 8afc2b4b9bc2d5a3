"""What the class can, each shown here: the window's blocks, LoRA, both formats of weights, quantized weights, compiling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    consolidated,
    difference_behind,
    hugging_face,
    largest_difference,
    log_probabilities,
    of_tokens,
    prompts,
    write,
)
from engines import BLOCK, engine, generated, prompt_logprobs, run, runner, scheduler
from mistral_contract import files
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm_mistral import inspection
from vllm_mistral.model import window_of

LIMIT = 5e-5
Measured = Callable[[str, float, float], None]


class Fields:
    """A configuration with only the given fields."""

    def __init__(self, **fields: object) -> None:
        self.__dict__ |= fields


def test_the_window_of_a_layer() -> None:
    assert window_of(Fields(sliding_window=4096), 0) == 4096
    assert window_of(Fields(sliding_window=None), 0) is None
    assert window_of(Fields(sliding_window=0), 0) is None
    mixed = Fields(sliding_window=7, layer_types=["full_attention", "sliding_attention"])
    assert [window_of(mixed, 0), window_of(mixed, 1)] == [None, 7]
    assert window_of(Fields(sliding_window=None, layer_types=["sliding_attention"]), 0) is None


def test_registering_twice_changes_nothing() -> None:
    import vllm_mistral
    from vllm import ModelRegistry

    vllm_mistral.register()
    before = ModelRegistry.models[vllm_mistral.ARCHITECTURE]
    vllm_mistral.register()
    assert ModelRegistry.models[vllm_mistral.ARCHITECTURE] is before


def held_blocks(llm: object) -> int:
    """Blocks of the pool that running requests hold."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())  # one block is vLLM's null block


def most_held(llm: object, ids: list[int], tokens: int) -> tuple[int, int]:
    """Most blocks held by one request in any step while it runs, and while it decodes."""
    core = llm.llm_engine  # type: ignore[attr-defined]
    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    core.add_request("one", {"prompt_token_ids": ids}, parameters)
    most = decoding = 0
    while core.has_unfinished_requests():
        finished = any(one.finished for one in core.step())
        if not finished:
            [request] = scheduler(llm).running
            most = max(most, held_blocks(llm))
            if request.num_computed_tokens > len(ids) + 1:
                decoding = max(decoding, held_blocks(llm))
    return most, decoding


@pytest.mark.parametrize("window", [96, None])
def test_blocks_behind_the_window_go_back_while_the_request_runs(tmp_path: Path, window: int | None) -> None:
    folder = write(tmp_path / "weights", sliding_window=window)
    chunk, [ids] = 64, prompts([640])
    with engine(folder, max_num_batched_tokens=chunk, enable_prefix_caching=False) as llm:
        spec = type(next(iter(runner(llm).get_kv_cache_spec().values()))).__name__
        most, decoding = most_held(llm, ids, tokens=40)
        assert held_blocks(llm) == 0
    if window is None:
        assert (spec, most) == ("FullAttentionSpec", -(-(640 + 40 - 1) // BLOCK))
    else:
        assert spec == "SlidingWindowSpec"
        assert most <= -(-(window - 1 + chunk) // BLOCK) + 1 == 6
        assert decoding <= -(-(window - 1) // BLOCK) + 1 == 4


def adapter_of(folder: Path, target: Path, modules: list[str]) -> Path:
    """A random LoRA adapter, made and saved by peft."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(hugging_face(folder), LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.08)
    model.save_pretrained(target)
    return target


def test_lora_adapters_beside_the_bare_model_equal_peft(tmp_path: Path, measured: Measured) -> None:
    from peft import PeftModel

    folder = write(tmp_path / "weights")
    attention = adapter_of(folder, tmp_path / "attention", ["q_proj", "v_proj"])
    everything = adapter_of(
        folder, tmp_path / "everything", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    [ids] = prompts([200])
    bare = of_tokens(log_probabilities(hugging_face(folder), ids), ids)
    with engine(folder, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        [found] = prompt_logprobs(llm, [ids])
        measured("LoRA engine, no adapter asked for", float((found - bare).abs().max()), LIMIT)
        for number, adapter in enumerate((attention, everything), 1):
            [found] = prompt_logprobs(llm, [ids], lora_request=LoRARequest(adapter.name, number, str(adapter)))
            merged = PeftModel.from_pretrained(hugging_face(folder), adapter)
            wanted = of_tokens(merged(torch.tensor([ids])).logits[0].detach().log_softmax(-1), ids)
            assert float((wanted - bare).abs().max()) > 0.05
            measured(f"LoRA adapter on {adapter.name}, against peft", float((found - wanted).abs().max()), LIMIT)


def test_prompts_beside_one_another_with_lora_switched_on_each_get_the_log_probabilities_of_peft(
    tmp_path: Path, measured: Measured
) -> None:
    """Several prompts' log-probabilities in one step: vLLM's head for adapters took them for the rows of the sampled tokens."""
    from peft import PeftModel

    folder = write(tmp_path / "weights")
    adapter = adapter_of(folder, tmp_path / "attention", ["q_proj", "v_proj"])
    batch = prompts([200, 90, 150, 40])
    merged = PeftModel.from_pretrained(hugging_face(folder), adapter)
    with engine(folder, enable_lora=True, max_loras=1, max_lora_rank=8) as llm:
        bare = prompt_logprobs(llm, batch)
        found = prompt_logprobs(llm, batch, lora_request=LoRARequest("a", 1, str(adapter)))
    wanted = [of_tokens(merged(torch.tensor([ids])).logits[0].detach().log_softmax(-1), ids) for ids in batch]
    measured("LoRA, four prompts at once", max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)), LIMIT)
    measured("LoRA engine, four prompts at once, no adapter", largest_difference(bare, hugging_face(folder), batch), LIMIT)


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True, "sliding_window": None, "num_key_value_heads": 1}])
def test_consolidated_weights_equal_hugging_face_format(tmp_path: Path, shape: dict[str, object], measured: Measured) -> None:
    folder = write(tmp_path / "hf", **shape)
    other = consolidated(folder, tmp_path / "consolidated")
    batch = prompts([200, 60])
    reference = hugging_face(folder)
    with engine(other, tokenizer_mode="mistral") as llm:
        assert type(runner(llm).model).__module__ == "vllm_mistral.model"
        found = prompt_logprobs(llm, batch)
    measured(f"consolidated weights {shape or 'with a window'}", largest_difference(found, reference, batch), LIMIT)


def test_compiled_equals_eager(tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = write(tmp_path / "weights")
    batch = prompts([200, 60])
    reference = hugging_face(folder)
    with engine(folder, enforce_eager=False) as llm:
        config = llm.llm_engine.vllm_config.compilation_config
        assert config.mode.name != "NONE"
        assert list((tmp_path / "cache" / "torch_compile_cache").rglob("*.py")), "nothing was compiled"
        found = prompt_logprobs(llm, batch)
    measured("torch.compile", largest_difference(found, reference, batch), LIMIT)


def test_an_engine_that_samples_in_parts_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_RUN_DIR", str(tmp_path))
    write(tmp_path / "model")
    with engine(tmp_path / "model") as llm:
        run(llm, prompts([8]))
        model = runner(llm).model
        (tmp_path / files.ENGINE.name).unlink()
        model.report = inspection.EngineReport(model, runner(llm).vllm_config)
        hidden = torch.ones(2, model.config.hidden_size)
        parts = model.compute_logits_local(hidden)
        facts = inspection.read(tmp_path)
        assert facts is not None
        assert facts["architecture"] == "MistralSWAForCausalLM"
        assert torch.equal(parts, model.compute_logits(hidden))  # one process has the whole vocabulary


def quantize(folder: Path) -> None:
    """Turns the linear layers into int8 with a scale for each row, as compressed-tensors stores them; float copies beside."""
    tensors = load_file(folder / "model.safetensors")
    found, rounded = {}, {}
    for name, w in tensors.items():
        rounded[name] = w
        if not name.endswith("_proj.weight"):
            found[name] = w
            continue
        scale = w.abs().amax(1, keepdim=True) / 127
        whole = (w / scale).round().clamp(-128, 127).to(torch.int8)
        found |= {name: whole, name.replace(".weight", ".weight_scale"): scale}
        rounded[name] = whole.float() * scale
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(rounded, folder.with_name("rounded.safetensors"), metadata={"format": "pt"})


def test_quantized_weights(tmp_path: Path, measured: Measured) -> None:
    folder = write(tmp_path / "weights")
    [ids] = prompts([200])
    quantize(folder)
    plain = write(tmp_path / "plain")
    (tmp_path / "rounded.safetensors").replace(plain / "model.safetensors")
    wanted = of_tokens(log_probabilities(hugging_face(plain), ids), ids)
    with engine(folder, dtype="bfloat16") as llm:
        method = type(runner(llm).model.model.layers[0].self_attn.qkv_proj.quant_method).__name__
        assert "CompressedTensors" in method
        [found] = prompt_logprobs(llm, [ids])
    # The weights are the same; what differs is the rounding of activations to int8 in each layer, and to bfloat16 between
    # them: vLLM's kernel for processors with AMX takes no float32.
    measured("int8 weights and activations, mean over positions", float((found - wanted).abs().mean()), 0.2)


def test_tensor_parallel_over_two_processes(tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = write(tmp_path / "weights", num_key_value_heads=1)  # one KV head for two ranks: each keeps a copy
    batch = prompts([200, 60])
    reference = hugging_face(folder)
    with engine(folder, tensor_parallel_size=2) as llm:
        found = prompt_logprobs(llm, batch)
        [one] = run(llm, batch[1:], max_tokens=20, logprobs=0, ignore_eos=True)
    measured("tensor parallel over two processes", largest_difference(found, reference, batch), LIMIT)
    measured("tensor parallel, generated tokens", difference_behind(batch[1], *generated(one), reference), LIMIT)


def stage_of(worker: object) -> tuple[int, int, bool, bool, bool]:
    """First and last layer of a pipeline stage, and whether it embeds, has the final norm, and makes logits."""
    model = worker.get_model()  # type: ignore[attr-defined]
    has = [hasattr(part, "weight") for part in (model.model.embed_tokens, model.model.norm, model.lm_head)]
    loaded = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    assert loaded
    return (model.model.start_layer, model.model.end_layer, *has)


def test_pipeline_stages_load_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only loaded: vLLM's pipeline on a CPU does not get through a request. Tied, so that both stages have the embedding."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    folder = write(tmp_path / "weights", num_hidden_layers=3, tie_word_embeddings=True)
    with engine(folder, pipeline_parallel_size=2) as llm:
        first, last = llm.collective_rpc(stage_of)
    assert tuple(first)[2:] == (True, False, False)
    assert tuple(last)[2:] == (True, True, True)
    assert (first[0], first[1], last[1]) == (0, last[0], 3)
