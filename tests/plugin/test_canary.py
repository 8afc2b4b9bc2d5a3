"""The canary against a real engine: right ones pass, each way to be wrong is caught, in float32 and in bfloat16."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from engines import engine, run
from mistral_contract import figures, files
from mistral_contract.figures import FILE, TOLERANCE
from mistral_node import canary, contract
from mistral_node.client import Client
from mistral_node.contract import Code, LaunchError
from nodes import variables
from vllm_mistral import reference

SHAPE = {"sliding_window": 128, "max_position_embeddings": 4096, "num_hidden_layers": 3}
LONGEST = 3000


@contextmanager
def over_http(llm: Any, adapters: Mapping[str, Any] | None = None) -> Iterator[str]:
    """The two requests that the canary makes, answered by an engine in this process in the form of vLLM's server.

    `adapters` are LoRA requests by the model's name in the API.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            names = ("max_tokens", "prompt_logprobs", "logprobs", "ignore_eos")
            asked = {name: body[name] for name in names if name in body}
            ids = body["prompt"] if isinstance(body["prompt"], list) else [5, 6, 7]
            [one] = run(llm, [ids], lora_request=(adapters or {}).get(body["model"]), **asked)
            choice: dict[str, Any] = {}
            if one.prompt_logprobs:
                choice["prompt_logprobs"] = [
                    step and {str(token): {"logprob": entry.logprob} for token, entry in step.items()}
                    for step in one.prompt_logprobs
                ]
            if body.get("return_token_ids"):
                choice["token_ids"] = list(one.outputs[0].token_ids)
            if one.outputs[0].logprobs:
                choice["logprobs"] = {"token_logprobs": [next(iter(step.values())).logprob for step in one.outputs[0].logprobs]}
            answer = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(HTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with figures by the reference, computed in float32."""
    folder = write(tmp_path_factory.mktemp("canary") / "weights", **SHAPE)
    assert reference.main([str(folder), "--canary"]) == 0
    return folder


def verdict(folder: Path, served: Path, dtype: str, **options: Any) -> canary.Verdict:
    """What the canary of one folder says of an engine with the weights of another."""
    given = {"max_model_len": LONGEST, "max_num_batched_tokens": 512, "dtype": dtype} | options
    with engine(served, **given) as llm, over_http(llm) as url:
        client = Client(url, "key")
        canary.answers(client, "tiny")
        return canary.compare(client, "tiny", canary.stored_figures(folder), dtype, given["max_model_len"])


DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_a_right_engine_is_verified(weights: Path, dtype: str) -> None:
    found = verdict(weights, weights, dtype)
    assert found.state == "verified"
    assert found.max_difference is not None
    assert found.max_difference < TOLERANCE[dtype] / 2
    assert found.tolerance == TOLERANCE[dtype]


WRONG = {
    "window off": {"hf_overrides": {"sliding_window": None}},
    "window doubled": {"hf_overrides": {"sliding_window": 256}},
    "window halved": {"hf_overrides": {"sliding_window": 64}},
    "rope theta of another version": {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_engine_is_caught(weights: Path, how: str, dtype: str) -> None:
    with pytest.raises(LaunchError, match="does not compute what the weights say") as caught:
        verdict(weights, weights, dtype, **WRONG[how])
    assert caught.value.code is Code.CANARY


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_weights_are_caught(weights: Path, tmp_path: Path, dtype: str) -> None:
    other = write(tmp_path / "other", seed=1, **SHAPE)
    with pytest.raises(LaunchError, match="does not compute what the weights say"):
        verdict(weights, other, dtype)


def test_without_figures_or_room_for_them_nothing_is_verified(weights: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "bare", **SHAPE)
    assert verdict(folder, folder, "float32").state == "not verified"
    assert verdict(weights, weights, "float32", max_model_len=1000).state == "not verified"


def text_of(**changed: Any) -> str:
    return json.dumps({"prompt_token_ids": [1], "forced_token_ids": [1, 2], "logprobs": [-0.1, -0.2]} | changed)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", text_of(logprobs=[-0.1]), text_of(prompt_token_ids=[]), text_of(forced_token_ids=[], logprobs=[]),
        text_of(logprobs=[-0.1, math.nan]), text_of(logprobs=[-0.1, -math.inf]), text_of(logprobs=[-0.1, 0.5]),
        text_of(logprobs=[-0.1, None]), text_of(logprobs=[-0.1, True]), text_of(logprobs=[-0.1, "-0.2"]),
        text_of(forced_token_ids=[1, True]), text_of(prompt_token_ids=[-1]),
    ],
)  # fmt: skip
def test_damaged_figures_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(LaunchError, match="is damaged") as caught:
        canary.stored_figures(tmp_path)
    assert caught.value.code is Code.CANARY


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_of_the_engine_never_passes(tmp_path: Path, place: int) -> None:
    (tmp_path / FILE).write_text(text_of())
    entries: list[Any] = [None, {"1": {"logprob": -0.1}}, {"2": {"logprob": -0.2}}]
    entries[1 + place][str(1 + place)]["logprob"] = math.nan

    class Answers(Client):
        def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = 0.0) -> bytes:
            return json.dumps({"choices": [{"prompt_logprobs": entries}]}).encode()

    with pytest.raises(LaunchError, match="not finite") as caught:
        canary.compare(Answers("http://127.0.0.1:1", "key"), "tiny", canary.stored_figures(tmp_path), "float32", 100)
    assert caught.value.code is Code.CANARY


def test_weights_with_a_nan_get_no_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = write(tmp_path / "broken", **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert reference.main([str(folder), "--canary", "--canary-tokens", "200"]) == 2
    assert "the log-probabilities are not finite; the weights are damaged" in capfd.readouterr().err
    assert not (folder / FILE).exists()


def test_weights_with_a_nan_are_caught(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = write(tmp_path / "broken", **SHAPE)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LaunchError) as caught:
        verdict(broken, broken, "float32")
    assert caught.value.code is Code.CANARY


def test_figures_of_this_package_are_taken_for_the_very_weights_that_they_are_of(tmp_path: Path) -> None:
    [shipped] = canary.SHIPPED.glob("smollm2*.json")
    expected = json.loads(shipped.read_text())
    served, pulled = tmp_path / "set.hf2", tmp_path / "set"
    for folder in (served, pulled):
        folder.mkdir()
    assert canary.stored_figures(served) is None
    manifest = {"files": [{"name": "a.gguf", "sha256": expected["weights_sha256"]}]}
    (pulled / files.MANIFEST.name).write_text(json.dumps(manifest))
    assert canary.stored_figures(served) == expected
    assert len(expected["prompt_token_ids"]) == 640  # enough to show what is wrong (test_reference_command.py), on a CPU 1 s
    manifest["files"][0]["sha256"] = "0" * 64
    (pulled / files.MANIFEST.name).write_text(json.dumps(manifest))
    assert canary.stored_figures(served) is None


# --- figures that a first engine makes -------------------------------------------------------------------------------


def set_of(folder: Path, name: str, seed: int = 0) -> Path:
    """Weights as mistral_weights leaves them, as far as the canary reads its manifest."""
    weights = write(folder / "weights" / name, seed=seed, **SHAPE)
    hashed = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(weights.iterdir())]
    manifest = {"files": [{"name": file, "sha256": sha256} for file, sha256 in hashed]}
    (weights / files.MANIFEST.name).write_text(json.dumps(manifest))
    return weights


def start(
    served: Path, dtype: str = "float32", sent: list[dict[str, Any]] | None = None, quantization: str = "", **options: Any
) -> canary.Verdict:
    """What a start of the engine on this node, the folder two above the weights, says."""
    node_dir = served.parents[1]
    given = {"max_model_len": LONGEST, "max_num_batched_tokens": 512, "dtype": dtype} | options
    changed = {"QUANTIZATION": quantization, "MAX_MODEL_LEN": str(given["max_model_len"]), "DTYPE": dtype}
    wanted = contract.read(variables(node_dir, **changed))
    facts = {"sliding_window": 128, "vocabulary": 512, "dtype": dtype, "device": "a CPU", "vllm": "0.32.0"}
    with engine(served, **given) as llm, over_http(llm) as url:
        return canary.check(Client(url, "key"), wanted, served, facts, sent or [])


def kept(node_dir: Path) -> list[Path]:
    return sorted((node_dir / "canaries").glob("*"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that an engine served once, in bfloat16."""
    served = set_of(tmp_path_factory.mktemp("first"), "tiny")
    found = start(served, "bfloat16")
    [path] = kept(served.parents[1])
    assert (found.state, found.max_difference, found.weights) == ("made here", None, path.stem)
    assert re.fullmatch(r"made on a CPU by vLLM 0.32.0, bfloat16, \d{4}-\d\d-\d\d", found.against)
    return served


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_engine_is_compared_with_the_first(first: Path, dtype: str) -> None:
    found = start(first, dtype)
    made = json.loads(kept(first.parents[1])[0].read_text())
    assert (found.state, found.against, found.weights) == ("verified", made["source"], made["weights"])
    assert (len(made["prompt_token_ids"]), made["dtype"], made["model"]) == (320, "bfloat16", "tiny")
    assert found.tolerance == TOLERANCE["bfloat16"] + TOLERANCE[dtype]
    assert found.max_difference is not None
    assert found.max_difference < found.tolerance / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_second_engine_is_caught(first: Path, how: str, dtype: str) -> None:
    with pytest.raises(
        LaunchError, match=r"does not compute what the first engine with these weights did.*figures: made on a CPU by vLLM"
    ) as caught:
        start(first, dtype, **WRONG[how])
    assert caught.value.code is Code.CANARY


def test_figures_belong_to_the_very_weights(first: Path, tmp_path: Path) -> None:
    mine = json.loads(kept(first.parents[1])[0].read_text())
    other = set_of(tmp_path, "tiny", seed=1)
    assert start(other, sent=[mine]).state == "made here"  # what the laptop sent is of other weights
    [path] = kept(tmp_path)
    assert path.stem != mine["weights"]
    path.write_text(json.dumps(mine))  # under the name of others
    with pytest.raises(LaunchError, match=r"are damaged .they are of other weights."):
        start(other)


def test_what_the_laptop_knows_goes_before_what_the_node_kept(first: Path) -> None:
    mine = json.loads(kept(first.parents[1])[0].read_text())
    assert start(first, sent=[mine | {"source": "made on another machine"}]).against == "made on another machine"
    with pytest.raises(LaunchError, match="a log-probability differs by"):
        start(first, sent=[mine | {"logprobs": [value - 9 for value in mine["logprobs"]]}])


def test_figures_kept_with_a_nan_never_pass(tmp_path: Path) -> None:
    served = set_of(tmp_path, "tiny")
    key = figures.key(canary._manifest(served))
    path = tmp_path / files.CANARIES.name / f"{key}.json"
    path.parent.mkdir()
    path.write_text(text_of(logprobs=[-0.1, math.nan], weights=key))
    for sent in ([], [json.loads(path.read_text())]):
        with pytest.raises(LaunchError, match=r"are damaged .a log-probability is not a finite number"):
            canary.known_figures(tmp_path, key, sent)


def test_an_engine_that_contradicts_itself_makes_no_figures(first: Path) -> None:
    class Contradicts(Client):
        def ask(self, path: str, body: dict[str, Any] | None = None, *, seconds: float) -> bytes:
            answer = json.loads(super().ask(path, body, seconds=seconds))
            for step in answer["choices"][0].get("prompt_logprobs") or []:
                for entry in (step or {}).values():
                    entry["logprob"] -= 3
            return json.dumps(answer).encode()

    wanted = contract.read(variables(first.parents[1]))
    facts = {"sliding_window": 128, "vocabulary": 512, "dtype": "float32", "device": "a CPU", "vllm": "0.32.0"}
    with engine(first, max_model_len=LONGEST, dtype="float32") as llm, over_http(llm) as url:
        with pytest.raises(LaunchError, match="the engine contradicts itself") as caught:
            canary.make(Contradicts(url, "key"), wanted, facts, "0" * 64)
        assert caught.value.code is Code.CANARY
        assert canary.make(Client(url, "key"), wanted, facts | {"vocabulary": 40}, "0" * 64) is None


def test_the_references_figures_go_before_and_not_for_quantized_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = set_of(tmp_path, "tiny")
    assert reference.main([str(served), "--canary", "--canary-tokens", "200"]) == 0
    found = start(served)
    assert (found.state, found.weights) == ("verified", None)
    assert found.against.startswith("vllm_mistral.reference, torch ")
    assert not kept(tmp_path)
    assert start(served, quantization="fp8").state == "made here"
    capfd.readouterr()
