"""What one request may ask: every field of a completion or chat that is served, and its bounds. Pure; the guard asks before vLLM sees a body.

The list is of what is known: vLLM 0.32's own fields, and those that clients of the OpenAI API send although nothing here reads them. Any other
field is refused by name, so that a field of a newer vLLM is looked at before it is served (tests/plugin/test_bodies.py compares).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_contract import envs
from mistral_contract.envs import Serve
from mistral_contract.routes import CHAT

# Text of a prompt that needs more bytes for each token is refused by its size. The longest token of Mistral's first three tokenizers has 16
# characters, and JSON writes some of them in 2 or 6 bytes; text has 3 to 5 characters a token.
TOKEN_BYTES = 32
BESIDE_THE_PROMPT = 256 << 10  # tools, schemas and the like
LARGEST = 32 << 20
DEEPEST = 64  # objects and lists in each other; vLLM takes as many in a schema
VALUES = 20_000  # numbers, texts, objects and lists beside the prompt
INT64 = 1 << 63
INT32 = (1 << 31) - 1
SHARE = 3 / 4  # of the sequences that run at once, which one request, and one key of several, may have
# Log-probabilities in one answer that is not a stream: vLLM writes them all at once, and answers nobody meanwhile.
LOGPROBS = 100_000
TOP_LOGPROBS = 1000  # vLLM takes 20, unless --max-logprobs says more
STOPS, STOP_LENGTH = 4, 1000
BAD_WORDS, BAD_WORD_LENGTH = 64, 64
BIASES, TOKEN_IDS, STOP_TOKEN_IDS = 300, 1024, 128
TOOLS, CHOICES = 128, 1000
# Bytes of what vLLM makes a grammar of. The time that it takes is bounded by another module, which tries.
GRAMMAR_BYTES = {"json": 64 << 10, "regex": 4 << 10, "choice": 32 << 10, "grammar": 32 << 10, "structural_tag": 64 << 10}
STRICT_TOOLS = "strict tools"  # that may be called or not: of some tokenizers vLLM makes a grammar of these, too
# What pydantic, and so vLLM, reads as a flag.
TRUE, FALSE = (True, "true", "t", "yes", "y", "on", "1"), (False, "false", "f", "no", "n", "off", "0")
NESTED = {dict, list}
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
HARMONY = {"author", "recipient", "channel", "content_type"}
NAME = re.compile(r"[A-Za-z0-9._:@/-]{1,256}")
# Names of arguments of transformers' and mistral_common's chat templates, which a template's own variables may not replace.
TEMPLATE_ARGUMENTS = frozenset(
    "conversation conversations messages chat_template tools documents tokenize padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs continue_final_message add_generation_prompt tokenizer model_config".split()
)


class Refused(Exception):
    """Why a request is not let in: the field, and a sentence with the limit and what to do."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param, self.message = param, message


@dataclass(frozen=True)
class Bounds:
    """What follows from the deployment: the longest prompt and answer in tokens, and the sequences that run at once."""

    max_model_len: int
    max_num_seqs: int

    @property
    def body(self) -> int:
        """Bytes of the largest body."""
        return min(LARGEST, TOKEN_BYTES * self.max_model_len + BESIDE_THE_PROMPT)

    @property
    def sequences(self) -> int:
        """Most sequences of one request: its prompts times `n`."""
        return max(1, int(self.max_num_seqs * SHARE))


@dataclass(frozen=True)
class Asked:
    """What a request that may be let in asks of the engine: how many sequences, and the grammars that vLLM may make for it, `(kind, text)`.

    `uncounted`: it is a stream whose client does not ask how many tokens it has.
    """

    sequences: int = 1
    grammars: tuple[tuple[str, str], ...] = ()
    uncounted: bool = False


def bounds(environ: Mapping[str, str]) -> Bounds:
    """The bounds of the deployment that these variables describe; wide ones where there is none."""
    found = [
        envs.value(Serve, name, environ) if environ.get(envs.variable(name)) else wide
        for name, wide in (("max_model_len", 1 << 20), ("max_num_seqs", 256))
    ]
    return Bounds(*found)


