"""What peft says of the answers that were held out: the log-probability of each of their tokens, before the training and after it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mistral_chats import Example
from mistral_weights.disk import write_whole

from mistral_tune.errors import TuneError
from mistral_tune.job import Job

MOST_ASKED = 16  # examples
IGNORED = -100


@dataclass(frozen=True)
class Asked:
    """A prompt and the answer that was held out, as token ids; `before` and `after` are log-probabilities of the answer's tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()


@dataclass(frozen=True)
class Figures:
    """`dtype` is what they were computed in. `seen`: too few chats to hold any out, so these were learnt."""

    dtype: str
    seen: bool
    asked: tuple[Asked, ...]


def path(job: Job) -> Path:
    """Return where a run keeps its figures."""
    return job.folder / "figures.json"


def read(job: Job) -> Figures:
    """Return the figures of a run; TuneError if training has not written them."""
    try:
        found = json.loads(path(job).read_text("utf-8"))
        asked = tuple(Asked(**{name: tuple(values) for name, values in one.items()}) for one in found["asked"])
        return Figures(found["dtype"], found["seen"], asked)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuneError(f"{path(job)} cannot be read ({error}); run train first") from None


def last_answer(example: Example) -> Asked:
    """Return the last answer of an example, and all before it as its prompt.

    >>> last_answer(Example((1, 2, 3, 4, 5), (-100, 2, -100, 4, 5)))
    Asked(prompt=(1, 2, 3), answer=(4, 5), before=(), after=())
    """
    start = len(example.labels)
    while start and example.labels[start - 1] != IGNORED:
        start -= 1
    return Asked(example.input_ids[:start], example.input_ids[start:])


def compute(job: Job) -> None:
    """Write the figures of a run whose result is there: of the base model, and of it with the result, read back from the files."""
    from mistral_tune import model
    from mistral_tune.data import learnt

    wanted = job.wanted
    folder = model.base_folder(job)
    found = learnt(job, folder)
    asked = [last_answer(example) for example in found.held_out[:MOST_ASKED]]
    dtype, device = model.DTYPES[wanted.dtype], "cuda:0" if wanted.device == "cuda" else "cpu"
    base = model.load(folder, wanted.sliding_window, dtype, device).eval()
    before = list(_log_probabilities(base, asked))
    if wanted.method == "full":
        del base
        gc.collect()
        tuned = model.load(job.result, wanted.sliding_window, dtype, device).eval()
    else:
        model.served(job.result, folder)
        tuned = model.with_adapter(base, job.result).eval()
    after = list(_log_probabilities(tuned, asked))
    rows = tuple(Asked(one.prompt, one.answer, b, a) for one, b, a in zip(asked, before, after, strict=True))
    write_whole(path(job), (json.dumps(asdict(Figures(wanted.dtype, found.seen, rows)), indent=1) + "\n").encode())


def _log_probabilities(model: Any, asked: Sequence[Asked]) -> Iterator[tuple[float, ...]]:
    import torch

    for one in asked:
        ids = torch.tensor([[*one.prompt, *one.answer]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(one.answer) + 1).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(one.answer, device=logits.device)[:, None])[:, 0]
        yield tuple(min(0.0, value) for value in chosen.tolist())
