"""The model as lm-eval sees it: a served one, of which nothing is asked twice and nothing is cut off."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from mistral_evaluate.endpoint import Body, Endpoint
from mistral_evaluate.errors import EvaluateError
from mistral_evaluate.journal import Journal
from mistral_evaluate.tokens import Tokens

CHOICES = 64  # tokens that are scored in one request; the guard and vLLM take 128
STOPS = 4  # texts that end an answer which the guard takes; the others are looked for here
ANSWER_TOKENS = 256  # of a generation whose task names no number, as in lm-eval
NOT_SENT = ("until", "do_sample", "max_gen_toks", "max_tokens", "temperature")

Pair = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class Ask:
    """A request: its body, how the answer is read, what it is called, and what stands for it in the journal."""

    kind: str
    body: Body
    read: Callable[[Any], Any]
    key: str


class Asker:
    """Asks what the journal does not have."""

    def __init__(self, endpoint: Endpoint, journal: Journal, answered: Callable[[Ask], None]) -> None:
        self.endpoint, self.journal, self._answered = endpoint, journal, answered

    def open(self, asks: Sequence[Ask]) -> list[Ask]:
        """Return those that have no answer yet, each once, the longest first."""
        found = {ask.key: ask for ask in asks if not self.journal.has(ask.key)}
        return sorted(found.values(), key=lambda ask: (-len(ask.body["prompt"]), ask.body["prompt"]))

    def ask(self, asks: Sequence[Ask]) -> None:
        """Ask all that have no answer yet."""
        todo = self.open(asks)

        def heard(number: int, answer: Any) -> None:
            ask = todo[number]
            try:
                found = ask.read(answer)
            except (LookupError, TypeError, ValueError) as error:
                raise EvaluateError(f"the server's answer has not what was asked for ({error!r}); see mistralctl logs") from None
            self.journal.keep(ask.key, found)
            self._answered(ask)

        if todo:
            self.endpoint.ask([ask.body for ask in todo], heard)


class Served(TemplateLM):  # type: ignore[misc]
    """A served model. With `planned` nothing is asked: requests are only noted there, and every answer is empty."""

    def __init__(self, asker: Asker, tokens: Tokens, context: int, planned: list[Ask] | None = None) -> None:
        super().__init__()
        self._asker, self._tokens, self._context, self._planned = asker, tokens, context, planned

    @property
    def eot_token_id(self) -> int:
        """Return the token before a text that has no context."""
        if self._tokens.prefix is None:
            raise EvaluateError(
                "the model names neither BOS nor EOS, so texts without a context cannot be scored; choose other tasks"
            )
        return self._tokens.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; with BOS, where the model wants it, unless told otherwise."""
        return self._tokens.encode(string, special=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of each continuation."""
        pairs = [self._pair(*request.args) for request in requests]
        for request, (_, context, continuation) in zip(requests, pairs, strict=True):
            self._must_fit(len(context) + len(continuation), 0, request)
        return self._loglikelihood_tokens(pairs)

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            return ((context, continuation), *self._encode_pair(context, continuation))
        return ((context, continuation), [self.eot_token_id], self.tok_encode(continuation, add_special_tokens=False))

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Score pairs of token ids. Continuations of one token behind one context are one request; each longer one is its own."""
        single: dict[tuple[int, ...], list[int]] = {}
        for _pair, context, continuation in requests:
            if len(continuation) == 1:
                tokens = single.setdefault(tuple(context), [])
                tokens += [] if continuation[0] in tokens else continuation
        scored: dict[tuple[tuple[int, ...], int], Ask] = {}
        for behind, tokens in single.items():
            for start in range(0, len(tokens), CHOICES):
                choices = self._choices(list(behind), sorted(tokens[start : start + CHOICES]))
                scored |= {(behind, token): choices for token in tokens[start : start + CHOICES]}
        asks = [
            None if not continuation
            else scored[(tuple(context), continuation[0])] if len(continuation) == 1
            else self._prompt(context, continuation)
            for _pair, context, continuation in requests
        ]  # fmt: skip
        answers = self._answers([ask for ask in asks if ask is not None])
        found = []
        for ask, (_pair, _context, continuation) in zip(asks, requests, strict=True):
            if ask is None or answers is None:
                found.append((0.0, True))
            elif ask.kind == "choices":
                answer = answers[ask.key]
                found.append((answer["logprobs"][str(continuation[0])], answer["greedy"] == continuation[0]))
            else:
                found.append((math.fsum(answers[ask.key]["logprobs"]), answers[ask.key]["greedy"]))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each whole text, in windows of the model's context, each token once."""
        windows, sizes = [], []
        for request in requests:
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False), prefix_token=self.eot_token_id,
                max_seq_len=self._context - 2, context_len=1,
            )  # fmt: skip
            found = [(None, *utils.make_disjoint_window(part)) for part in parts]
            windows += found
            sizes.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows))
        return [math.fsum(next(scores)[0] for _ in range(size)) for size in sizes]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes behind each context, up to a stop text."""
        seen: Counter[str] = Counter()
        asks, stops = [], []
        for request in requests:
            context, options = request.args
            ids = self.tok_encode(context)
            temperature = options.get("temperature", 0) if options.get("do_sample", True) else 0
            most = int(options.get("max_tokens", options.get("max_gen_toks", ANSWER_TOKENS)))
            until = options.get("until") or []
            stop = [until] if isinstance(until, str) else [text for text in until if text]
            self._must_fit(len(ids), most, request)
            body = {
                "prompt": ids, "max_tokens": most, "temperature": temperature, **({"stop": stop[:STOPS]} if stop else {}),
                **{name: value for name, value in options.items() if name not in NOT_SENT},
            }  # fmt: skip
            number = 0
            if temperature:  # the same question again is another draw
                number = seen[str(body)]
                seen[str(body)] += 1
                body["seed"] = 1234 + number
            asks.append(Ask("generate", body, _text, self._asker.journal.key(body, number)))
            stops.append(stop[STOPS:])
        answers = self._answers(asks)
        return ["" if answers is None else _cut(answers[ask.key], stop) for ask, stop in zip(asks, stops, strict=True)]

    def _must_fit(self, prompt: int, most: int, request: Instance) -> None:
        """EvaluateError if an item does not fit: a shorter prompt would be another question."""
        if prompt + max(most, 1) > self._context:
            answer = f" and {most} of its answer" if most else ""
            raise EvaluateError(
                f"item {request.doc_id} of {request.task_name} has {prompt} tokens{answer}, and the server takes {self._context} together; "
                "bring it up with a longer --max-model-len, or leave the task out"
            )

    def _choices(self, context: list[int], tokens: list[int]) -> Ask:
        body = {
            "prompt": context, "max_tokens": 1, "temperature": 0, "logprobs": len(tokens), "logprob_token_ids": tokens,
            "return_tokens_as_token_ids": True, "return_token_ids": True,
        }  # fmt: skip
        return Ask("choices", body, _scores(tokens), self._asker.journal.key(body))

    def _prompt(self, context: list[int], continuation: list[int]) -> Ask:
        body = {"prompt": context + continuation, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        return Ask("prompt", body, _continuation(continuation), self._asker.journal.key(body, len(continuation)))

    def _answers(self, asks: Sequence[Ask]) -> Mapping[str, Any] | None:
        """Return the answers by key; None while only noting what would be asked."""
        if self._planned is not None:
            self._planned += asks
            return None
        self._asker.ask(asks)
        return {ask.key: self._asker.journal.answer(ask.key) for ask in asks}


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first stop that is in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


def _scores(tokens: Sequence[int]) -> Callable[[Any], Any]:
    def read(answer: Any) -> Any:
        [choice] = answer["choices"]
        found = choice["logprobs"]["top_logprobs"][0]
        return {"logprobs": {str(token): found[f"token_id:{token}"] for token in tokens}, "greedy": choice["token_ids"][0]}

    return read


def _continuation(tokens: Sequence[int]) -> Callable[[Any], Any]:
    def read(answer: Any) -> Any:
        entries = answer["choices"][0]["prompt_logprobs"][-len(tokens) :]
        found = [entry[str(token)] for entry, token in zip(entries, tokens, strict=True)]
        return {"logprobs": [one["logprob"] for one in found], "greedy": all(one["rank"] == 1 for one in found)}

    return read