def _number(value: Any) -> float | int:
    """A number; of text, too, as vLLM reads that."""
    if isinstance(value, str) and len(value) <= 32:
        try:
            value = float(value) if re.search(r"[.eEnN]", value) else int(value)
        except ValueError:
            raise ValueError("should be a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("should be a number")
    return value


def _between(low: float, high: float, *, whole: bool = False) -> Check:
    def check(value: Any, bounds: Bounds) -> None:
        number = _number(value)
        if not low <= number <= high or (whole and number != int(number)):
            raise ValueError(f"should be a {'whole ' if whole else ''}number from {low:g} to {high:g}")

    return check


def _whole(low: int, high: int) -> Check:
    return _between(low, high, whole=True)


def _tokens(low: int) -> Check:
    def check(value: Any, bounds: Bounds) -> None:
        _whole(low, bounds.max_model_len)(value, bounds)

    return check


def _truth(value: Any) -> bool:
    """Whether vLLM takes a flag for true; ValueError if it takes it for neither."""
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, list | dict) or word not in (*TRUE, *FALSE):
        raise ValueError("should be true or false")
    return word in TRUE


def _flag(value: Any, bounds: Bounds) -> None:
    _truth(value)


def _is_on(data: Mapping[str, Any], name: str) -> bool:
    return data.get(name) is not None and _truth(data[name])


def _text(longest: int) -> Check:
    def check(value: Any, bounds: Bounds) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"should be text of at most {longest} characters")

    return check


def _name(value: Any, bounds: Bounds) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError("should be a name of at most 256 letters, digits and . _ : @ / -")


def _listed(most: int, each: Check) -> Check:
    def check(value: Any, bounds: Bounds) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(
                f"should be a list of at most {most}" + (f", it has {len(value)}" if isinstance(value, list) else "")
            )
        for one in value:
            each(one, bounds)

    return check


def _stop(value: Any, bounds: Bounds) -> None:
    _listed(STOPS, _text(STOP_LENGTH))([value] if isinstance(value, str) else value, bounds)


def _biases(value: Any, bounds: Bounds) -> None:
    if not isinstance(value, dict) or len(value) > BIASES:
        raise ValueError(f"should be an object of at most {BIASES} token ids")
    for name, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", name):
            raise ValueError("should have token ids as names")
        _between(-100, 100)(bias, bounds)


def _scalars(most: int) -> Check:
    """A flat object of short values."""

    def check(value: Any, bounds: Bounds) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(f"should be an object of at most {most} values")
        for name, one in value.items():
            if (
                len(name) > 64
                or not isinstance(one, str | int | float | bool | None)
                or (isinstance(one, str) and len(one) > 512)
            ):
                raise ValueError("should have names of at most 64 characters, and values that are no objects or lists")

    return check


def _template_variables(value: Any, bounds: Bounds) -> None:
    _scalars(16)(value, bounds)
    if wrong := sorted(set(value) & TEMPLATE_ARGUMENTS):
        raise ValueError(f"may not set {wrong[0]}")


def _repetition(value: Any, bounds: Bounds) -> None:
    known = ("max_pattern_size", "min_pattern_size", "min_count")
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise ValueError(f"should be an object with {', '.join(known)}")
    for one in value.values():
        _whole(0, 64)(one, bounds)


def _stream_options(value: Any, bounds: Bounds) -> None:
    if not isinstance(value, dict) or len(value) > 8:
        raise ValueError("should be an object of flags")
    for one in value.values():
        if one is not None:
            _flag(one, bounds)


def _token_ids(value: list[Any], bounds: Bounds) -> None:
    if len(value) > bounds.max_model_len:
        raise ValueError(f"has {len(value)} tokens; this server takes {bounds.max_model_len} together with the answer")
    if set(map(type, value)) - {int} or (value and not 0 <= min(value) <= max(value) <= INT32):
        raise ValueError(f"has a token id that is no whole number from 0 to {INT32}")


def _prompt(value: Any, bounds: Bounds) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise ValueError("should be text, a list of texts, token ids, or a list of lists of token ids")
    if value and type(value[0]) is int:
        value = [value]
    if len(value) > bounds.sequences:
        raise ValueError(f"has {len(value)} prompts; at most {bounds.sequences} are taken at once, send them in several requests")
    for one in value:
        if isinstance(one, list):
            _token_ids(one, bounds)
        elif not isinstance(one, str):
            raise ValueError("should be text, a list of texts, token ids, or a list of lists of token ids")
    if len({type(one) for one in value}) > 1:
        raise ValueError("should have prompts of one kind")


