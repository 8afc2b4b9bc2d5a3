"""Whether vLLM could make a grammar of a constraint in time: tried before vLLM sees it, where it can be ended.

vLLM turns a schema, a regular expression or a grammar into tables over its whole vocabulary with xgrammar (for some tokenizers with llguidance),
in threads of the engine that nothing ends: a schema of 1 kB took 9 s of a core, one of 1.2 MB nine minutes, also when its client had left. How long
cannot be told from its size, so it is tried: `python -m mistral_node.grammars` is a process of low priority with the same library and the
vocabulary in it. It forks for each constraint a child that the kernel ends after CONVERT_SECONDS and COMPILE_SECONDS of its own processor time.
What passes takes the engine no longer than that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import psutil

CONVERT_SECONDS = 0.2  # vLLM does that in the thread that answers everybody
# Of one thread. xgrammar makes it in the engine with 8 of them, as far as there are cores: in a second.
COMPILE_SECONDS = 1.0 * min(8, os.cpu_count() or 1)
STEPS = 16  # of generating by it, which every other request waits for: in the same time
NICE = 10  # a tenth of what the engine gets of a core that both want
MEMORY = 1 << 30  # bytes, beside what the process has already
ANSWER_SECONDS = 60.0  # the process starts in 3 s, and waits for its share of a busy machine
KNOWN = 512  # constraints whose verdict is kept
GUIDANCE, TEKKEN = "guidance", "tekken.json"
COMMENT = re.compile(r"(#|//).*$")
WAITING, OF_ONE_KEY = 16, 2  # requests that wait for a verdict; of one key among several


class Verdict(Enum):
    """What came of it. Of what is wrong vLLM says why, in milliseconds; what is empty lets no token pass somewhere."""

    GOOD = "good"
    EMPTY = "empty"
    SLOW = "slow"
    WRONG = "wrong"
    UNKNOWN = "unknown"  # the machine had no time for it


class Busy(Exception):
    """There is no verdict now: too many wait for one, or the process has ended."""


class Grammars:
    """Verdicts on constraints, of a process that starts with the first one. `vocabulary` gives what it needs to know of the tokenizer.

    A verdict may take `patience` seconds; half of them are the child's.
    """

    def __init__(self, vocabulary: Callable[[], str], several: Callable[[], bool], patience: float = ANSWER_SECONDS) -> None:
        self._vocabulary, self._several, self._patience = vocabulary, several, patience
        self._known: OrderedDict[str, Verdict] = OrderedDict()
        self._waiting: list[str] = []
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def verdict(self, key: str, kind: str, text: str) -> Verdict:
        """Whether the engine may be asked to make a grammar of this; Busy if there is no verdict now."""
        name = hashlib.sha256(f"{kind} {text}".encode()).hexdigest()
        if name in self._known:
            self._known.move_to_end(name)
            return self._known[name]
        if len(self._waiting) >= WAITING or (self._several() and self._waiting.count(key) >= OF_ONE_KEY):
            raise Busy
        self._waiting.append(key)
        try:
            async with self._turn:
                if name not in self._known:
                    self._known[name] = await self._asked(kind, text)
                if len(self._known) > KNOWN:
                    self._known.popitem(last=False)
                return self._known[name]
        finally:
            self._waiting.remove(key)

    async def _asked(self, kind: str, text: str) -> Verdict:
        try:
            process = await self._running()
            process.stdin.write(json.dumps([kind, text]).encode() + b"\n")  # type: ignore[union-attr]
            line = await asyncio.wait_for(process.stdout.readline(), self._patience)  # type: ignore[union-attr]
            verdict = Verdict(line.decode().strip())
            if verdict is Verdict.UNKNOWN:
                raise TimeoutError("the machine has no time for it")
            return verdict
        except BaseException as error:
            self.end()
            if not isinstance(error, Exception):
                raise
            sys.stderr.write(f"no verdict on a grammar ({type(error).__name__}: {error})\n")
            raise Busy from error

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            vocabulary = await asyncio.to_thread(self._vocabulary)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__, str(self._patience / 2)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=1 << 16,
            )
            self._process.stdin.write(vocabulary.encode() + b"\n")  # type: ignore[union-attr]
        return self._process

    def end(self) -> None:
        """Ends the process; the next question starts another one."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process = None


