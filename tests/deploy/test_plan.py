from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mistralctl import checkpoints, plan, state, tasks
from mistralctl.commands import plan as plan_command
from mistralctl.commands import tables as facts
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.gpus import GIB
from mistralctl.machine import Machine
from mistralctl.models import MODELS
from mistralctl.output import models_text, plan_text
from mistralctl.plan import Plan
from mistralctl.tasks import mirror, serve
from weights_folders import AWQ, FP8, GPTQ, W4A16, folder, whole, write

SMALL = Machine(24 * GIB, 2)


def make(machine: Machine | None = SMALL, **flags: Any) -> Plan:
    sourced = load(flags, {}, None)
    return plan.make(sourced, checkpoints.resolve(sourced), machine)


def refused(of: Plan) -> dict[str, str | None]:
    return {f"{option.cloud} {option.label}": option.reason for option in of.refused}


def test_the_cheapest_that_fits_comes_first_and_the_rest_say_why_not() -> None:
    got = make()
    assert [(o.cloud, o.label, o.price) for o in got.options] == [
        ("gcp", "L4:1", 0.70452),
        ("aws", "L4:1", 0.8048),
        ("aws", "A10G:1", 1.006),
    ]
    why = refused(got)
    assert why["aws T4:1"] == "no bf16, and 13.5 GiB of weights leave no room for the cache"
    assert (
        why["aws H100:1"] == "6.88 USD/h is more than twice the cheapest that fits; ask for it with --accelerators or --max-price"
    )


def test_a_price_limit_admits_whatever_is_below_it() -> None:
    got = make(max_price=3.0)
    assert [f"{o.cloud} {o.label}" for o in got.options] == [
        "gcp L4:1", "aws L4:1", "aws A10G:1", "aws L40S:1", "gcp A100:1", "gcp A100-80GB:1",
    ]  # fmt: skip
    assert refused(got)["aws H100:1"] == "6.88 USD/h is above --max-price 3"


def test_a_machine_that_is_sold_as_spot_only_is_planned_as_spot_only() -> None:
    why = "gcp sells a3-highgpu-1g as a spot machine only; add --spot"
    assert refused(make())["gcp H100:1"] == why
    with pytest.raises(UserError, match=why):
        make(cloud=["gcp"], accelerators="H100")
    assert make(cloud=["gcp"], accelerators="H100", spot=True).chosen.instance_type == "a3-highgpu-1g"
    assert make(cloud=["gcp"], accelerators="H100:8").chosen.instance_type == "a3-highgpu-8g"
    [row] = [row for row in facts.gpus().rows if row.instance_type == "a3-highgpu-1g"]
    assert row.price is None
    assert row.spot_price


def test_a_price_limit_is_repeated_as_it_was_typed_and_never_in_exponents() -> None:
    assert refused(make(max_price="3.00"))["aws H100:1"] == "6.88 USD/h is above --max-price 3.00"
    cheap = make(
        cloud=["aws"], region="eu-central-1", max_price=0.00001
    )  # no price is known there, so it is SkyPilot's to refuse
    assert "  max_hourly_cost: 0.00001\n" in tasks.dump(serve.render(cheap, owner="x"))


def test_a_cloud_that_was_named_is_in_the_task_with_its_cheapest_machine_whatever_the_others_cost() -> None:
    def machines(**flags: Any) -> list[str]:
        return [f"{option.cloud} {option.label}" for option in make(**flags).options]

    assert machines(cloud=["aws", "gcp", "azure"]) == ["gcp L4:1", "aws L4:1", "aws A10G:1", "azure A100-80GB:1"]
    assert machines(cloud=["gcp", "azure"], spot=True) == ["gcp L4:1", "azure A100-80GB:1"]
    assert "azure A100-80GB:1" not in machines()
    assert machines(cloud=["aws", "azure"], max_price=1.0) == ["aws L4:1"]  # a limit rules over everything
    # Its other machines are fall-backs like all others.
    assert "more than twice the cheapest" in str(refused(make(cloud=["aws", "azure"]))["azure H100:1"])