def _part(part: Any) -> None:
    kinds = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
    field = kinds.get(str(part.get("type", "text"))) if isinstance(part, dict) else None
    if field is None or not isinstance(part.get(field), str):
        raise ValueError("should have parts of text only; this model reads no images, sounds or files")


def _messages(value: Any, bounds: Bounds) -> None:
    most = max(64, bounds.max_model_len // 4)  # a template needs some tokens for each
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"should be a list of at most {most} messages")
    parts = 0
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("should be a list of objects with a role")
        if of_harmony := HARMONY & set(message):  # vLLM would take it for a message of gpt-oss
            raise ValueError(f"should have no {min(of_harmony)}")
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, list):
            parts += len(content)
            for part in content:
                if not isinstance(part, str):
                    _part(part)
        elif not isinstance(content, str | None):
            raise ValueError("should have text, or a list of parts, as content")
        if calls is not None:
            _listed(TOOLS, _an_object)(calls, bounds)
        if parts > most:
            raise ValueError(f"should have at most {most} parts of content")


def _an_object(value: Any, bounds: Bounds) -> None:
    if not isinstance(value, dict):
        raise ValueError("should be an object")


def _size(value: Any) -> int:
    return len(value if isinstance(value, str) else json.dumps(value))


def _within(kind: str, value: Any) -> None:
    if (size := _size(value)) > GRAMMAR_BYTES[kind]:
        raise ValueError(f"has {kind} of {size} bytes; at most {GRAMMAR_BYTES[kind]} are taken, make it smaller")


def _structured(value: Any, bounds: Bounds) -> None:
    flags = ("json_object", "disable_any_whitespace", "disable_additional_properties")
    if not isinstance(value, dict) or not set(value) <= {*GRAMMAR_BYTES, *flags, "whitespace_pattern"}:
        raise ValueError(f"should be an object with one of {', '.join((*GRAMMAR_BYTES, 'json_object'))}")
    for name in flags:
        if value.get(name) is not None:
            _flag(value[name], bounds)
    if value.get("whitespace_pattern") is not None:
        raise ValueError("takes no whitespace_pattern")
    for kind in ("regex", "grammar", "structural_tag"):
        if not isinstance(value.get(kind), str | None):
            raise ValueError(f"should have text as {kind}")
    if not isinstance(value.get("json"), str | dict | None):
        raise ValueError("should have an object as json")
    if value.get("choice") is not None:
        _listed(CHOICES, _text(STOP_LENGTH))(value["choice"], bounds)
    for kind in GRAMMAR_BYTES:
        if value.get(kind) is not None:
            _within(kind, value[kind])
    for kind in ("json", "structural_tag"):
        if isinstance(value.get(kind), str):
            _json_text(kind, value[kind])


def _json_text(kind: str, text: str) -> None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"should have JSON of at most {DEEPEST} levels as {kind}") from None
    _plain("structured_outputs", found)


def _response_format(value: Any, bounds: Bounds) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError("should be an object with a type")
    _within("structural_tag" if value["type"] == "structural_tag" else "json", value)


def _tools(value: Any, bounds: Bounds) -> None:
    _listed(TOOLS, _an_object)(value, bounds)
    _within("json", value)


def _tool_choice(value: Any, bounds: Bounds) -> None:
    if not isinstance(value, str | dict) or _size(value) > 1024:
        raise ValueError("should be none, auto, required, or an object that names a function")


def _documents(value: Any, bounds: Bounds) -> None:
    _listed(64, _an_object)(value, bounds)


def _sequences(value: Any, bounds: Bounds) -> None:
    _whole(1, bounds.sequences)(value, bounds)


def _unread(value: Any, bounds: Bounds) -> None:
    """Of a field that nothing reads: what it is was bounded with the whole body."""


def _nothing(why: str) -> Check:
    def check(value: Any, bounds: Bounds) -> None:
        if value not in (None, False, 0, "", [], {}):
            raise ValueError(f"is not served: {why}")

    return check


