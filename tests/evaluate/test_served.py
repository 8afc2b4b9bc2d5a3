"""A served model as lm-eval sees it: held to lm-eval's own client and to transformers, killed and continued."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT
from lm_eval.api.instance import Instance
from mistral_evaluate import journal, run, tokens
from mistral_evaluate.endpoint import Endpoint
from mistral_evaluate.errors import EvaluateError
from mistral_evaluate.job import Address, Job
from mistral_evaluate.model import Ask, Asker, Served
from nodes import KEY, Launcher

SUBJECTS = ("tide", "lathe", "comet", "harbour", "violin", "glacier", "ledger", "orchard", "compass", "quarry")


def address(served: Launcher) -> Address:
    return Address(served.url, KEY, "tiny")


@contextmanager
def model(served: Launcher, weights: Path, folder: Path) -> Iterator[tuple[Served, Endpoint]]:
    """The tiny model, with a journal of its own."""
    endpoint = Endpoint(address(served), 4)
    with journal.opened(folder / "journal.jsonl", {"weights": "tiny"}) as answers:
        asker = Asker(endpoint, answers, lambda ask: None)
        yield Served(asker, tokens.opened(weights / "weights" / "tiny", "hf"), CONTEXT), endpoint


def questions(**_: Any) -> Any:
    """20 questions with four answers each, of which the letter is asked."""
    from datasets import Dataset

    rows = [
        {"question": f"Which word stands beside the {subject} of {number}?", "choices": SUBJECTS[number % 5 : number % 5 + 4], "answer": number % 4}
        for number, subject in enumerate(SUBJECTS * 2)
    ]  # fmt: skip
    return {"test": Dataset.from_list(rows), "dev": Dataset.from_list(rows[:5])}


LETTERS = {
    "task": "letters", "custom_dataset": questions, "test_split": "test", "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice", "num_fewshot": 5, "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer",
    "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


def samples(found: Any) -> Iterator[tuple[str, Any, Any]]:
    """Task, what was asked and what was answered, of every item."""
    for task, listed in found["samples"].items():
        for sample in listed:
            yield task, sample["arguments"], sample["resps"]


def test_values_and_answers_are_those_of_lm_evals_own_client_with_fewer_requests(
    served: Launcher, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tasks: Callable[[], list[dict[str, Any]]] = lambda: [LETTERS, *run.configs(["hellaswag_100", "gsm8k_cot_100"])]  # noqa: E731
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stock = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="tiny", tokenizer=str(weights / "weights" / "tiny"), tokenizer_backend="huggingface",
        add_bos_token=True, max_length=CONTEXT, num_concurrent=4, max_retries=1,
    )  # fmt: skip
    before = served.status()["requests"]["served"]
    theirs = run.harness(stock, [LETTERS], None), run.harness(stock, tasks()[1:], 3)
    served.until_served(before + 80 + 12 + 3)
    with model(served, weights, tmp_path) as (own, endpoint):
        letters = run.harness(own, [LETTERS], None)
        assert endpoint.sent == 20  # one for the four letters
        others = run.harness(own, tasks()[1:], 3)
        assert endpoint.sent == 20 + 12 + 3
    for stock_found, found in zip(theirs, (letters, others), strict=True):
        for task, wanted in stock_found["results"].items():
            assert found["results"][task] == wanted
        for (task, asked, wanted), (_, asked_here, answers) in zip(samples(stock_found), samples(found), strict=True):
            assert asked == asked_here
            for one, other in zip(wanted, answers, strict=True):
                if task == "gsm8k_cot_100":
                    assert one == other
                else:
                    assert (one[0][1], one[0][0]) == (other[0][1], pytest.approx(other[0][0], abs=1e-4))


def test_scores_are_those_of_transformers(served: Launcher, weights: Path, tmp_path: Path) -> None:
    """Within 1e-4: of one token, of several, of none, behind no context, of a whole text longer than the window."""
    from checkpoints import hugging_face, log_probabilities, of_tokens
    from transformers import AutoTokenizer

    folder = weights / "weights" / "tiny"
    encode, reference = AutoTokenizer.from_pretrained(folder).encode, hugging_face(folder)

    def scored(context: list[int], continuation: list[int]) -> float:
        return float(
            of_tokens(log_probabilities(reference, context + continuation), context + continuation)[len(context) - 1 :].sum()
        )

    question = "Q: There are 15 trees in the grove. " * 20 + "How many?\nAnswer:"
    pairs = [(question, " A"), (question, " B"), (question, " twenty-one trees"), ("One ", "word more"), ("", "No context here")]
    text = "A man walks along the shore and picks up a shell. " * 30
    with model(served, weights, tmp_path) as (own, _):
        found = own.loglikelihood([Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)])
        [rolled] = own.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        whole = encode(context + continuation)
        behind = len(encode(context.rstrip())) if context else 1
        assert value == pytest.approx(scored(whole[:behind], whole[behind:]), abs=1e-4)
    assert len(encode(text)) > 128
    assert rolled == pytest.approx(scored([1], encode(text, add_special_tokens=False)), abs=1e-3)


def test_every_engine_is_worth_the_same(served: Launcher, by_reference: Launcher, weights: Path, tmp_path: Path) -> None:
    found = []
    for number, engine in enumerate((served, by_reference)):
        (tmp_path / str(number)).mkdir()
        with model(engine, weights, tmp_path / str(number)) as (own, endpoint):
            run.check_tokens(endpoint, own._tokens)
            found.append((run.harness(own, [LETTERS], 8), run.harness(own, run.configs(["hellaswag_100", "gsm8k_cot_100"]), 2)))
    for one, other in zip(*found, strict=True):
        assert one["results"] == other["results"]
        for (task, _, wanted), (_, _, answers) in zip(samples(one), samples(other), strict=True):
            if task == "gsm8k_cot_100":
                assert wanted == answers
            else:
                assert [value for [(value, _)] in answers] == pytest.approx([value for [(value, _)] in wanted], abs=1e-4)
                assert [best for [(_, best)] in answers] == [best for [(_, best)] in wanted]


def job(served: Launcher, weights: Path, path: Path, **changed: Any) -> Job:
    given = {
        "address": address(served), "identity": {"weights": "tiny", "revision": "1"}, "tokenizer": weights / "weights" / "tiny", "mode": "hf",
        "context": CONTEXT, "concurrency": 4, "tasks": ("hellaswag_100",), "journal": path, "limit": 15,
    }  # fmt: skip
    return Job(**(given | changed))


def started(one: Job) -> subprocess.Popen[str]:
    told = one.journal.with_suffix(".job")
    told.write_text(one.dump())
    with told.open() as stdin:
        command = [sys.executable, "-m", "mistral_evaluate"]
        return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(one: Job) -> list[dict[str, Any]]:
    """The events of a run, in this process."""
    events: list[dict[str, Any]] = []
    run.run(one, events.append)
    return events


def test_a_killed_run_asks_only_the_rest_and_a_changed_model_asks_anew(served: Launcher, weights: Path, tmp_path: Path) -> None:
    one = job(served, weights, tmp_path / "journal.jsonl")
    process = started(one)

    def answered() -> int:
        return one.journal.read_bytes().count(b"\n") if one.journal.exists() else 0

    while answered() < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = answered()
    assert 20 <= kept < 60
    with one.journal.open("ab") as file:
        file.write(b'{"key": "0123", "answer": {"logpro')  # a line that a full disk cut off
    events = finished(one)
    (first, plan), result = [event for event in events if event["event"] == "plan"], events[-1]
    assert (plan["requests"], plan["open"]) == (60, 60 - kept)
    assert (first["left_seconds"], first["asked"]) == (None, 0)
    assert plan["left_seconds"] > 0
    assert result["requests"] == {
        "all": 60,
        "asked": 60 - kept,
        "sent": 60 - kept + 2,
        "refused": 0,
    }  # two ask for the tokens alone
    again, whole = finished(one)[-1], finished(job(served, weights, tmp_path / "other.jsonl"))[-1]
    assert (again["requests"]["asked"], whole["requests"]["asked"]) == (0, 60)
    assert again["values"] == result["values"] == whole["values"]
    lines = one.journal.read_text().splitlines()
    changed = json.loads(lines[0])
    changed["answer"]["logprobs"][0] = 0.0
    one.journal.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    assert finished(one)[-1]["requests"]["asked"] == 1  # of a line that was changed
    assert (
        finished(job(served, weights, one.journal, identity={"weights": "tiny", "revision": "2"}, limit=2))[-1]["requests"][
            "asked"
        ]
        == 8
    )


def test_what_a_run_says(served: Launcher, weights: Path, tmp_path: Path) -> None:
    process = started(job(served, weights, tmp_path / "j", tasks=("truthfulqa_mc1_100", "gsm8k_cot_100"), limit=2))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["plan", "plan", "result"]
    result = events[-1]
    assert result["harness"] == "lm-eval 0.4.13"
    assert [(one["task"], one["metric"], one["n"], one["shots"]) for one in result["values"]] == [
        ("truthfulqa_mc1_100", "acc", 2, 0), ("gsm8k_cot_100", "exact_match (strict-match)", 2, 8),
        ("gsm8k_cot_100", "exact_match (flexible-extract)", 2, 8),
    ]  # fmt: skip
    for one in result["values"]:
        assert one["low"] <= one["value"] <= one["high"]
        assert len(one["items"]) == 2
        assert one["value"] == sum(score for _, score in one["items"]) / 2
    [_, plan] = [event for event in events if event["event"] == "plan"]
    last = [event for event in events if event["event"] == "progress"][-1]
    assert last["done"] == last["of"] == plan["open"]
    assert KEY not in out + err


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tasks": ("gsm8k_cot_100",), "context": 500}, "item 0 of gsm8k_cot_100 has .* and 256 of its answer, and the server takes 500 together"),
        ({"tasks": ("gsm9k",)}, "there is no task 'gsm9k'; there are hellaswag_100, "),
        ({"mode": "mistral"}, "has no tokenizer that can be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_before_anything_is_asked(
    changed: dict[str, Any], says: str, served: Launcher, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "ask", None)
    with pytest.raises(EvaluateError, match=says):
        finished(job(served, weights, tmp_path / "j", **changed))


def test_a_tokenizer_of_another_model_is_refused(served: Launcher, tmp_path: Path) -> None:
    import tiny_model  # its tokenizer is one of bytes, without BOS

    tiny_model.write(tmp_path / "other")
    with pytest.raises(EvaluateError, match=r"the server makes \[1, .* they are not of one model"):
        finished(job(served, tmp_path, tmp_path / "j", tokenizer=tmp_path / "other"))


def test_a_wrong_key_and_a_wrong_model_are_refused_at_once(served: Launcher, weights: Path, tmp_path: Path) -> None:
    for wrong, says in ((Address(served.url, "sk-wrong", "tiny"), "401"), (Address(served.url, KEY, "huge"), "404")):
        with pytest.raises(EvaluateError, match=says):
            finished(job(served, weights, tmp_path / "j", address=wrong))


def test_sampled_answers_to_one_question_differ_and_are_kept(served: Launcher, weights: Path, tmp_path: Path) -> None:
    options = {"do_sample": True, "temperature": 1.0, "until": ["\n\n"], "max_gen_toks": 16}
    asked = [Instance("generate_until", {}, ("Once upon a time", options), 0)] * 4
    with model(served, weights, tmp_path) as (own, endpoint):
        first = own.generate_until(asked)
        assert (len(set(first)), endpoint.sent) == (4, 4)
        assert (own.generate_until(asked), endpoint.sent) == (first, 4)


def test_nothing_is_asked_while_it_is_planned(served: Launcher, weights: Path, tmp_path: Path) -> None:
    planned: list[Ask] = []
    with journal.opened(tmp_path / "j", {}) as answers:
        own = Served(
            Asker(Endpoint(address(served), 4), answers, lambda ask: None),
            tokens.opened(weights / "weights" / "tiny", "hf"),
            CONTEXT,
            planned,
        )
        run.harness(own, [LETTERS], None, planning=True)
        assert own._asker.endpoint.sent == 0
    assert len({ask.key for ask in planned}) == 20
