"""Whether a constraint is tried before vLLM makes a grammar of it, and what that costs whom. One process with xgrammar; no server."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from checkpoints import mistral_tokenizer
from mistral_node import grammars
from mistral_node.grammars import OF_ONE_KEY, Busy, Grammars, Verdict

STRINGS = {"type": "object", "properties": {f"a{number}": {"type": "string", "maxLength": 50 + number} for number in range(100)}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
RULES = "root ::= " + " | ".join(f"r{n}" for n in range(9000)) + "\n"
RULES += "\n".join(f'r{n} ::= [a-z]+ r{n * 7 % 9000} | "{n}" [^x]*' for n in range(9000))
GOOD = {
    "json": json.dumps({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]}),
    "regex": r"\d{3}-\d{4}", "choice": '["yes", "no\\n"]', "grammar": 'root ::= "a" | "b" root', "tools": json.dumps([TOOL]),
    "structural_tag": json.dumps({"structures": [{"begin": "<a>", "schema": {"type": "string"}, "end": "</a>"}], "triggers": ["<a"]}),
}  # fmt: skip
SLOW = {"json": json.dumps(STRINGS), "regex": "|".join(f"{n}((.{{1,99}}){{1,99}}){{1,99}}" for n in range(10)), "grammar": RULES,
        "tools": json.dumps([TOOL | {"function": {"name": "f", "parameters": STRINGS}}])}  # fmt: skip
EMPTY = {"json": '{"$ref": "#"}', "grammar": "root ::= root"}
WRONG = {"json": '{"type": 5}', "regex": "(", "grammar": "root ::= (", "structural_tag": "{}"}


def vocabulary() -> str:
    """That of v0.1's tokenizer, as vLLM has it."""
    from vllm.tokenizers.mistral import MistralTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = MistralTokenizer.from_pretrained(str(mistral_tokenizer(Path(folder), "tokenizer.model.v1")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda model_config: tokenizer)
        return grammars.vocabulary(SimpleNamespace())


def vocabulary_of_v11() -> str:
    """That of tekken in version 11, for llguidance."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    folder = tekken(
        Path(tempfile.mkdtemp()), [*(one["token_str"] for one in Tekkenizer.DEPRECATED_SPECIAL_TOKENS), "[ARGS]", "[CALL_ID]"]
    )
    return grammars.vocabulary(SimpleNamespace(tokenizer=str(folder)), grammars.GUIDANCE)


def tekken(folder: Path, special: list[str]) -> Path:
    import mistral_common

    found = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text("utf-8"))
    found["config"]["version"] = "v11"
    found["special_tokens"] = [{"rank": rank, "token_str": str(token), "is_control": True} for rank, token in enumerate(special)]
    (folder / "tekken.json").write_text(json.dumps(found))
    return folder


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


@in_a_loop
async def test_what_takes_too_long_is_told_from_what_does_not() -> None:
    judge = Grammars(vocabulary, lambda: False, patience=1200.0)  # of the lowest priority, on a machine that other tests share
    found: dict[str, dict[str, Verdict]] = {}
    every = {"good": GOOD, "slow": SLOW, "wrong": WRONG, "empty": EMPTY}
    for verdict, given in every.items():
        found[verdict] = {kind: await judge.verdict("key", kind, text) for kind, text in given.items()}
    assert found == {name: dict.fromkeys(given, Verdict(name)) for name, given in every.items()}
    assert judge._process is not None
    process = psutil.Process(judge._process.pid)
    assert process.nice() >= grammars.NICE
    assert process.children() == []
    judge.end()
    process.wait(300)


# One of these takes llguidance a quarter of an hour (999,983 took 10 s); xgrammar does not know it, and vLLM says so at once.
MULTIPLES = {
    "type": "object",
    "properties": {f"a{number}": {"type": "integer", "multipleOf": 99_999_989 + number} for number in range(9)},
}
STRICT = {"type": "function", "function": {"name": "f", "strict": True, "parameters": MULTIPLES}}
OF_GUIDANCE = {
    Verdict.GOOD: GOOD | {"grammar": 'start: "a" | "b" start'},
    Verdict.SLOW: {
        "json": json.dumps(MULTIPLES),
        "tools": json.dumps([TOOL, STRICT]),
        "grammar": f"start: %json {json.dumps(MULTIPLES)}",
    },
    Verdict.WRONG: {"json": '{"type": 5}', "regex": "(", "grammar": "start: (", "structural_tag": "{}"},
}


@in_a_loop
async def test_llguidance_is_tried_where_vllm_makes_a_grammar_of_every_chat() -> None:
    judge = Grammars(vocabulary_of_v11, lambda: False, patience=1200.0)
    found = {
        verdict: {kind: await judge.verdict("key", kind, text) for kind, text in given.items()}
        for verdict, given in OF_GUIDANCE.items()
    }
    assert found == {verdict: dict.fromkeys(given, verdict) for verdict, given in OF_GUIDANCE.items()}
    process = judge._process
    assert process is not None
    judge.end()
    await process.wait()


class Slow(Grammars):
    """Answers when it is told."""

    def __init__(self, several: bool) -> None:
        super().__init__(lambda: "", lambda: several)
        self.go_on, self.asked = asyncio.Event(), 0

    async def _asked(self, kind: str, text: str) -> Verdict:
        self.asked += 1
        await self.go_on.wait()
        return Verdict.GOOD


@in_a_loop
async def test_the_same_one_is_tried_once() -> None:
    judge = Slow(several=True)
    judge.go_on.set()
    assert [await judge.verdict("key", "regex", "a") for _ in range(50)] == [Verdict.GOOD] * 50
    await judge.verdict("key", "json", "a")
    assert judge.asked == 2


@in_a_loop
async def test_one_key_of_several_does_not_keep_the_others_waiting() -> None:
    judge = Slow(several=True)
    waiting = [asyncio.create_task(judge.verdict("a", "regex", f"a{number}")) for number in range(OF_ONE_KEY)]
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await judge.verdict("a", "regex", "one more")
    waiting.append(asyncio.create_task(judge.verdict("b", "regex", "b")))
    judge.go_on.set()
    assert await asyncio.gather(*waiting) == [Verdict.GOOD] * 3
    assert judge._waiting == []


@in_a_loop
async def test_so_many_wait_and_no_more() -> None:
    judge = Slow(several=False)
    waiting = [asyncio.create_task(judge.verdict("a", "regex", f"a{number}")) for number in range(grammars.WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await judge.verdict("a", "regex", "one more")
    judge.go_on.set()
    await asyncio.gather(*waiting)


@in_a_loop
async def test_a_process_that_ends_is_started_again() -> None:
    judge = Grammars(lambda: "no vocabulary", lambda: False)
    for _ in range(2):
        with pytest.raises(Busy):
            await judge.verdict("key", "regex", "a")
    assert judge._process is None


def test_verdicts_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "KNOWN", 3)

    async def run() -> None:
        judge = Slow(several=False)
        judge.go_on.set()
        for number in range(9):
            await judge.verdict("key", "regex", str(number))
        assert len(judge._known) == 3

    asyncio.run(run())