def vocabulary(config: Any, backend: str = "xgrammar") -> str:
    """What a backend of grammars has to know of the tokenizer that an engine with this configuration has, as vLLM makes it."""
    if backend == GUIDANCE:
        return json.dumps({GUIDANCE: str(Path(config.tokenizer) / TEKKEN)})
    import xgrammar
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.utils.mistral import is_mistral_tokenizer

    tokenizer: Any = cached_tokenizer_from_config(model_config=config)
    if not is_mistral_tokenizer(tokenizer):
        found = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=config.get_vocab_size())
    else:
        kind = xgrammar.VocabType.RAW if tokenizer.is_tekken else xgrammar.VocabType.BYTE_FALLBACK
        found = xgrammar.TokenizerInfo(
            tokenizer.vocab,
            vocab_type=kind,
            vocab_size=len(tokenizer.vocab),
            stop_token_ids=[tokenizer.eos_token_id],
            add_prefix_space=True,
        )
    return json.dumps({"xgrammar": found.serialize_json()})


def _functions(tools: list[Any]) -> list[dict[str, Any]]:
    return [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]


def tools_schema(tools: list[Any]) -> dict[str, Any]:
    """The schema of calls of these tools, one of which must be made."""
    each = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [one.get("name")]},
                "parameters": one.get("parameters") or {"type": "object"},
            },
            "required": ["name", "parameters"],
        }
        for one in _functions(tools)
    ]
    return {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": each}}


class _Maker(Protocol):
    """Makes a grammar as a backend of vLLM does, of one thread; the processor time that this may take is `seconds`."""

    seconds: float

    def convert(self, kind: str, text: str) -> Any:
        """Into rules, which says what is wrong with it."""

    def generate(self, grammar: Any) -> bool:
        """Compiles it, and generates some tokens by it; whether there were any."""


class _Xgrammar:
    """The backend xgrammar."""

    seconds = COMPILE_SECONDS

    def __init__(self, vocabulary: str) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        self._info = xgrammar.TokenizerInfo.deserialize_json(json.loads(vocabulary)["xgrammar"])

    def convert(self, kind: str, text: str) -> Any:
        from_ = self._xgrammar.Grammar
        if kind == "tools":
            return from_.from_json_schema(json.dumps(tools_schema(json.loads(text))))
        if kind == "json":
            return from_.from_json_schema(text)
        if kind == "regex":
            return from_.from_regex(text)
        if kind == "choice":
            escaped = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
            return from_.from_ebnf("root ::= " + " | ".join(escaped))
        if kind == "structural_tag":
            return self._tags(json.loads(text))
        lark = not any("::=" in COMMENT.sub("", line) for line in text.split("\n"))  # as vLLM tells them apart
        return from_.from_lark(text) if lark else from_.from_ebnf(text)

    def _tags(self, tag: dict[str, Any]) -> Any:
        if "structures" not in tag:
            return self._xgrammar.Grammar.from_structural_tag(tag)
        items = [
            self._xgrammar.StructuralTagItem(begin=one["begin"], schema=json.dumps(one["schema"]), end=one["end"])
            for one in tag["structures"]
        ]
        return self._xgrammar.Grammar.from_structural_tag(items, tag["triggers"])

    def generate(self, grammar: Any) -> bool:
        compiled = self._xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False).compile_grammar(grammar)
        matcher, mask = self._xgrammar.GrammarMatcher(compiled), self._xgrammar.allocate_token_bitmask(1, self._info.vocab_size)
        for step in range(STEPS):
            if matcher.is_terminated():
                break
            matcher.fill_next_token_bitmask(mask, 0)
            allowed = _allowed(mask, self._info.vocab_size)
            if not len(allowed) or not matcher.accept_token(int(allowed[step * 7919 % len(allowed)])):
                return False
        return True