def test_spot_sorts_by_the_price_of_spot() -> None:
    got = make(spot=True)
    prices = [option.spot_price for option in got.options]
    assert prices == sorted(p for p in prices if p is not None)
    assert got.chosen.label == "L4:1"


def test_the_window_raises_what_fits_at_once() -> None:
    fit = make(accelerators="L4:1").chosen.fit
    assert fit is not None
    assert (fit.request_tokens, fit.request_tokens_without_window) == (6160, 32768)
    assert fit.concurrency > 5.3 * fit.concurrency_without_window


def test_more_requests_at_once_need_a_larger_gpu() -> None:
    got = make(max_concurrency=20)
    assert "L4:1" not in {option.label for option in got.options}
    assert got.chosen.fit is not None
    assert got.chosen.fit.concurrency >= 20
    assert got.max_num_seqs == 20


def test_a_small_model_needs_no_gpu() -> None:
    got = make(model="smollm2-135m-instruct")
    assert (got.device, [o.cloud for o in got.options]) == ("cpu", ["aws", "gcp", "azure"])
    assert make(model="smollm2-135m-instruct", accelerators="L4").device == "cuda"


@pytest.mark.parametrize(
    ("requests", "length", "gib"), [(None, None, 3), (2, None, 1), (8, 2048, 1), (8, 8192, 3), (11, None, 4)]
)
def test_the_cache_on_a_cpu_is_no_larger_than_requests_can_fill(requests: int | None, length: int | None, gib: int) -> None:
    got = make(SMALL, model="smollm2-135m-instruct", cloud=["local"], max_concurrency=requests, max_model_len=length)
    assert got.kv_cache_gib == gib
    assert got.chosen.fit is not None
    assert got.chosen.fit.concurrency >= got.max_num_seqs


def test_tensor_parallel_asks_for_that_many_gpus() -> None:
    got = make(cloud=["aws"], tensor_parallel=8)
    assert {option.count for option in got.options} == {8}
    assert got.tensor_parallel == 8


