"""The plan of a run of fine-tuning: memory by method, time and price, what fits, and every contradiction in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mistral_contract.quantization import Scheme
from mistralctl import config, training, training_data
from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.finetune_spec import FinetuneSpec
from mistralctl.gpus import GIB, GPUS
from mistralctl.machine import Machine
from mistralctl.models import MODELS, Stored
from mistralctl.training import Tokens, Wanted

SEVEN = MODELS["mistral-7b-instruct-v0.1"]
TINY = MODELS["smollm2-135m-instruct"]
MANY = Tokens(2_000_000, 900, 5000, 5000, 700_000, "test")


def sourced(**flags: Any) -> Sourced[FinetuneSpec]:
    given = {"data": "chats.jsonl", "out": "s3://bucket/adapter", **flags}
    return config.load({name: value for name, value in given.items() if value is not None}, {}, None, kind=FinetuneSpec)


def wanted(model: Any = SEVEN, tokens: Tokens | None = MANY, machine: Machine | None = None) -> Wanted:
    return Wanted(model, model.weights, model.revision, "folder", "/chats.jsonl", "", tokens, "c0ffee", {}, machine)


def plan(row: Any = SEVEN, tokens: Tokens | None = MANY, machine: Machine | None = None, **flags: Any) -> training.Run:
    return training.make(sourced(**flags), wanted(row, tokens, machine))


def gib(method: str, gpus: int = 1, length: int = 4096) -> float:
    assert SEVEN.shape
    return training.need(SEVEN.shape, sourced(method=method).spec, length, "cuda", gpus).total / GIB


def test_memory_by_method_is_that_of_the_formula() -> None:
    """18 to 20 GB for LoRA of 7B, 8 to 10 for QLoRA, 16 bytes a parameter for all of them, divided by the GPUs."""
    assert SEVEN.shape
    assert training.adapter_parameters(SEVEN.shape, 16) == 41_943_040
    assert [round(gib(method), 1) for method in ("lora", "qlora", "full")] == [18.1, 8.5, 111.9]
    assert gib("full", 8) == pytest.approx(107.9 / 8 + 4.02, abs=0.01)
    assert gib("lora", 8) == gib("lora")
    full = training.need(SEVEN.shape, sourced(method="full").spec, 4096, "cuda")
    assert full.trained == 16 * SEVEN.shape.parameters
    longer = training.need(SEVEN.shape, sourced().spec, 8192, "cuda")
    assert longer.activations == 2 * training.need(SEVEN.shape, sourced().spec, 4096, "cuda").activations


def test_speed_is_a_published_profile_scaled() -> None:
    same = training.speed(round(training.PROFILE_PARAMETERS), "lora", "A100-80GB", 1)
    assert same is not None
    assert same == pytest.approx(8 * 4096 / 10.1)
    assert training.speed(round(training.PROFILE_PARAMETERS), "lora", "L4", 1) == pytest.approx(same * 121 / 312)
    assert training.speed(round(training.PROFILE_PARAMETERS), "lora", "L4", 4) == pytest.approx(same * 121 / 312 * 3.6)
    assert training.speed(7_000_000_000, "lora", "RTX", 1) is None
    assert set(training.TFLOPS) == {gpu.name for gpu in GPUS.values() if gpu.bfloat16}


def test_the_machine_by_which_the_run_costs_least_comes_first() -> None:
    found = plan()
    assert [option.usd for option in found.options] == sorted(option.usd or 0 for option in found.options)
    assert {option.count for option in found.options} == {found.chosen.count}
    assert all((option.usd or 0) <= 2 * (found.chosen.usd or 0) for option in found.options)
    chosen = found.chosen
    assert chosen.hours is not None
    assert chosen.tokens_per_second is not None
    assert chosen.hours == pytest.approx(3 * 2_000_000 / chosen.tokens_per_second / 3600)
    assert chosen.usd == pytest.approx((chosen.hours + 25 / 60) * (chosen.price or 0), abs=0.01)
    refused = {option.label: option.reason or "" for option in found.refused}
    assert "no bfloat16" in refused["T4:1"]
    assert found.steps == 3 * -(-2_000_000 // 16384)
    lines = list(found.lines)
    assert lines[0] == "5000 chats, 2000000 tokens of which 700000 are learnt, the longest 900 (test)"
    assert "computed" in lines[2]
    assert "Qwen-7B on an A100" in lines[3]
    assert "USD by the snapshot of 2026-" in lines[3]


def test_full_tuning_takes_as_many_gpus_as_it_needs() -> None:
    found = plan(method="full")
    assert found.chosen.count >= 2
    assert found.learning_rate == 1e-5
    assert any("GiB are needed on each GPU" in (option.reason or "") for option in found.refused)


@pytest.mark.parametrize(
    ("tokens", "longest", "batch", "length"), [(884, 46, 110, 110), (40, 30, 30, 30), (10**7, 900, 16384, 4096)]
)
def test_few_chats_make_small_steps(tokens: int, longest: int, batch: int, length: int) -> None:
    """One step an epoch learns nothing, so a step is at most an eighth of the chats; a row is no longer than a step."""
    found = plan(tokens=Tokens(tokens, longest, 20, 20, 100, "test"))
    assert (found.batch_tokens, found.length) == (batch, length)


def test_this_machine_trains_what_fits_into_it() -> None:
    machine = Machine(24 * GIB, 2)
    found = plan(TINY, Tokens(884, 46, 20, 20, 142, "test"), machine, cloud="local", out="/tmp/out")
    assert (found.local, found.device, found.dtype, found.chosen.usd) == (True, "cpu", "float32", None)
    with pytest.raises(UserError, match=r"GiB are needed and 20.4 GiB are there; --method qlora needs") as error:
        plan(SEVEN, MANY, machine, cloud="local", out="/tmp/out")
    assert error.value.code == Exit.NO_FIT


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"data": None}, "--data: the chats must be given; name a file, for example --data chats.jsonl"),
        ({"out": None}, "--out: where the result goes must be given; name a bucket or a folder"),
        (
            {"out": "adapter"},
            "--out: 'adapter' is neither a URI nor a folder; write ./adapter, or for example s3://bucket/adapter",
        ),
        ({"out": "hf://me/adapter"}, "--out: 'hf://me/adapter': nothing can be written to hf://; name a bucket or a folder"),
        ({"out": "/tmp/out"}, "--out: /tmp/out is a folder of this machine; add --cloud local, or name a bucket"),
        (
            {"out": "/tmp/out", "cloud": "aws"},
            "--out: /tmp/out is a folder of this machine, and a machine on aws cannot write there",
        ),
        (
            {"data": "hf://me/chats"},
            "--data: 'hf://me/chats': chats are read from a file of this machine or from s3://, gs://, az://",
        ),
        ({"rank": "513"}, "--rank: '513' is out of range; it must be at most 512"),
        ({"rank": "0"}, "--rank: '0' is out of range; it must be at least 1"),
        (
            {"max_length": "40000"},
            "--max-length: 40000 is beyond the context of mistral-7b-instruct-v0.1, 32768 tokens; give at most 32768",
        ),
        ({"method": "dora"}, "--method: 'dora' is not one of lora, qlora, full"),
        ({"method": "full", "accelerators": "L4:1"}, "--accelerators: full of mistral-7b-instruct-v0.1 does not fit: L4:1: "),
        ({"method": "full", "accelerators": "L4:1"}, "; --method lora needs 18.1 GiB"),
        ({"cloud": "local", "spot": True}, "--spot: means nothing on this machine (--cloud local); leave one of the two out"),
        ({"cloud": "local", "budget": "5"}, "--budget: means nothing on this machine (--cloud local); leave one of the two out"),
        ({"region": "eu-west-9"}, "--region: aws has no region 'eu-west-9'; one of "),
        ({"save": "never"}, "--save: a run without checkpoints loses all when it is killed; write for example 10m"),
        ({"budget": "0.05"}, "--budget: 0.05 USD buys "),
        ({"method": "full", "merge": True}, "--merge: full tuning has no adapter to merge; leave it out"),
        ({"epochs": "0"}, "--epochs: '0' is out of range; it must be at least 1"),
        ({"learning_rate": "2"}, "--learning-rate: '2' is out of range; it must be at most 1"),
        ({"max_price": "0.01"}, "USD/h is above --max-price 0.01"),
    ],
)
def test_what_cannot_go_well_is_one_line_before_anything_is_rented(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        plan(**flags)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_budget_counts_by_the_dearest_machine_that_may_be_rented() -> None:
    found = plan(budget="5")
    assert found.price == max(option.price or 0 for option in found.options)
    assert found.life_minutes == min(1440, int(5 / found.price * 60))
    assert plan().price is None


def test_a_quantized_model_is_not_trained() -> None:
    quantized = replace(SEVEN, stored=Stored(scheme=Scheme("awq", 4, ())))
    with pytest.raises(UserError, match=r"is quantized \(awq\); train on the weights that it was made from"):
        plan(quantized)


def test_the_tokenizer_of_a_folder_is_found_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "home"))
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    uri = f"file://{quote(str(folder))}"
    assert training_data.tokenizer_folder(training_data.Place(uri, "", "none-of-these")) == folder


def test_mistrals_own_format_is_refused_here() -> None:
    own = replace(SEVEN, stored=Stored(form="consolidated"))
    with pytest.raises(UserError, match=r"has Mistral's own format only \(consolidated\*.safetensors\), which is not trained"):
        plan(own)
