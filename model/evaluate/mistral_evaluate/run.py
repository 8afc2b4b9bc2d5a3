"""An evaluation: what it takes is said first, then what has no answer yet is asked, then values are made of the answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mistral_evaluate import journal, results, tokens
from mistral_evaluate.endpoint import Endpoint
from mistral_evaluate.errors import EvaluateError
from mistral_evaluate.job import Job
from mistral_evaluate.model import Ask, Asker, Served
from mistral_evaluate.suites import TASKS
from mistral_evaluate.tokens import Tokens

Tell = Callable[[dict[str, Any]], None]
KINDS = ("choices", "prompt", "generate")
PROBES = ("The quick brown fox", " 12 - 5 = 7\n\nQ: Ünïcode, 東京?")
TELL_SECONDS = 1.0  # between two reports of progress


def run(job: Job, tell: Tell) -> None:
    """Evaluate, and tell of it in events: `plan`, `progress`, `result`."""
    names = tuple(dict.fromkeys(job.tasks))
    if unknown := [name for name in names if name not in TASKS]:
        raise EvaluateError(f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    encoder = tokens.opened(job.tokenizer, job.mode)
    endpoint = Endpoint(job.address, job.concurrency)
    with journal.opened(job.journal, job.identity) as answers:
        progress = Progress(tell)
        asker = Asker(endpoint, answers, progress.answered)
        asks: list[Ask] = []
        harness(Served(asker, encoder, job.context, asks), configs(names), job.limit, planning=True)
        check_tokens(endpoint, encoder)
        todo = asker.open(asks)
        progress.begin(todo, len({ask.key for ask in asks}))
        progress.plan()
        if todo:
            _sample(asker, todo, job.concurrency, progress)
            progress.plan()
        for kind in KINDS:
            asker.ask([ask for ask in todo if ask.kind == kind])
        found = harness(Served(asker, encoder, job.context), configs(names), job.limit)
    tell({
        "event": "result", "values": [asdict(value) for value in results.values(found, names)], "harness": f"lm-eval {found['lm_eval_version']}",
        "requests": {"all": progress.all, "asked": progress.done, "sent": endpoint.sent, "refused": endpoint.refused},
    })  # fmt: skip


def configs(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return tasks as lm-eval loads them."""
    return [TASKS[name].config() for name in names]


def harness(model: Any, tasks: list[dict[str, Any]], limit: int | None, *, planning: bool = False) -> Any:
    """Return what lm-eval finds with a model; the tasks are loaded anew, with the same seeds each time."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_defaults=False)  # its own index takes ten seconds
    return simple_evaluate(
        model=model, tasks=tasks, task_manager=own, limit=limit, bootstrap_iters=0 if planning else 1000, log_samples=not planning
    )


def check_tokens(endpoint: Endpoint, encoder: Tokens) -> None:
    """EvaluateError unless the server makes the same tokens of a text as the tokenizer here, BOS and all."""
    bodies = [{"prompt": text, "max_tokens": 1, "temperature": 0, "return_token_ids": True} for text in PROBES]
    served: dict[int, list[int]] = {}

    def heard(number: int, answer: Any) -> None:
        try:
            served[number] = list(answer["choices"][0]["prompt_token_ids"])
        except (LookupError, TypeError):
            raise EvaluateError(
                "the server does not say which tokens it makes of a prompt; bring it up with --engine vllm"
            ) from None

    endpoint.ask(bodies, heard)
    for number, text in enumerate(PROBES):
        if served[number] != encoder.encode(text):
            raise EvaluateError(
                f"the server makes {served[number]} of {text!r}, and the tokenizer here {encoder.encode(text)}; they are not of one model"
            )


def _sample(asker: Asker, todo: Sequence[Ask], concurrency: int, progress: Progress) -> None:
    """Ask a few of each kind, spread over all lengths, to know how long the rest takes."""
    for kind in KINDS:
        every = [ask for ask in todo if ask.kind == kind]
        few = every[:: max(1, len(every) // concurrency)][:concurrency]
        began = time.monotonic()
        asker.ask(few)
        progress.measured(kind, few, time.monotonic() - began)


def _cost(ask: Ask) -> int:
    """Return what a request costs, in tokens that are computed."""
    return len(ask.body["prompt"]) + (ask.body["max_tokens"] if ask.kind == "generate" else 0)


@dataclass
class _Pace:
    """How fast requests of a kind are answered: their cost that is left, and the cost and time of those that were measured."""

    left: int = 0
    cost: int = 0
    seconds: float = 0.0

    @property
    def left_seconds(self) -> float:
        return self.left * self.seconds / self.cost if self.cost else 0.0


class Progress:
    """How far an evaluation is: `all` requests, `done` of them answered in this run."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.all = self.open = self.done = 0
        self._kinds: Counter[str] = Counter()
        self._paces = {kind: _Pace() for kind in KINDS}
        self._told = self._previous = 0.0

    def begin(self, todo: Sequence[Ask], of: int) -> None:
        """Take what is to be asked, of so many requests in all."""
        self.all, self.open = of, len(todo)
        for ask in todo:
            self._kinds[ask.kind] += 1
            self._paces[ask.kind].left += _cost(ask)

    def measured(self, kind: str, asks: Sequence[Ask], seconds: float) -> None:
        """Take how long a few requests took."""
        pace = self._paces[kind]
        pace.cost, pace.seconds = sum(_cost(ask) for ask in asks), seconds
        self._previous = time.monotonic()

    def plan(self) -> None:
        """Tell what is going to be asked, before it is; without the time until a few of it were."""
        self._tell({
            "event": "plan", "requests": self.all, "open": self.open, "asked": self.done, "kinds": dict(self._kinds),
            "left_seconds": self._left(),
        })  # fmt: skip

    def answered(self, ask: Ask) -> None:
        """Take one answer, and tell of it now and then."""
        self.done += 1
        pace, now = self._paces[ask.kind], time.monotonic()
        pace.left -= _cost(ask)
        if pace.cost:  # past the sample: what was seen since counts, too
            pace.cost, pace.seconds = pace.cost + _cost(ask), pace.seconds + now - self._previous
        self._previous = now
        if now - self._told >= TELL_SECONDS or self.done == self.open:
            self._told = now
            self._tell({"event": "progress", "done": self.done, "of": self.open, "left_seconds": self._left()})

    def _left(self) -> float | None:
        """Return the seconds that are left; None before anything was measured."""
        if not any(pace.cost for pace in self._paces.values()):
            return 0.0 if not self.open else None
        return round(sum(pace.left_seconds for pace in self._paces.values()), 1)