@pytest.mark.parametrize(
    ("accelerators", "sold"),
    [
        ("L4:2", {"gcp": "g2-standard-24"}), ("L4:4", {"aws": "g6.12xlarge", "gcp": "g2-standard-48"}),
        ("L4:8", {"aws": "g6.48xlarge", "gcp": "g2-standard-96"}), ("A10G:4", {"aws": "g5.12xlarge"}), ("A10G:8", {"aws": "g5.48xlarge"}),
        ("L40S:4", {"aws": "g6e.12xlarge"}), ("L40S:8", {"aws": "g6e.48xlarge"}), ("A100:2", {"gcp": "a2-highgpu-2g"}),
        ("A100:4", {"gcp": "a2-highgpu-4g"}),
        ("A100:8", {"aws": "p4d.24xlarge", "gcp": "a2-highgpu-8g", "azure": "Standard_ND96asr_v4"}),
        ("A100-80GB:2", {"gcp": "a2-ultragpu-2g", "azure": "Standard_NC48ads_A100_v4"}),
        ("A100-80GB:4", {"gcp": "a2-ultragpu-4g", "azure": "Standard_NC96ads_A100_v4"}),
        ("A100-80GB:8", {"aws": "p4de.24xlarge", "gcp": "a2-ultragpu-8g", "azure": "Standard_ND96amsr_A100_v4"}),
        ("H100:2", {"azure": "Standard_NC80adis_H100_v5"}), ("H100:8", {"aws": "p5.48xlarge", "gcp": "a3-highgpu-8g"}),
    ],
)  # fmt: skip
def test_several_gpus_are_planned_on_every_cloud_that_sells_them(accelerators: str, sold: dict[str, str]) -> None:
    got = make(accelerators=accelerators)
    assert {option.cloud: option.instance_type for option in got.options} == sold
    assert got.tensor_parallel == int(accelerators.partition(":")[2])
    assert None not in {option.price for option in got.options}
    whole = make(accelerators="L4:1").chosen.fit
    assert whole is not None
    assert got.chosen.fit is not None
    assert got.chosen.fit.weight_bytes * got.tensor_parallel == pytest.approx(whole.weight_bytes)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_tensor_parallel_alone_finds_a_machine_with_so_many_gpus(gpus: int) -> None:
    got = make(tensor_parallel=gpus)
    assert {option.count for option in got.options} == {gpus}
    assert got.chosen.label == f"L4:{gpus}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cloud: [aws]\ntensor_parallel: 2", ":2: tensor_parallel: aws sells no machine with 2 GPUs in the snapshot; L4:1, A10G:1, L40S:1, L4:4 "
         "would fit there; it is sold on gcp, azure"),
        ("cloud: [aws]\naccelerators: L4:2", ":2: accelerators: aws sells no L4:2 in the snapshot; L4:1, A10G:1, L40S:1, L4:4 would fit "
         "there; it is sold on gcp"),
        ("max_price: 0.1", ":1: max_price 0.1 is below the cheapest that would fit, 0.70 USD/h"),
    ],
)  # fmt: skip
def test_what_nobody_sells_is_said_with_what_is_sold_and_where_the_value_stands(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    sourced = load({}, {}, tmp_path / "m.yaml")
    with pytest.raises(UserError) as error:
        plan.make(sourced, checkpoints.resolve(sourced), SMALL)
    assert f"{tmp_path / 'm.yaml'}{says}" in str(error.value)
    assert error.value.code is Exit.NO_FIT


def test_a_limit_of_the_file_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("max_price: 3")
    sourced = load({}, {}, tmp_path / "m.yaml")
    got = plan.make(sourced, checkpoints.resolve(sourced), SMALL)
    assert refused(got)["aws H100:1"] == f"6.88 USD/h is above {tmp_path / 'm.yaml'}:1: max_price 3"


def test_a_region_without_a_price_is_planned_with_an_unknown_price() -> None:
    got = make(cloud=["aws"], region="eu-central-1")
    assert got.chosen.region == "eu-central-1"
    assert got.chosen.price is None


def test_this_machine_says_what_it_lacks() -> None:
    with pytest.raises(UserError) as error:
        make(Machine(8 * GIB, 2), cloud=["local"])
    assert error.value.code is Exit.NO_FIT
    assert str(error.value) == (
        "mistral-7b-instruct-v0.1 does not fit: this machine (2 cores, 8 GiB): 13.5 GiB of weights and 4 GiB for vLLM and the "
        "system leave no room for the cache in 8 GiB; A10, A10G, L4, L40S, A100, A100-80GB, H100 would fit; "
        "smollm2-135m-instruct runs on any machine, and mistralctl plan shows the "
        "clouds"
    )


def test_a_folder_is_planned_by_its_own_config(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,'
        ' "num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 512, "sliding_window": 32}'
    )
    write(tmp_path / "model.safetensors", whole(json.loads((tmp_path / "config.json").read_text())))
    (tmp_path / "tokenizer.model").touch()
    got = make(model=str(tmp_path), cloud=["local"])
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert got.model.shape is not None
    assert got.model.shape.parameters == 2 * layer + 2 * 100 * 64 + 64
    assert (got.sliding_window, got.max_model_len, got.weights) == (32, 512, f"file://{tmp_path}")


GB = 1e9


@pytest.mark.parametrize(
    ("config", "gigabytes"),
    [
        (None, 14.48),
        (AWQ, 4.15),
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, 6.14),
        (GPTQ, 4.15),
        (GPTQ | {"bits": 8}, 7.67),
        (GPTQ | {"bits": 8, "desc_act": True, "group_size": -1}, 7.50),
        (GPTQ | {"dynamic": {"-:.*mlp.*": {}}}, 12.50),
        (FP8, 7.50),
        (W4A16, 4.12),
        (W4A16 | {"ignore": ["lm_head", "re:.*self_attn.*"]}, 6.12),
    ],
    ids=str,
)
def test_quantized_weights_are_planned_at_the_size_that_their_config_says(
    config: dict[str, Any] | None, gigabytes: float, tmp_path: Path
) -> None:
    more = {} if config is None else {"quantization_config": config}
    fit = make(model=str(folder(tmp_path / "m", **more)), accelerators="L4").chosen.fit
    assert fit is not None
    assert fit.weight_bytes / GB == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(
    ("config", "wanted", "code", "says"),
    [
        (None, "awq", 2, "--quantization: awq needs weights that are so quantized, and these are not"),
        (AWQ, "gptq", 2, "--quantization: gptq does not go with these weights, which are quantized with awq; leave it out"),
        (FP8, "awq", 2, "--quantization: awq does not go with these weights, which are quantized with fp8"),
        (GPTQ | {"bits": 3}, None, 10, "gptq with 3 bits is not served by vLLM 0.32, only with 4, 8"),
        (GPTQ | {"desc_act": True}, None, 10, "gptq with desc_act is not served by vLLM 0.32"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None, 10, "quantization_config: bitsandbytes is not served"),
        ({"quant_method": "hqq"}, "awq", 10, "quantization_config: hqq is not served; use a copy in fp8, awq, gptq, compressed-te"),
        ({"group_size": 64, "bits": 4}, None, 10, "a method without a name is not served"),
        (W4A16 | {"config_groups": 3}, None, 10, "compressed-tensors cannot be read"),
    ],
)  # fmt: skip
def test_weights_quantized_otherwise_are_refused_before_anything_is_rented(
    config: dict[str, Any] | None, wanted: str | None, code: int, says: str, tmp_path: Path
) -> None:
    more = {} if config is None else {"quantization_config": config}
    with pytest.raises(UserError) as error:
        make(model=str(folder(tmp_path / "m", **more)), accelerators="L4", quantization=wanted)
    assert error.value.code == code
    assert says in str(error.value)