Check = Callable[[Any, Bounds], None]
_IDS = _whole(0, INT32)
_TEXT_ONLY, _INSIDE = _nothing("this model reads text only"), _nothing("it is for parts of one engine")
# A field that is null counts as not sent.
BOTH: dict[str, Check] = {
    "model": _name,
    "n": _sequences, "best_of": _sequences,
    "max_tokens": _whole(0, INT32), "min_tokens": _tokens(0),
    "temperature": _between(0, 2), "top_p": _between(0, 1), "min_p": _between(0, 1), "top_k": _whole(-1, INT32),
    "frequency_penalty": _between(-2, 2), "presence_penalty": _between(-2, 2), "repetition_penalty": _between(0.01, 100),
    "length_penalty": _between(-100, 100), "seed": _whole(-INT64, INT64 - 1),
    "stop": _stop, "stop_token_ids": _listed(STOP_TOKEN_IDS, _IDS), "bad_words": _listed(BAD_WORDS, _text(BAD_WORD_LENGTH)),
    "logit_bias": _biases, "allowed_token_ids": _listed(TOKEN_IDS, _IDS), "logprob_token_ids": _listed(STOP_TOKEN_IDS, _IDS),
    "prompt_logprobs": _whole(0, TOP_LOGPROBS), "truncate_prompt_tokens": _tokens(-1), "truncation_side": _text(8),
    "stream": _flag, "stream_options": _stream_options, "stream_interval": _whole(1, 1024), "echo": _flag, "ignore_eos": _flag,
    "include_stop_str_in_output": _flag, "skip_special_tokens": _flag, "spaces_between_special_tokens": _flag, "add_special_tokens": _flag,
    "return_tokens_as_token_ids": _flag, "return_token_ids": _flag, "return_token_offsets": _flag, "watermarking": _flag,
    "repetition_detection": _repetition, "thinking_token_budget": _whole(-1, INT32), "routed_experts_prompt_start": _tokens(0),
    "response_format": _response_format, "structured_outputs": _structured,
    "request_id": _name, "session_id": _name, "cache_salt": _text(1024), "user": _text(1024),
    "priority": _nothing("requests are taken in their order"), "use_beam_search": _nothing("ask for n answers"),
    "kv_transfer_params": _INSIDE, "ec_transfer_params": _INSIDE, "vllm_xargs": _nothing("no extension of vLLM is installed"),
    "mm_payload": _text(8), "return_mm_kwargs": _flag,
    # sent by clients of the OpenAI API, read by nobody here
    "store": _flag, "metadata": _scalars(16), "service_tier": _text(64), "prompt_cache_key": _text(1024), "safety_identifier": _text(1024),
    "prompt_cache_retention": _text(64), "verbosity": _text(64), "modalities": _listed(4, _text(64)),
    "prediction": _nothing("it needs another model"),
    "audio": _TEXT_ONLY, "web_search_options": _nothing("this server searches nothing"),
}  # fmt: skip
COMPLETION: dict[str, Check] = BOTH | {
    "prompt": _prompt, "suffix": _nothing("this model fills in nothing"), "prompt_embeds": _TEXT_ONLY, "logprobs": _whole(0, TOP_LOGPROBS),
}  # fmt: skip
CHATTED: dict[str, Check] = BOTH | {
    "messages": _messages, "max_completion_tokens": _whole(0, INT32), "logprobs": _flag, "top_logprobs": _whole(0, TOP_LOGPROBS),
    "tools": _tools, "tool_choice": _tool_choice, "parallel_tool_calls": _flag, "functions": _nothing("use tools"),
    "function_call": _nothing("use tool_choice"), "reasoning_effort": _text(16), "include_reasoning": _flag, "documents": _documents,
    "add_generation_prompt": _flag, "continue_final_message": _flag, "return_prompt_text": _flag,
    "chat_template": _nothing("it comes with the model"), "chat_template_kwargs": _template_variables,
    "media_io_kwargs": _TEXT_ONLY, "mm_processor_kwargs": _TEXT_ONLY,
}  # fmt: skip


def check(path: str, body: bytes, bounds: Bounds) -> Asked:
    """What this body asks for; Refused, naming the field, if a server with these bounds does not serve that."""
    data = _read(body)
    known = CHATTED if path == CHAT[1] else COMPLETION
    for name, value in data.items():
        if name not in known:
            raise Refused(name[:64], f"the field {name[:64]!r} is not known to this server; leave it out")
        if value is not None:
            try:
                known[name](value, bounds)
            except (ValueError, TypeError, OverflowError) as error:
                raise Refused(name, f"{name} {error}") from None
    count = int(_number(data.get("n") or 1)) * _prompts(data.get("prompt"))
    if count > bounds.sequences:
        raise Refused(
            "n", f"n times the prompts is {count}; at most {bounds.sequences} are taken at once, send them in several requests"
        )
    _check_logprobs(data, len(body), count, bounds)
    return Asked(
        count, tuple(_grammars(data)), _is_on(data, "stream") and not _is_on(data.get("stream_options") or {}, "include_usage")
    )


