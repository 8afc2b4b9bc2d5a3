"""Which adapters are served: the judgement of mistral_contract held to what vLLM itself makes of the same folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import prompts, write
from engines import engine, prompt_logprobs
from mistral_contract import architecture
from mistral_contract.adapters import RANKS, Adapter, AdapterError, changes_nothing, read, served_rank
from mistral_contract.architecture import Architecture
from mistral_node import adapters, contract
from mistral_node.client import Client
from mistral_node.contract import Code, LaunchError
from mistral_node.engines.vllm import lora_slots
from nodes import KEY, variables
from safetensors.torch import load_file, save_file
from test_canary import over_http
from vllm.lora.request import LoRARequest

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]

LAYERS = 2
SIZES = {
    "q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64), "o_proj": (128, 128), "gate_proj": (128, 192),
    "up_proj": (128, 192), "down_proj": (192, 128),
}  # fmt: skip


def name_of(module: str, side: str, layer: int = 0) -> str:
    part = "self_attn" if module[0] in "qkvo" else "mlp"
    return f"base_model.model.model.layers.{layer}.{part}.{module}.lora_{side}.weight"


def adapter(
    folder: Path, modules: tuple[str, ...] = ("q_proj", "v_proj"), ranks: dict[str, int] | None = None, **config: Any
) -> Path:
    """An adapter of random numbers for the tiny model, in PEFT's format."""
    torch.manual_seed(3)
    r = config.get("r", 4)
    tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            inputs, outputs = SIZES[module]
            rank = (ranks or {}).get(module, int(r))
            tensors[name_of(module, "A", layer)] = torch.randn(rank, inputs) * 0.3
            tensors[name_of(module, "B", layer)] = torch.randn(outputs, rank) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 8,
        "target_modules": list(modules),
        "bias": "none",
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def tensors(change: Callable[[Tensors], object]) -> Change:
    """A change of the tensors in the file."""

    def apply(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "adapter_model.safetensors")

    return apply


def config(**fields: Any) -> Change:
    """A change of adapter_config.json; a field that becomes `...` is left out."""

    def apply(folder: Path) -> None:
        found = json.loads((folder / "adapter_config.json").read_text()) | fields
        kept = {name: value for name, value in found.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(kept))

    return apply


def renamed(old: str, new: str) -> Change:
    def change(found: Tensors) -> None:
        for name in list(found):
            found[name.replace(old, new)] = found.pop(name)

    return tensors(change)


def cut(count: int) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-count])

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def pointer(file: str) -> Change:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 13107200\n"
    return lambda folder: (folder / file).write_text(text) and None