def test_a_configuration_of_older_tools_beside_config_json_counts(tmp_path: Path) -> None:
    quantized = {"bits": 8, "group_size": 128, "desc_act": False, "sym": True}
    old = folder(tmp_path / "m", files={"quantize_config.json": json.dumps(quantized).encode()})
    scheme = make(model=str(old), accelerators="L4").model.stored.scheme
    assert scheme is not None
    assert scheme.label == "gptq, 8 bits"


def test_fp8_of_weights_that_are_not_quantized_halves_them_and_not_the_disk() -> None:
    plain, got = make(accelerators="L4"), make(accelerators="L4", quantization="fp8")
    assert got.chosen.fit is not None
    assert got.chosen.fit.weight_bytes / GB == pytest.approx(7.50, abs=0.01)
    sizes = [serve.render(one, owner="x")["resources"]["disk_size"] for one in (plain, got)]
    assert sizes[0] == sizes[1]


def test_plan_says_what_up_would_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))

    def planned(**options: Any) -> Plan:
        return plan_command.run(load({"model": "smollm2-135m-instruct", "cloud": ["aws"], "name": "x"} | options, {}, None))

    assert plan_command.difference(planned()) == []
    wanted = plan_command.render_plan(planned())
    record = state.Record(
        "x", "aws", "up", "smollm2-135m-instruct", "s", 8000, "~/.mistralctl", wanted["envs"]["MISTRALCTL_SERVING_ID"], 0.0, task=wanted,
        cluster="mctl-x", machine="m6i.large", region="us-east-1", resources_id=tasks.resources_id(wanted),
    )  # fmt: skip
    state.save(record)
    same = "nothing would change; --refresh asks whether it is still as it was"
    assert plan_command.difference(planned()) == [same]
    assert plan_command.difference(planned(max_model_len=4096)) == [
        "the server would be replaced on its machine", "max_model_len: 8192 -> 4096",
    ]  # fmt: skip
    assert plan_command.difference(planned(region="us-west-2")) == [
        "another machine is needed: m6i.large in us-east-1 would go, after a yes"
    ]
    assert plan_command.difference(planned(cloud=["local"]))[0] == "it is up on aws: run down first, or give another --name"
    state.save(dataclasses.replace(record, state="down"))
    assert plan_command.difference(planned()) == []


