"""`mirror --canary`: the reference's figures become a file of the set, checked like the others, and a start is verified by them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from checkpoints import consolidated, write
from mistral_contract import figures
from mistral_node import canary
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.mirror import Mirror, mirror
from mistral_weights.pull import Pull, pull
from mistral_weights.verify import Verify, verify

SHAPE = {"sliding_window": 128, "max_position_embeddings": 512}


@pytest.mark.parametrize("form", ["hugging face", "consolidated"])
def test_a_mirror_with_figures(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_marked")
    source = write(tmp_path / "source", **SHAPE)
    if form == "consolidated":
        source = consolidated(source, tmp_path / "consolidated")
    done = mirror(Mirror(f"file://{source}", f"file://{tmp_path}/mirror", canary=Path(sys.executable)))
    assert figures.FILE in done.files
    assert done.bytes == sum((tmp_path / "mirror" / name).stat().st_size for name in done.files)
    assert not (source / figures.FILE).exists()
    made = json.loads((tmp_path / "mirror" / figures.FILE).read_text())
    assert (len(made["prompt_token_ids"]), made["sliding_window"]) == (504, 128)
    pulled = pull(Pull(f"file://{tmp_path}/mirror", tmp_path / "node"))
    assert pulled.files == done.files
    assert verify(Verify(str(tmp_path / "node"))).damages == ()
    assert canary.stored_figures(tmp_path / "node") == made
    again = mirror(
        Mirror(f"file://{source}", f"file://{tmp_path}/mirror", canary=Path("/nowhere"))
    )  # they are there: not made again
    assert (again.files, again.bytes) == (done.files, done.bytes)
    (tmp_path / "node" / figures.FILE).write_text(json.dumps(made | {"logprobs": [-9.0] * 8}))
    assert [damage.name for damage in verify(Verify(str(tmp_path / "node"))).damages] == [figures.FILE]


def test_figures_that_cannot_be_computed_say_why(tmp_path: Path) -> None:
    source = write(tmp_path / "source", sliding_window=128, max_position_embeddings=60)
    with pytest.raises(
        WeightsError, match=r"figures could not be computed: reference: .*too small for a canary; leave --canary out"
    ) as one:
        mirror(Mirror(f"file://{source}", f"file://{tmp_path}/mirror", canary=Path(sys.executable)))
    assert one.value.kind is Kind.REFUSED
    with pytest.raises(
        WeightsError, match=r"/nowhere cannot be run .No such file or directory.; it should be a Python with torch"
    ):
        mirror(Mirror(f"file://{source}", f"file://{tmp_path}/mirror", canary=Path("/nowhere")))