class _Guidance:
    """The backend llguidance, which vLLM needs where it makes a grammar of every chat: Mistral's tools of tekken from version 11 on."""

    seconds = 1.0  # of the one thread that it has

    def __init__(self, vocabulary: str) -> None:
        import llguidance
        import llguidance.torch
        from mistral_common.guidance.tokenizer import from_mistral_tokenizer
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._llguidance = llguidance
        self._tokenizer = from_mistral_tokenizer(MistralTokenizer.from_file(json.loads(vocabulary)[GUIDANCE]))

    def convert(self, kind: str, text: str) -> str:
        grammar = self._grammar(kind, text)
        if why := self._llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise ValueError(why)
        return grammar

    def _grammar(self, kind: str, text: str) -> str:
        from_schema = self._llguidance.LLMatcher.grammar_from_json_schema
        if kind == "json":
            return str(from_schema(text, defaults={"whitespace_flexible": True}))
        if kind == "tools":
            schemas = [json.dumps(one.get("parameters") or {"type": "object"}) for one in _functions(json.loads(text))]
            rules = [f"t{number}: %json {schema}" for number, schema in enumerate(schemas)]
            return str(
                self._llguidance.grammar_from(
                    "lark", "\n".join(["start: " + " | ".join(f"t{n}" for n in range(len(rules))), *rules])
                )
            )
        if kind == "choice":
            text = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        if kind == "structural_tag":
            tag = json.loads(text)
            return str(self._llguidance.StructTag.to_grammar([
                self._llguidance.StructTag(
                    trigger=next(trigger for trigger in tag["triggers"] if one["begin"].startswith(trigger)),
                    begin=one["begin"], grammar=from_schema(one["schema"], defaults={"whitespace_flexible": True}), end=one["end"],
                )
                for one in tag["structures"]
            ]))  # fmt: skip
        return str(self._llguidance.grammar_from("regex" if kind == "regex" else "grammar", text))

    def generate(self, grammar: str) -> bool:
        bits = self._llguidance.torch
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        mask = bits.allocate_token_bitmask(1, self._tokenizer.vocab_size)
        for step in range(STEPS):
            if matcher.is_stopped():
                break
            bits.fill_next_token_bitmask(matcher, mask, 0)
            allowed = _allowed(mask, self._tokenizer.vocab_size)
            if matcher.get_error() or not len(allowed) or not matcher.consume_tokens([int(allowed[step * 7919 % len(allowed)])]):
                return False
        return True


def _allowed(mask: Any, size: int) -> Any:
    """The tokens that a mask of one row lets pass."""
    import torch

    bits = (mask[0].unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.flatten()[:size].nonzero().flatten()


def _in_a_child(maker: _Maker, kind: str, text: str) -> None:
    """Ends this process: with 0 if a grammar was made, 1 if none can be, 2 if it is empty, by a signal if that took too long."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY,) * 2)
        signal.setitimer(signal.ITIMER_PROF, CONVERT_SECONDS)
        grammar = maker.convert(kind, text)
        signal.setitimer(signal.ITIMER_PROF, maker.seconds)
        code = 0 if maker.generate(grammar) else 2
    except MemoryError:  # ended, as by too much time
        os.kill(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(code)


def _judge(maker: _Maker, seconds: float, kind: str, text: str) -> Verdict:
    child = os.fork()
    if not child:
        _in_a_child(maker, kind, text)
    deadline, late = time.monotonic() + seconds, False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    if late:
        return Verdict.UNKNOWN
    if os.WIFSIGNALED(status):
        return Verdict.SLOW
    return (Verdict.GOOD, Verdict.WRONG, Verdict.EMPTY)[os.WEXITSTATUS(status)]


def main() -> None:
    """Judges one constraint for each line of standard input, until that ends; each has as many seconds as the argument says."""
    os.nice(NICE)
    known = sys.stdin.readline()
    maker: _Maker = _Guidance(known) if GUIDANCE in json.loads(known) else _Xgrammar(known)
    os.dup2(2, 1)  # what xgrammar prints is no answer
    for line in sys.stdin:
        os.write(ANSWERS, f"{_judge(maker, float(sys.argv[1]), *json.loads(line)).value}\n".encode())


if __name__ == "__main__":
    ANSWERS = os.dup(1)
    main()