def counted(body: bytes) -> bytes:
    """The body of a stream, which now asks for its tokens; of a name that stands twice JSON's readers take the second."""
    return body.rstrip()[:-1] + b',"stream_options":{"include_usage":true}}'


def _read(body: bytes) -> dict[str, Any]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            raise ValueError("a name stands twice in one object")
        return made

    def constant(name: str) -> float:
        raise ValueError(f"{name} is no number of JSON")

    try:
        text = body.decode()
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        if SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeError:
        raise Refused("", "the body is not UTF-8 text; send JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Refused("", f"the body is no JSON that can be read ({str(error)[:200]})") from None
    if not isinstance(data, dict):
        raise Refused("", "the body should be a JSON object")
    for name, value in data.items():
        _plain(name, value)
    return data


def _plain(name: str, value: Any) -> None:
    """Refused if a field is nested too deeply, has too many values, or numbers that are none for an engine."""
    level, seen = [value], 0
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):  # of token ids there may be many; they are looked at one by one elsewhere
                below += one if name != "prompt" else [each for each in one if type(each) in NESTED]
            elif isinstance(one, float) and not math.isfinite(one):
                raise Refused(name[:64], f"{name[:64]} has a number that is too large")
            elif isinstance(one, int) and not -INT64 <= one < 2 * INT64:
                raise Refused(name[:64], f"{name[:64]} has a whole number of more than 64 bits")
        seen += len(below)
        if seen > VALUES:
            raise Refused(name[:64], f"{name[:64]} has more than {VALUES} values; make it smaller")
        if not below:
            return
        level = below
    raise Refused(name[:64], f"{name[:64]} is nested more than {DEEPEST} levels deep; make it flatter")


def _prompts(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else 1


def _check_logprobs(data: dict[str, Any], size: int, count: int, bounds: Bounds) -> None:
    """Refused if the log-probabilities of an answer could be more than LOGPROBS."""

    def number(name: str, missing: int) -> int:
        return missing if (value := data.get(name)) is None else int(_number(value))

    longest, chat = bounds.max_model_len, "messages" in data
    wanted = max(number("top_logprobs", 0) if chat else number("logprobs", 0), len(data.get("logprob_token_ids") or ()))
    sampled = 1 + wanted if (_is_on(data, "logprobs") if chat else data.get("logprobs") is not None) else 0
    of_prompt = 1 + number("prompt_logprobs", 0) if data.get("prompt_logprobs") is not None else 0
    if sampled and _is_on(data, "echo"):
        of_prompt = max(of_prompt, sampled)
    answer = number("max_completion_tokens", number("max_tokens", longest if chat else 16))
    asked = count * sampled * (0 if _is_on(data, "stream") else min(longest, answer)) + of_prompt * min(count * longest, size)
    if asked > LOGPROBS:
        raise Refused(
            "prompt_logprobs" if of_prompt else "top_logprobs" if chat else "logprobs",
            f"this could answer with {asked} log-probabilities; at most {LOGPROBS} are given at once: set max_tokens, ask for fewer, or stream",
        )


def _grammars(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The constraints that vLLM would make a grammar of: of several it takes one."""
    given, form = data.get("structured_outputs") or {}, data.get("response_format") or {}
    for kind in GRAMMAR_BYTES:
        if given.get(kind) is not None:
            yield kind, given[kind] if isinstance(given[kind], str) else json.dumps(given[kind])
    if form.get("type") == "json_schema" and isinstance(form.get("json_schema"), dict):
        yield "json", json.dumps(form["json_schema"].get("schema"))
    if form.get("type") == "structural_tag":
        yield "structural_tag", json.dumps(form)
    tools, choice = data.get("tools"), data.get("tool_choice")
    if tools and choice != "none":
        free = choice in (None, "auto")
        if not free or any(_is_strict(tool) for tool in tools):
            yield STRICT_TOOLS if free else "tools", json.dumps(tools)


def _is_strict(tool: dict[str, Any]) -> bool:
    function = tool.get("function")
    return isinstance(function, dict) and function.get("strict") not in (None, False)
