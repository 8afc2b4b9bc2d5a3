"""`eval` on the laptop: what is refused before anything is asked, what answers depend on, and two evaluations beside each other."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistral_contract import envs
from mistralctl import evaluation, state
from mistralctl.commands import eval as command
from mistralctl.commands import receipt
from mistralctl.errors import UserError
from mistralctl.evaluation import Address, Evaluated, Requests, Value
from mistralctl.output import ahead_text, compared_text, evaluated_text, progress_text
from mistralctl.state import Record
from test_receipt import record

__all__ = ["record"]  # a fixture

SCORES = (1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)


def value(scores: tuple[float, ...] = SCORES, **changed: Any) -> Value:
    mean = sum(scores) / len(scores)
    stderr = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
    items = tuple((f"item{number}", score) for number, score in enumerate(scores))
    made = Value("hellaswag_100", "reasoning", "acc", mean, stderr, 0.2, 0.8, len(scores), 0, "1.0", True, "a package 1.0", items)
    return replace(made, **changed)


def found(*values: Value, **changed: Any) -> Evaluated:
    made = Evaluated(
        1, "mine", "tiny", "quick", None, 1.0, 75.0, "lm-eval 0.4.13", {"dtype": "float32"}, Requests(8, 6, 7, 1), values
    )
    return replace(made, **changed)


def written(path: Path, evaluated: Evaluated) -> str:
    path.write_text(json.dumps(asdict(evaluated)))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("ghost",), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
        (("ghost", "--suite", "paper"), 2, "--suite: there is no suite 'paper'; there are quick"),
        (("ghost", "--tasks", "hellaswag_100,gsm8k_cot"), 2, "--tasks: there is no task 'gsm8k_cot'; did you mean gsm8k_cot_100?"),
        (("a", "b"), 2, "NAME: one deployment at a time is evaluated, and not 2; --compare takes two evaluations"),
        (("a", "--compare"), 2, "--compare: takes two evaluations, each NAME, NAME/MODEL or a file, and not 1"),
        (("a", "b", "--compare", "--limit", "2"), 2, "--compare: asks nothing and means nothing with --tasks, --limit or --model; leave them out"),
        (("a", "b", "--compare"), 4, "a: there is neither a deployment nor a file of that name"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: tuple[str, ...], code: int, message: str, mistralctl: Run) -> None:
    done = mistralctl("eval", *arguments)
    assert (done.returncode, done.stderr, done.stdout) == (code, f"mistralctl: {message}\n", "")


def test_what_is_down_or_was_not_evaluated_is_said(record: Record, mistralctl: Run) -> None:
    state.save(replace(record, state="down"))
    assert "mine is down; run mistralctl up" in mistralctl("eval", "mine").stderr
    done = mistralctl("eval", "--compare", "mine", "mine/x")
    assert done.stderr == "mistralctl: mine was not evaluated yet; run mistralctl eval mine\n"


def identity(record: Record, model: str, **changed: str) -> dict[str, Any]:
    task = {**record.task, "envs": record.task["envs"] | {envs.variable(name): text for name, text in changed.items()}}
    return command._identity(replace(record, task=task), model)


def test_answers_depend_on_weights_adapter_engine_and_dtype(record: Record) -> None:
    model, pinned = record.served_model_name, {"revision": "a" * 40}
    plain = identity(record, model, **pinned)
    assert plain == identity(replace(record, created_at=5.0), model, **pinned)
    changed = [
        identity(record, model, **pinned, dtype="bfloat16"), identity(record, model, revision="b" * 40),
        identity(record, model, **pinned, weights="s3://bucket/other"), identity(record, model, **pinned, sliding_window="16"),
        identity(replace(record, weights_digest="c" * 64), model, **pinned),
        identity(record, "mine", **pinned, lora='{"mine": "s3://bucket/a"}', lora_versions='{"mine": "1"}'),
        identity(record, "mine", **pinned, lora='{"mine": "s3://bucket/a"}', lora_versions='{"mine": "2"}'),
        identity(record, "mine", **pinned, lora='{"mine": "s3://bucket/b"}', lora_versions='{"mine": "2"}'),
    ]  # fmt: skip
    assert len({json.dumps(one, sort_keys=True) for one in (plain, *changed)}) == len(changed) + 1


def test_what_is_known_by_no_digest_is_asked_anew_after_each_up(record: Record) -> None:
    later = replace(record, created_at=time.time() + 60)
    model, adapter = record.served_model_name, {"lora": '{"mine": "s3://bucket/a"}'}
    assert identity(record, model, revision="") != identity(later, model, revision="")
    assert identity(record, "mine", revision="a" * 40, **adapter) != identity(later, "mine", revision="a" * 40, **adapter)


def test_a_public_server_is_asked_at_its_address_by_its_own_certificate(record: Record) -> None:
    assert command._address(record, "k", "m") == Address("http://127.0.0.1:8000", "k", "m")
    public = replace(record, public=True, address="192.0.2.7", host="llm.example")
    certificate = str(state.folder("mine") / "server.crt")
    assert command._address(public, "k", "m") == Address("https://192.0.2.7:8000", "k", "m", certificate, "llm.example")


def test_a_model_that_is_not_served_is_named_with_those_that_are(record: Record) -> None:
    with pytest.raises(UserError, match="--model: mine serves no other; it serves smollm2-135m-instruct, tuned"):
        identity(record, "other", lora='{"tuned": "s3://bucket/a"}')


def test_what_was_found_is_kept_and_named_in_the_receipt_and_read_again(record: Record, mistralctl: Run) -> None:
    receipt.write(record)
    kept = evaluation.keep(found(value(), model="org/model"))
    assert Path(kept.file).name == "org--model.json"
    assert Path(kept.file).stat().st_mode & 0o777 == 0o600
    receipt.note_evaluation("mine", "org/model", kept.file)
    assert evaluation.read("mine/org/model") == evaluation.read(kept.file) == kept
    shown = json.loads(mistralctl("receipt", "mine", "-o", "json").stdout)
    assert shown["evaluations"] == {"org/model": kept.file}
    assert f"evaluation  org/model: {kept.file}\n" in mistralctl("receipt", "mine").stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no evaluation"), ("[]", "is no evaluation"), ('{"schema": 1}', "is no evaluation"), ("[" * 100000, "is no evaluation"),
        ('{"schema": 2}', "was made by a newer version of mistralctl .schema 2.; upgrade"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_evaluation_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=says):
        evaluation.read(str(tmp_path / "file"))


def test_two_evaluations_of_the_same_items_differ_by_the_errors_of_their_differences() -> None:
    other = value((1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0))
    [row] = evaluation.compared(found(value()), found(other))
    assert (row.first, row.second, row.difference, row.paired, row.n) == (0.5, 0.75, 0.25, True, 8)
    assert row.stderr == pytest.approx(math.sqrt((6 * 0.25**2 + 2 * 0.75**2) / 7 / 8))
    assert row.sigmas == pytest.approx(0.25 / (row.stderr or 1))
    assert (row.stderr or 1) < math.hypot(value().stderr or 0, other.stderr or 0)
    [same] = evaluation.compared(found(value()), found(value()))
    assert (same.difference, same.sigmas) == (0.0, 0.0)


def test_two_evaluations_of_other_items_differ_by_both_errors_and_of_other_tasks_not_at_all(tmp_path: Path) -> None:
    first, second = value(), value(SCORES[:4])
    [row] = evaluation.compared(found(first), found(second))
    assert (row.paired, row.n) == (False, 4)
    assert row.stderr == pytest.approx(math.hypot(first.stderr or 0, second.stderr or 0))
    [unknown] = evaluation.compared(found(first), found(replace(second, stderr=None)))
    assert (unknown.stderr, unknown.sigmas) == (None, None)
    files = [written(tmp_path / "a", found(first)), written(tmp_path / "b", found(replace(second, version="2.0")))]
    with pytest.raises(UserError, match="have no task in common; evaluate both by the same suite"):
        command.compare(files)


def test_the_table_of_two(tmp_path: Path, mistralctl: Run) -> None:
    other = found(value((1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0)), model="tuned")
    files = [written(tmp_path / "a", found(value())), written(tmp_path / "b", other)]
    assert mistralctl("eval", "--compare", *files).stdout == (
        "first:  mine/tiny\n"
        "second: mine/tuned\n\n"
        "TASK           METRIC  N  FIRST  SECOND  DIFFERENCE  STANDARD ERRORS\n"
        "hellaswag_100  acc     8  0.500  0.750   +0.250      +1.5\n"
    )
    shown = json.loads(mistralctl("eval", "--compare", *files, "-o", "json").stdout)
    assert (shown["version"], shown["first"], shown["rows"][0]["paired"]) == (1, "mine/tiny", True)
    assert "(other items)" in compared_text(command.compare([files[0], written(tmp_path / "c", found(value(SCORES[:4])))]))


def test_the_table_of_one_and_what_is_said_on_the_way() -> None:
    assert evaluated_text(found(value(), value(metric="perplexity", low=None, high=None), file="/kept")) == (
        "tiny of mine, by lm-eval 0.4.13\n\n"
        "AREA       TASK           METRIC      SHOTS  N  VALUE  95 % INTERVAL\n"
        "reasoning  hellaswag_100  acc         0      8  0.500  0.200 to 0.800\n"
        "reasoning  hellaswag_100  perplexity  0      8  0.500  -\n\n"
        "8 requests, 6 of them asked now, in 75 s\nkept: /kept"
    )
    assert ahead_text(command.Ahead(1009, 1009, 0, None)) == "1,009 requests; the first ones show how long they take"
    assert ahead_text(command.Ahead(1009, 9, 0, None)) == (
        "1,009 requests, 1,000 of them answered before; the first ones show how long they take"
    )
    assert ahead_text(command.Ahead(1009, 1009, 9, 400.0)) == "the other 1,000 requests take about 7m"
    assert ahead_text(command.Ahead(9, 9, 1, 60.0, 0.021)) == (
        "the other 8 requests take about 60 s, in which the machine costs 0.02 USD"
    )
    assert ahead_text(command.Ahead(8, 0, 0, 0.0)) == "8 requests, 8 of them answered before: nothing is asked"
    assert progress_text(command.Progress(5, 1009, None)) == "5 of 1,009 requests answered"
    assert progress_text(command.Progress(5, 1009, 90.0)) == "5 of 1,009 requests answered, 90 s left"
