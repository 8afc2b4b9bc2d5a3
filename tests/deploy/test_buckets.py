"""What lies in a bucket is judged before anything is rented: read over the real protocols of S3, Google Cloud Storage and Azure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistral_contract import architecture
from mistralctl import adapters, package_dir
from mistralctl.commands import plan as plan_command
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.models import Shape
from mistralctl.plan import Plan
from test_adapters import adapter
from test_weights import NO_SKYPILOT, SMALL, TINY, files_of, quantized
from weights_folders import AWQ, gguf, tensors, whole

sys.path.append(str(package_dir("model").parent / "tests" / "weights"))
import faults
import places
import servers

pytestmark = pytest.mark.slow  # three servers

Served = Callable[[Path], AbstractContextManager[str]]
STORES: dict[str, tuple[str, Served, Callable[[faults.Proxy], places.Place]]] = {
    "s3": ("aws", servers.s3, places.S3Place),
    "gs": ("gcp", servers.gcs, places.GcsPlace),
    "az": ("azure", servers.azure, places.AzurePlace),
}


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, places.Place]]:
    cloud, served, place = STORES[request.param]
    with (
        served(tmp_path_factory.mktemp("store") / "data") as url,
        faults.proxy(url.removesuffix(f"/{servers.AZURE_ACCOUNT}")) as proxy,
    ):
        yield cloud, place(proxy)


BIAS = {"model.layers.0.self_attn.q_proj.bias": ("BF16", [64])}
MODELS: dict[str, tuple[dict[str, bytes], dict[str, Any], Exit, str]] = {
    "another model": (quantized(model_type="qwen2"), {}, Exit.USAGE, "config.json: model type 'qwen2'"),
    "another quantization": (
        quantized(quantization_config=AWQ), {"quantization": "gptq"}, Exit.USAGE, "gptq does not go with these weights, which are quantized with awq",
    ),
    "a tensor of another model": (SMALL | {"model.safetensors": tensors(**whole(TINY), **BIAS)}, {}, Exit.WEIGHTS, "q_proj.bias is a bias"),
    "several GGUF files": ({"m.Q2_K.gguf": b"x" * 10, "m.Q8_0.gguf": gguf()}, {}, Exit.WEIGHTS, "the source holds 2 GGUF files"),
}  # fmt: skip


@pytest.fixture
def planned(store: tuple[str, places.Place], monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Plan a deployment on the store's cloud, with a look at what it names."""
    cloud, place = store
    for name, value in {**place.env, "MISTRALCTL_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    return lambda **options: plan_command.run(load({"cloud": [cloud], **options}, {}, None, tmp_path), ask=True)


def test_a_model_that_is_not_served_is_refused(
    store: tuple[str, places.Place], planned: Callable[..., Plan], mistralctl: Run, home: Path
) -> None:
    cloud, place = store
    for files, options, code, says in MODELS.values():
        place.put(uri := place.new(), files)
        with pytest.raises(UserError, match=says) as caught:
            planned(model=uri, **options)
        assert caught.value.code is code
    place.put(uri := place.new(), SMALL)
    assert planned(model=uri).model.shape == Shape.of(architecture.read(TINY))

    place.put(uri := place.new(), quantized(model_type="qwen2"))
    done = mistralctl("up", uri, "--cloud", cloud, **place.env, **NO_SKYPILOT)
    assert (done.returncode, done.stderr.count("\n")) == (Exit.USAGE, 1)
    assert done.stderr.startswith(f"mistralctl: MODEL: {uri}/config.json: model type 'qwen2'")
    assert not list(home.glob(".mistralctl/deployments/*/up.log"))


def test_an_adapter_that_is_not_served_is_refused(
    store: tuple[str, places.Place], planned: Callable[..., Plan], mistralctl: Run, tmp_path: Path
) -> None:
    cloud, place = store
    place.put(model := place.new(), SMALL)
    own: dict[str, Any] = {"hidden": TINY["hidden_size"], "layer": 0}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"use_dora": True}, "it uses DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"hidden": 128}, "in this model, 128 and 128"),
        ({"base_model_name_or_path": "mistral-7b-v0.1"}, "it was trained on mistral-7b-v0.1"),
        ({}, ""),
    ]
    for number, (change, says) in enumerate(changes):
        place.put(uri := place.new(), files_of(adapter(tmp_path / str(number), **own | change)))
        plan = planned(model=model, lora={"a": uri})
        if not says:
            assert adapters.asked(plan, pytest.fail)["a"]
            continue
        with pytest.raises(UserError, match=says) as caught:
            adapters.asked(plan, pytest.fail)
        assert caught.value.code is Exit.WEIGHTS
        assert str(caught.value).startswith(f"--lora a: {uri}: ")

    place.put(uri := place.new(), files_of(adapter(tmp_path / "cli", use_dora=True, **own)))
    done = mistralctl("plan", model, "--refresh", "--cloud", cloud, "--lora", f"a={uri}", **place.env, **NO_SKYPILOT)
    assert (done.returncode, done.stderr.count("\n")) == (Exit.WEIGHTS, 1)
    assert done.stderr.startswith(f"mistralctl: --lora a: {uri}: it uses DoRA")