@pytest.mark.parametrize("name", ["codestral-22b-v0.1", "ministral-8b-instruct-2410"])
def test_a_row_whose_weights_need_terms_says_so_in_plan_and_models(name: str) -> None:
    sourced = load({"model": name, "cloud": ["gcp"]}, {}, None)
    got = plan.make(sourced, MODELS[name], None)
    page = MODELS[name].weights.replace("hf://", "https://huggingface.co/")
    assert [line for line in got.caveats if page in line and "no commercial use" in line]
    assert got.caveats[0] in plan_text(got).splitlines()
    assert page in next(line for line in models_text([MODELS[name]]).splitlines() if line.startswith(name))


def test_a_row_without_a_commit_says_that_it_is_not_pinned() -> None:
    got = plan.make(load({"model": "mathstral-7b-v0.1", "cloud": ["gcp"]}, {}, None), MODELS["mathstral-7b-v0.1"], None)
    assert (got.revision, len(got.caveats)) == ("", 1)
    assert "revision: main, not pinned" in plan_text(got)
    assert "not pinned" in models_text([MODELS["mathstral-7b-v0.1"]])
    uri = "hf://mistralai/Mathstral-7B-v0.1@" + "0" * 40
    pinned = plan.make(
        load({"model": "mathstral-7b-v0.1", "weights": uri, "cloud": ["gcp"]}, {}, None), MODELS["mathstral-7b-v0.1"], None
    )
    assert pinned.caveats == []
    assert [model.name for model in MODELS.values() if model.unpinned] == ["mathstral-7b-v0.1"]


def test_a_window_in_some_layers_is_shown_as_that() -> None:
    row = MODELS["ministral-8b-instruct-2410"]
    assert row.shape is not None
    shape = replace(row.shape, windows=(None, 32768, 32768, 32768) * 9, context=131072)
    got = plan.make(load({"model": row.name, "cloud": ["gcp"]}, {}, None), replace(row, shape=shape), None)
    assert "(window 32768 in 27 of 36 layers); with full attention 131,072" in plan_text(got)


def test_a_model_row_touches_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name of the family stands anywhere but in the table, and a row that is put there is planned, rendered, listed and mirrored."""
    package = Path(plan.__file__).parent
    sources = [*package.rglob("*.py"), *package.parents[1].glob("model/**/*.py"), *package.parents[1].glob("task_templates/*")]
    for name in ("mistral-nemo-instruct-2407", "mathstral-7b-v0.1", "codestral-22b-v0.1", "zephyr-7b-beta"):
        assert [path.name for path in sources if name in path.read_text("utf-8")] == ["models.py"]
    row = replace(MODELS["mistral-7b-v0.3"], name="made-up-7b", weights="hf://nobody/made-up", revision="1" * 40)
    monkeypatch.setitem(MODELS, row.name, row)
    sourced = load({"model": "made-up-7b", "cloud": ["aws"]}, {}, None)
    got = plan.make(sourced, checkpoints.resolve(sourced), None)
    assert serve.render(got, owner="x")["envs"]["MISTRALCTL_REVISION"] == "1" * 40
    assert "made-up-7b" in models_text(facts.models())
    assert mirror.checked(mirror.MirrorSpec("made-up-7b", "s3://bucket/x")).source == "hf://nobody/made-up"
