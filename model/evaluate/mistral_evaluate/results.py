"""Values of tasks, each with n, its standard error, a 95 % interval and the scores of its items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_evaluate.suites import TASKS

Z95 = 1.959963984540054  # of the normal distribution, both sides


@dataclass(frozen=True)
class Value:
    """A metric of a task. `stderr`, `low` and `high` are None where the metric has none; `items` are (hash of the item, its score)."""

    task: str
    area: str
    metric: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    shots: int
    version: str
    higher_is_better: bool
    source: str
    items: tuple[tuple[str, float], ...]


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n items (Wilson's, which holds near 0 and 1, too).

    >>> [round(bound, 4) for bound in wilson(0.5, 100)]
    [0.4038, 0.5962]
    """
    wide = 1 + Z95**2 / n
    middle = (share + Z95**2 / (2 * n)) / wide
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / wide
    return middle - half, middle + half


def values(found: Mapping[str, Any], names: Sequence[str]) -> list[Value]:
    """Return the values of what lm-eval found, task by task."""
    listed = []
    for name in names:
        for key, value in found["results"][name].items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                listed.append(_value(found, name, metric, filtered))
    return listed


def _value(found: Mapping[str, Any], name: str, metric: str, filtered: str) -> Value:
    task = TASKS[name]
    result = found["results"][name]
    samples = [one for one in found["samples"][name] if one["filter"] == filtered]
    items = tuple((str(one["doc_hash"])[:16], float(one[metric])) for one in samples if isinstance(one.get(metric), int | float))
    value, stderr = float(result[f"{metric},{filtered}"]), result.get(f"{metric}_stderr,{filtered}")
    given = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
    if items and {score for _, score in items} <= {0.0, 1.0}:
        interval: tuple[float | None, float | None] = wilson(value, len(items))
    else:
        interval = (None, None) if given is None else (value - Z95 * given, value + Z95 * given)
    return Value(
        name, task.area, metric if filtered == "none" else f"{metric} ({filtered})", value, given, *interval, len(samples),
        int(found["n-shot"][name]), str(found["versions"][name]), bool(found["higher_is_better"][name][metric]),
        task.source, items,
    )  # fmt: skip