def gone(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def shape(module: str, side: str, *sizes: int) -> Change:
    return tensors(lambda found: found.update({name_of(module, side): torch.randn(*sizes)}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def base(model: Path) -> Architecture:
    return architecture.read(json.loads((model / "config.json").read_text()))


class Asked:
    """One engine, and what it answers with an adapter and without."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.number = llm, 0
        self.ids = prompts([60])
        self.bare = prompt_logprobs(llm, self.ids)[0]

    def difference(self, folder: Path) -> float:
        """The largest difference that the adapter makes; vLLM's own error where it refuses it."""
        self.number += 1
        request = LoRARequest(folder.name, self.number, str(folder))
        self.llm.llm_engine.add_lora(request)
        return float((prompt_logprobs(self.llm, self.ids, lora_request=request)[0] - self.bare).abs().max())


@pytest.fixture(scope="module")
def asked(model: Path) -> Iterator[Asked]:
    with engine(model, enable_lora=True, max_loras=1, max_lora_rank=RANKS[-1]) as llm:
        yield Asked(llm)


def test_log_probabilities_of_many_prompts_at_once_with_and_without_an_adapter(model: Path, tmp_path: Path) -> None:
    request = LoRARequest("one", 1, str(adapter(tmp_path / "one", tuple(SIZES))))
    ids = prompts([20 + 9 * number for number in range(24)])
    requests = [request if number % 2 else None for number in range(24)]
    with engine(model, enable_lora=True, max_loras=lora_slots(1, "cpu"), max_lora_rank=8) as llm:
        together = prompt_logprobs(llm, ids, lora_request=requests)
        alone = [prompt_logprobs(llm, [one], lora_request=[by])[0] for one, by in zip(ids, requests, strict=True)]
        bare = prompt_logprobs(llm, ids)
    assert max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)) < 1e-4
    changed = [float((a - b).abs().max()) > 0.01 for a, b in zip(together, bare, strict=True)]
    assert changed == [by is not None for by in requests]


ALL = tuple(SIZES)
SERVED: dict[str, tuple[dict[str, Any], Change | None, int]] = {
    "attention": ({}, None, 4),
    "all-linear": ({"modules": ALL}, None, 4),
    "rank-512": ({"r": 512}, None, 512),
    "rank-1": ({"r": 1}, None, 1),
    "rank-pattern": ({"ranks": {"q_proj": 64}, "rank_pattern": {"q_proj": 64}}, None, 64),
    "rank-pattern-by-layer": (
        {"ranks": {"v_proj": 16}, "rank_pattern": {r"layers\.[01]\.self_attn\.v_proj": 16}, "alpha_pattern": {"v_proj": 32}}, None, 16,
    ),
    "rslora": ({"use_rslora": True}, None, 4),
    "r-float": ({"r": 4.0}, None, 4),
    "one-layer": ({}, tensors(lambda found: [found.pop(name_of(m, s, 1)) for m in ("q_proj", "v_proj") for s in "AB"]), 4),
    "half-of-a-packed-matrix": ({"modules": ("k_proj", "up_proj")}, None, 4),
    "without-prefix": ({}, renamed("base_model.model.model.", "model."), 4),
    "wrapped-twice": ({}, renamed("base_model.model.model.", "base_model.model.base_model.model.model."), 4),
    "bfloat16": ({}, tensors(lambda found: found.update({n: t.bfloat16() for n, t in found.items()})), 4),
    "negative-alpha": ({"lora_alpha": -8}, None, 4),
    "without-peft-type": ({}, config(peft_type=..., bias=..., modules_to_save=...), 4),
    "gaussian": ({"init_lora_weights": "gaussian"}, None, 4),
    "unknown-fields": ({"task_type": "CAUSAL_LM", "fan_in_fan_out": True, "lora_dropout": 0.1, "eva_config": {"rho": 2}}, None, 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", SERVED)
def test_what_we_take_changes_what_vllm_answers(kind: str, tmp_path: Path, base: Architecture, asked: Asked) -> None:
    options, change, rank = SERVED[kind]
    folder = adapter(tmp_path / kind, **options)
    if change:
        change(folder)
    found = read(folder, base)
    assert (found.rank, changes_nothing(folder, found)) == (rank, False)
    assert served_rank((found,)) >= rank
    assert asked.difference(folder) > 1e-3


def test_an_untrained_adapter_changes_nothing_and_is_known_by_its_zeros(tmp_path: Path, base: Architecture, asked: Asked) -> None:
    folder = adapter(tmp_path / "fresh")
    tensors(lambda found: found.update({name: tensor * ("lora_A" in name) for name, tensor in found.items()}))(folder)
    assert changes_nothing(folder, read(folder, base))
    assert asked.difference(folder) == 0


REFUSES, IGNORES, WRONG = "refuses", "ignores", "computes something else"
REFUSED: dict[str, tuple[dict[str, Any], Change | None, str, str]] = {
    "rank-1024": ({"r": 1024}, None, "its rank is 1024 and vLLM takes at most 512", REFUSES),
    "rank-600": ({"r": 600}, None, "its rank is 600", REFUSES),
    "rank-pattern-beyond": ({"ranks": {"q_proj": 600}, "rank_pattern": {"q_proj": 600}}, None, "its rank is 600", REFUSES),
    "rank-pattern-of-no-module": ({"rank_pattern": {"x_proj": 600}}, None, "its rank is 600", REFUSES),
    "rank-0": ({}, config(r=0), "r and rank_pattern", REFUSES),
    "rank-text": ({}, config(r="4"), "r and rank_pattern", REFUSES),
    "rank-pattern-float": ({"rank_pattern": {"q_proj": 4.0}}, None, "r and rank_pattern", REFUSES),
    "rank-pattern-broken": ({"rank_pattern": {"q_proj(": 4}}, None, "is no pattern", REFUSES),
    "rank-other-than-tensors": ({}, config(r=8), "is not the rank 8", WRONG),
    "rank-smaller-than-tensors": ({}, config(r=2), "is not the rank 2", WRONG),
    "rank-pattern-left-out": ({"ranks": {"q_proj": 64}}, None, "is not the rank 4", WRONG),
    "ia3": ({}, config(peft_type="IA3", r=..., lora_alpha=...), "its peft_type is IA3 and vLLM serves LORA only", REFUSES),
    "ia3-with-r": ({}, config(peft_type="IA3"), "its peft_type is IA3", WRONG),
    "no-alpha": ({}, config(lora_alpha=...), "has no lora_alpha", REFUSES),
    "alpha-text": ({}, config(lora_alpha="8"), "lora_alpha and alpha_pattern", REFUSES),
    "alpha-nan": ({}, config(lora_alpha=float("nan")), "lora_alpha and alpha_pattern", WRONG),
    "alpha-0": ({}, config(lora_alpha=0), "changes nothing", IGNORES),
    "no-target-modules": ({}, config(target_modules=...), "has no target_modules", REFUSES),
    "dora": ({"use_dora": True}, None, "it uses DoRA (use_dora)", REFUSES),
    "lora-bias": ({"lora_bias": True}, None, "it uses a LoRA bias", REFUSES),
    "alora": ({"alora_invocation_tokens": [1, 2]}, None, "it uses activated LoRA", REFUSES),
    "qalora": ({"use_qalora": True}, None, "it uses QALoRA", REFUSES),
    "replicated": ({"layer_replication": [[0, 1], [0, 2]]}, None, "it uses replicated layers", REFUSES),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, None, "it uses block-diagonal LoRA", REFUSES),
    "bias-all": ({"bias": "all"}, None, "it has biases (bias: all)", REFUSES),
    "bias-null": ({"bias": None}, None, "it has biases (bias: None)", REFUSES),
    "modules-to-save": ({"modules_to_save": ["embed_tokens", "lm_head"]}, None, "modules_to_save: embed_tokens, lm_head", REFUSES),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, None, "its initialisation (pissa_niter_16)", REFUSES),
    "loftq": ({"init_lora_weights": "loftq"}, None, "its initialisation (loftq)", REFUSES),
    "list": ({}, lambda folder: (folder / "adapter_config.json").write_text("[]") and None, "is not a JSON object", REFUSES),
    "not-json": ({}, lambda folder: (folder / "adapter_config.json").write_text("{") and None, "is not JSON", REFUSES),
    "no-config": ({}, gone("adapter_config.json"), "it has no adapter_config.json", REFUSES),
    "config-pointer": ({}, pointer("adapter_config.json"), "git-lfs pointer", REFUSES),
    "no-tensors": ({}, gone("adapter_model.safetensors"), "it has no adapter_model.safetensors", REFUSES),
    "pickled": ({}, pickled, "pickled, which can run code", WRONG),
    "tensors-pointer": ({}, pointer("adapter_model.safetensors"), "git-lfs pointer", REFUSES),
    "cut-off": ({}, cut(100), "by its header", REFUSES),
    "cut-off-in-the-header": ({}, lambda folder: cut((folder / "adapter_model.safetensors").stat().st_size - 50)(folder), "cut short", REFUSES),
    "empty-file": ({}, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"") and None, "cut short", REFUSES),
    "a-byte-more": (
        {}, lambda folder: (folder / "adapter_model.safetensors").open("ab").write(b"\0") and None, "by its header", REFUSES,
    ),
    "empty": ({}, tensors(lambda found: found.clear()), "has no tensor", REFUSES),
    "names-of-no-module": ({}, renamed("model.model.layers", "model.layers"), "fit no module of the model", IGNORES),
    "names-of-another-class": ({}, renamed("model.layers", "model.language_model.layers"), "fit no module", IGNORES),
    "names-of-gpt2": ({}, renamed("self_attn.q_proj", "attn.c_attn"), "fit no module", REFUSES),
    "one-name-of-no-module": (
        {}, tensors(lambda found: found.update({"base_model.model.model.layers.0.mlp.q_proj.lora_A.weight": torch.ones(4, 128)})),
        "1 of its 9 tensors", REFUSES,
    ),
    "layer-the-model-lacks": ({}, renamed("layers.1", "layers.7"), "it adapts layer 7 and the model has 2 layers", WRONG),
    "fused": ({}, renamed("q_proj", "qkv_proj"), "fit no module", REFUSES),
    "norm": ({}, renamed("self_attn.q_proj", "input_layernorm"), "fit no module", REFUSES),
    "adapter-name-in-names": ({}, renamed(".weight", ".default.weight"), "carry an adapter's name", REFUSES),
    "magnitude": (
        {}, tensors(lambda found: found.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(128)})),
        "fit no module", REFUSES,
    ),
    "saved-embeddings": (
        {}, tensors(lambda found: found.update({"base_model.model.model.embed_tokens.weight": torch.ones(512, 128)})),
        "it brings embeddings of its own", REFUSES,
    ),
    "embedding": (
        {}, tensors(lambda found: found.update({
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 512),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(128, 4)})),
        "it adapts embeddings or head", REFUSES,
    ),
    "head": (
        {}, tensors(lambda found: found.update({
            "base_model.model.lm_head.lora_A.weight": torch.ones(4, 128), "base_model.model.lm_head.lora_B.weight": torch.ones(512, 4)})),
        "it adapts embeddings or head", REFUSES,
    ),
    "only-a": ({}, tensors(lambda found: found.pop(name_of("q_proj", "B"))), "it has only lora_A", REFUSES),
    "only-b": ({}, tensors(lambda found: found.pop(name_of("q_proj", "A"))), "it has only lora_B", WRONG),
    "input-too-small": ({}, shape("q_proj", "A", 4, 64), "takes 128 and gives 128 in this model, 64 and 128", WRONG),
    "input-too-large": ({}, shape("q_proj", "A", 4, 256), "takes 128 and gives 128 in this model, 256 and 128", REFUSES),
    "output-too-small": ({}, shape("v_proj", "B", 32, 4), "takes 128 and gives 64 in this model, 128 and 32", WRONG),
    "output-too-large": ({}, shape("v_proj", "B", 128, 4), "takes 128 and gives 64 in this model, 128 and 128", REFUSES),
    "integers": (
        {}, tensors(lambda found: found.update({n: (t * 10).to(torch.int8) for n, t in found.items()})), "is of type I8", WRONG,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_we_refuse_vllm_refuses_ignores_or_gets_wrong(kind: str, tmp_path: Path, base: Architecture, asked: Asked) -> None:
    options, change, says, outcome = REFUSED[kind]
    folder = adapter(tmp_path / kind, **options)
    if change:
        change(folder)
    with pytest.raises(AdapterError) as error:
        read(folder, base)
    assert says in str(error.value)
    assert str(error.value).isprintable()
    try:
        got = IGNORES if asked.difference(folder) == 0 else WRONG
    except Exception:  # noqa: BLE001 - whatever vLLM raises is its refusal
        got = REFUSES
    assert got == outcome


def checked(asked: Asked, folders: dict[str, Path], judged: dict[str, Adapter]) -> dict[str, adapters.Answer]:
    """What the launcher's check says of the engine with these adapters, named in its API."""
    wanted = dataclasses.replace(contract.read(variables(Path("/node"))), adapters=tuple(folders.items()))
    requests = {}
    for name, folder in folders.items():
        asked.number += 1
        requests[name] = LoRARequest(name, asked.number, str(folder))
    with over_http(asked.llm, requests) as url:
        return adapters.check(Client(url, KEY), wanted, judged)


def test_the_check_asks_every_adapter(tmp_path: Path, base: Architecture, asked: Asked) -> None:
    folders = {"good": adapter(tmp_path / "good"), "fresh": adapter(tmp_path / "fresh")}
    tensors(lambda found: found.update({name: tensor * ("lora_A" in name) for name, tensor in found.items()}))(folders["fresh"])
    answers = checked(asked, folders, {name: read(folder, base) for name, folder in folders.items()})
    assert answers["good"].state == "answers"
    assert answers["good"].max_difference > 1e-3
    assert answers["fresh"] == adapters.Answer("changes nothing", 0.0)


def published(folder: Path, asked: Asked, **changes: Any) -> Path:
    """Write beside an adapter what the engine says with it of eight tokens, as training does; with changes."""
    asked.number += 1
    request = LoRARequest(folder.name, asked.number, str(folder))
    [ids] = asked.ids
    said = prompt_logprobs(asked.llm, asked.ids, lora_request=request)[0][-8:].tolist()
    figures = {
        "prompt_token_ids": ids[:-8],
        "forced_token_ids": ids[-8:],
        "logprobs": said,
        "dtype": "float32",
        "weights": "a-run",
    }
    (folder / "mistralctl-canary.json").write_text(json.dumps(figures | changes))
    return folder


def test_the_check_holds_an_adapter_to_the_canary_beside_it(
    tmp_path: Path, base: Architecture, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(adapter(tmp_path / "good"), asked)
    judged = {"good": read(folder, base)}
    checked(asked, {"good": folder}, judged)
    assert "the adapter good computes what it did when it was published" in capsys.readouterr().out
    for changes, why in (
        ({"logprobs": [-0.01] * 8}, "the adapter good does not compute what it did when it was published"),
        ({"logprobs": [-1.0] * 7}, "the adapter good: its mistralctl-canary.json is damaged"),
    ):
        with pytest.raises(LaunchError, match=why) as error:
            checked(asked, {"good": published(folder, asked, **changes)}, judged)
        assert error.value.code == Code.CANARY
    published(folder, asked, logprobs=[-0.01] * 8, forced_token_ids=[5] * 8, prompt_token_ids=[5] * (1 << 16))
    checked(asked, {"good": folder}, judged)  # longer than this deployment takes


def test_the_check_fails_for_an_adapter_that_vllm_loads_and_ignores(tmp_path: Path, base: Architecture, asked: Asked) -> None:
    good, ignored = adapter(tmp_path / "good"), adapter(tmp_path / "ignored")
    renamed("model.model.layers", "model.layers")(ignored)
    judged = {"good": read(good, base), "sql": read(good, base)}
    with pytest.raises(LaunchError, match="the adapter sql answers exactly like the model without it") as error:
        checked(asked, {"good": good, "sql": ignored}, judged)
    assert error.value.code == Code.CANARY


def test_the_launcher_names_the_adapter_that_cannot_be_served(tmp_path: Path, model: Path) -> None:
    folders = {"good": adapter(tmp_path / "good"), "sql": adapter(tmp_path / "sql", use_dora=True)}
    wanted = dataclasses.replace(contract.read(variables(tmp_path)), adapters=tuple(folders.items()))
    with pytest.raises(LaunchError, match="the adapter sql: it uses DoRA") as error:
        adapters.judged(wanted, model)
    assert error.value.code == Code.WEIGHTS
    config(use_dora=False)(folders["sql"])
    assert list(adapters.judged(wanted, model)) == ["good", "sql"]


def test_an_adapter_that_tells_of_itself_in_control_characters_is_shown_in_one_line(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "hostile")
    config(peft_type="LORA\n\x1b[2Jrm -rf" + "x" * 9000)(folder)
    with pytest.raises(AdapterError) as error:
        read(folder, None)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 600


def test_ranks_are_those_that_vllm_takes() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == RANKS
