"""Figures that a first engine made: kept on the laptop, sent to later nodes, checked whenever they are read."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
from mistral_contract import figures as judged
from mistral_contract import files
from mistralctl import figures
from mistralctl.state import Record

KEY = judged.key([("model.safetensors", "a" * 64), ("config.json", "b" * 64)])
MADE = {
    "schema": 1, "prompt_token_ids": [5, 6], "forced_token_ids": [7, 8], "logprobs": [-0.5, -0.25], "dtype": "bfloat16",
    "source": "made on NVIDIA L4 by vLLM 0.32.0, bfloat16, 2026-11-28", "weights": KEY, "model": "mistral-7b-instruct-v0.1",
}  # fmt: skip
CANARY = {"state": "made here", "max_difference": None, "tolerance": None, "against": MADE["source"], "weights": KEY}


@pytest.fixture
def record(home: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A deployment of this machine whose node has kept figures."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(home))
    node_dir = home / "node"
    path = node_dir / files.CANARIES.name / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(MADE))
    return Record("mine", "local", "up", "mistral-7b-instruct-v0.1", "m", 8000, str(node_dir), "1", 0.0)


def unsaid(text: str) -> None:
    raise AssertionError(text)


def copy_of(home: Path) -> Path:
    return home / files.CANARIES.name / f"{KEY}.json"


def test_the_first_figures_are_kept_and_sent_for_their_model_only(record: Record, home: Path) -> None:
    assert figures.known(record.model, unsaid) == []
    figures.keep(record, CANARY)
    assert stat.S_IMODE(copy_of(home).stat().st_mode) == 0o600
    assert figures.known(record.model, unsaid) == [MADE]
    assert figures.known("another", unsaid) == []


def test_the_first_figures_stay_the_first(record: Record, home: Path) -> None:
    figures.keep(record, CANARY)
    (Path(record.node_dir) / files.CANARIES.name / f"{KEY}.json").write_text(json.dumps(MADE | {"logprobs": [-9.0, -9.0]}))
    figures.keep(record, CANARY | {"state": "verified"})
    assert figures.known(record.model, unsaid) == [MADE]


@pytest.mark.parametrize(
    "changed", [{"weights": "c" * 64}, {"logprobs": [-0.5, math.nan]}, {"logprobs": [-0.5]}, {"source": "\x1b[2J"}, {"source": 7}]
)
def test_a_nodes_figures_that_are_none_are_not_kept(record: Record, home: Path, changed: dict[str, Any]) -> None:
    (Path(record.node_dir) / files.CANARIES.name / f"{KEY}.json").write_text(json.dumps(MADE | changed))
    figures.keep(record, CANARY)
    assert not copy_of(home).exists()


@pytest.mark.parametrize("canary", [None, {}, {"weights": None}, {"weights": "../../x"}, {"weights": 7}, {"weights": "c" * 64}])
def test_what_names_no_figures_keeps_none(record: Record, home: Path, canary: dict[str, Any] | None) -> None:
    figures.keep(record, canary)
    assert not (home / files.CANARIES.name).exists()


@pytest.mark.parametrize(
    "text", ["", "[]", json.dumps(MADE | {"logprobs": [-0.5, math.nan]}), json.dumps(MADE | {"weights": "c" * 64})]
)
def test_a_damaged_copy_is_named_and_set_aside(record: Record, home: Path, text: str) -> None:
    """Also one of another model, which nobody can tell: it stops no `up`, and what was in it is kept."""
    figures.keep(record, CANARY)
    copy_of(home).write_text(text)
    said: list[str] = []
    assert figures.known(record.model, said.append) == []
    assert len(said) == 1
    assert said[0].startswith(f"the canary's figures {copy_of(home)} are damaged (")
    assert copy_of(home).with_name(f"{KEY}.json.damaged").read_text() == text
    figures.keep(record, CANARY)
    assert figures.known(record.model, said.append) == [MADE]
    assert len(said) == 1


def test_a_copy_that_cannot_be_kept_fails_no_up(record: Record, home: Path) -> None:
    (home / files.CANARIES.name).touch()
    figures.keep(record, CANARY)


def test_a_key_is_of_weights_configuration_and_quantization_alone() -> None:
    files = [("model.safetensors", "a" * 64), ("config.json", "b" * 64)]
    assert judged.key([*files, ("README.md", "c" * 64), (judged.FILE, "d" * 64)]) == KEY
    others = [
        judged.key([("model.safetensors", "c" * 64), files[1]]), judged.key([files[0], ("config.json", "c" * 64)]),
        judged.key(files[:1]), judged.key(files, "fp8"),
    ]  # fmt: skip
    assert len({KEY, *others}) == 5
    assert all(judged.is_key(one) for one in others)
