"""What is learnt of a file, and what of it is held out."""

from __future__ import annotations

import json
from pathlib import Path

from mistral_tune.data import learnt
from runs import Run


def test_chats_are_held_out_alike_from_lines_and_from_an_array_in_one_line(node: Path) -> None:
    run = Run(node, "held-out", held_out=False)
    lines = learnt(run.job(), node / "weights" / "tiny")
    rows = [json.loads(line) for line in run.chats.read_text("utf-8").splitlines()]
    run.chats.write_text(json.dumps(rows))
    array = learnt(run.job(), node / "weights" / "tiny")
    assert (len(array.rows), len(array.held_out)) == (19, 1)
    assert array == lines
