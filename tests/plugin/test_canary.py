"""The canary against a real engine: right ones pass, each way to be wrong is caught, in float32 and in bfloat16."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from engines import engine, run
from vllm_mistral import canary, reference
from vllm_mistral.client import Client
from vllm_mistral.contract import Code, LaunchError

SHAPE = {"sliding_window": 128, "max_position_embeddings": 4096, "num_hidden_layers": 3}
LONGEST = 3000


@contextmanager
def over_http(llm: Any) -> Iterator[str]:
    """The two requests that the canary makes, answered by an engine in this process in the form of vLLM's server."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = {name: body[name] for name in ("max_tokens", "prompt_logprobs", "logprobs") if name in body}
            ids = body["prompt"] if isinstance(body["prompt"], list) else [5, 6, 7]
            [one] = run(llm, [ids], **asked)
            choice: dict[str, Any] = {}
            if one.prompt_logprobs:
                choice["prompt_logprobs"] = [
                    step and {str(token): {"logprob": entry.logprob} for token, entry in step.items()}
                    for step in one.prompt_logprobs
                ]
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


def verdict(figures: Path, served: Path, dtype: str, **options: Any) -> canary.Verdict:
    """What the canary of one folder says of an engine with the weights of another."""
    given = {"max_model_len": LONGEST, "max_num_batched_tokens": 512, "dtype": dtype} | options
    with engine(served, **given) as llm, over_http(llm) as url:
        client = Client(url, "key")
        canary.answers(client, "tiny")
        return canary.compare(client, "tiny", figures, dtype, given["max_model_len"])


DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_a_right_engine_is_verified(weights: Path, dtype: str) -> None:
    found = verdict(weights, weights, dtype)
    assert found.state == "verified"
    assert found.max_difference is not None
    assert found.max_difference < canary.TOLERANCE[dtype] / 2
    assert found.tolerance == canary.TOLERANCE[dtype]


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
    (tmp_path / canary.FILE).write_text(text)
    with pytest.raises(LaunchError, match="is damaged") as caught:
        canary.stored_figures(tmp_path)
    assert caught.value.code is Code.CANARY


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_of_the_engine_never_passes(tmp_path: Path, place: int) -> None:
    (tmp_path / canary.FILE).write_text(text_of())
    entries: list[Any] = [None, {"1": {"logprob": -0.1}}, {"2": {"logprob": -0.2}}]
    entries[1 + place][str(1 + place)]["logprob"] = math.nan

    class Answers(Client):
        def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = 0.0) -> bytes:
            return json.dumps({"choices": [{"prompt_logprobs": entries}]}).encode()

    with pytest.raises(LaunchError, match="not finite") as caught:
        canary.compare(Answers("http://127.0.0.1:1", "key"), "tiny", tmp_path, "float32", 100)
    assert caught.value.code is Code.CANARY


def test_weights_with_a_nan_get_no_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = write(tmp_path / "broken", **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert reference.main([str(folder), "--canary", "--canary-tokens", "200"]) == 2
    assert "the log-probabilities are not finite; the weights are damaged" in capfd.readouterr().err
    assert not (folder / canary.FILE).exists()


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
    figures = json.loads(shipped.read_text())
    served, pulled = tmp_path / "set.hf", tmp_path / "set"
    for folder in (served, pulled):
        folder.mkdir()
    assert canary.stored_figures(served) is None
    manifest = {"files": [{"name": "a.gguf", "sha256": figures["weights_sha256"]}]}
    (pulled / canary.MANIFEST).write_text(json.dumps(manifest))
    assert canary.stored_figures(served) == figures
    assert len(figures["prompt_token_ids"]) == 640  # enough to show what is wrong (test_reference_command.py), on a CPU 1 s
    manifest["files"][0]["sha256"] = "0" * 64
    (pulled / canary.MANIFEST).write_text(json.dumps(manifest))
    assert canary.stored_figures(served) is None
