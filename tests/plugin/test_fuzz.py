"""More than two thousand hostile requests to a real guarded server, which lives on: schemathesis over its own OpenAPI description (that the
guard shows nobody: the test reads it from inside), every field with odd values, constraints, JSON that is none, held connections, headers, lengths
and bodies that are too large, too slow, or no HTTP at all."""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
import schemathesis
from checkpoints import mistral_tokenizer, write
from hostile import raw, request
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from mistral_contract import keys
from mistral_contract.routes import CHAT, COMPLETIONS
from mistral_node.bodies import CHATTED, COMPLETION
from mistral_node.guard import LARGEST_BODY, WITH_KEY
from nodes import KEY, Launcher, known, launched
from schemathesis import GenerationMode

SLOW_SECONDS = 6.0
# In the server's process: writes down what the application says of itself, and waits for slow clients less long than usual.
INSIDE = f"""
import json, os, pathlib
if "MISTRALCTL_NODE_KEY" in os.environ:
    from mistral_node import front, guard
    front.HEAD_SECONDS = guard.BODY_SECONDS = {SLOW_SECONDS}
    routes_of = guard.routes_of
    def described(app, prefix=""):
        if not prefix:
            pathlib.Path(os.environ["MISTRALCTL_RUN_DIR"], "openapi.json").write_text(json.dumps(app.openapi()))
        return routes_of(app, prefix)
    guard.routes_of = described
"""
NEEDED = {"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
SHORT = {"n": 1, "best_of": 1, "max_tokens": 1, "max_completion_tokens": 1}
EXAMPLES = {True: 150, False: 8}  # of each mode, for each served route and for each other one


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    node_dir = tmp_path_factory.mktemp("fuzz")
    shape = {"vocab_size": 32000, "hidden_size": 64, "sliding_window": 128, "max_position_embeddings": 4096}
    mistral_tokenizer(write(node_dir / "weights" / "tiny", **shape), "tokenizer.model.v1")
    (node_dir / "inside").mkdir()
    (node_dir / "inside" / "sitecustomize.py").write_text(INSIDE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(node_dir / "inside"))
        with launched(node_dir, MAX_MODEL_LEN="256") as launcher:
            launcher.until("ready")
            yield launcher


@pytest.fixture
def tally(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Counter[Any]]:
    """Counts what came back; printed at the end of the test."""
    counts: Counter[Any] = Counter()
    yield counts
    with capsys.disabled():
        sys.stdout.write(f"\n{request.node.name}: {sum(counts.values())} requests: {dict(sorted(counts.items(), key=str))}\n")


def cases(operation: Any, mode: GenerationMode, count: int) -> list[Any]:
    """So many requests for an operation, made from its description (or made so that they break it)."""
    found: list[Any] = []

    @settings(max_examples=count, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        found.append(case)

    with suppress(Unsatisfiable):  # what takes nothing cannot be asked wrongly
        collect()
    return found


def lives(served: Launcher) -> None:
    """The server answers as before, and nothing of it has been started anew."""
    answer = served.json("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2})
    assert answer["usage"]["completion_tokens"] >= 1
    assert served.ask("/health", key=None)[0] == 200
    assert served.process.poll() is None
    assert served.status()["state"] == "ready"
    assert all(child.is_running() for child in served.children)


def test_schemathesis_over_the_applications_own_description(served: Launcher, tally: Counter[Any]) -> None:
    description = json.loads((served.run_dir / "shared" / "openapi.json").read_text())
    schema = schemathesis.openapi.from_dict(description)
    noise = random.Random(7)  # noqa: S311 - the same requests every time
    walked = set()
    alone = httpx.Limits(max_keepalive_connections=0)  # after a 500 of its application uvicorn hangs up
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300, limits=alone) as client:
        for found in schema.get_all_operations():
            operation = found.ok()
            route = (operation.method.upper(), operation.path)
            walked.add(route)
            inside = route in WITH_KEY
            for case in [case for mode in GenerationMode for case in cases(operation, mode, EXAMPLES[inside])]:
                body = case.body if isinstance(case.body, dict | list) else {}
                if inside and isinstance(body, dict):  # so that some are answered: what the model needs, and short
                    body |= noise.choice([NEEDED, {}]) | SHORT
                path = route[1].replace("{", "").replace("}", "")
                answer = client.request(route[0], path, content=json.dumps(body), headers={"Content-Type": "application/json"})
                tally["served route" if inside else "other route", answer.status_code] += 1
                assert inside or route == ("GET", "/health") or answer.status_code == 404, route
    assert walked >= WITH_KEY
    assert len(walked) > 20
    assert not [code for _, code in tally if code >= 500]
    lives(served)


# Values that fields of one kind or the other take, at their bounds and beyond.
ODD = [None, True, 0, -1, 1.5, 7, 1 << 31, -(1 << 63), 10**30, 1e308, "", "a", "9" * 40, "\x00", "\U0001f600",
       [], [0], ["a"], [[]], [None], {}, {"a": 1},
       {"type": "object"}, {"1": 1}]  # fmt: skip
BROKEN = [b"", b"{", b"[]", b"7", b"\xff{}", b'{"prompt": NaN}', b'{"n": 1e400}', b'{"n": ' + b"9" * 5000 + b"}", b'{"n": 1, "n": 2}', b"[" * 100_000,
          b'{"a":' * 50_000, b'{"prompt": "\\ud800"}', b'{"prompt": [' + b"[]," * 60_000 + b"[]]}", b'{"metadata": [' + b"{}," * 60_000 + b"{}]}",
          b'{"prompt": [' + b"1," * 100_000 + b"1]}", '{"prompt": "a"}'.encode("utf-16"), b'{"\\ud800": 1}', b'{"messages": [' * 60]  # fmt: skip
CONSTRAINTS = [{"regex": "("}, {"regex": "(a{1000}){1000}"}, {"regex": "((.{1,99}){1,99}){1,99}"},
               {"regex": "(?=a)b"}, {"choice": [""]}, {"choice": []},
               {"grammar": "root ::= root"}, {"grammar": "x"}, {"json": "{"}, {"json": {"$ref": "#"}},
               {"json": {"$ref": "#/x"}}, {"json": {"type": 5}},
               {"json": {"type": "array", "minItems": 10**9}}, {"json": {"type": "string", "maxLength": 10**9}}, {"json": {"enum": []}},
               {"structural_tag": "{}"},
               {"json": {"type": "integer", "multipleOf": 99_999_989}}, {"json": {"type": "array", "uniqueItems": True}},
               {"json": {"type": "string", "format": "email", "maxLength": 9}}, {"grammar": 'start: %json {"multipleOf": 99999989}'},
               {"json": {"type": "object", "properties": {"a": {}}, "patternProperties": {"^(.{1,99}){1,99}$": {}}}},
               {"json": {"allOf": [{"type": "string"}, {"pattern": "(.{1,99}){1,99}"}]}},
               {"json": {"type": "object", "properties": {f"a{n}": {"type": "string", "maxLength": 99} for n in range(100)}}}]  # fmt: skip


def test_every_field_with_odd_values_and_bodies_that_are_no_json(served: Launcher, tally: Counter[Any]) -> None:
    noise = random.Random(7)  # noqa: S311 - the same requests every time
    asked: list[tuple[str, bytes]] = [(path, body) for path in (COMPLETIONS[1], CHAT[1]) for body in BROKEN]
    for path, fields in ((COMPLETIONS[1], COMPLETION), (CHAT[1], CHATTED)):
        needed = {"model": "tiny", "max_tokens": 1} | {
            name: NEEDED[name] for name in ("messages" if path == CHAT[1] else "prompt",)
        }
        odd = [(name, value) for name in fields for value in noise.sample(ODD, 3)]
        odd += [("structured_outputs", value) for value in CONSTRAINTS] + [(word, 1) for word in ("x", "", "__class__", "é")]
        asked += [(path, json.dumps(needed | {name: value}).encode()) for name, value in odd]
        asked += [
            (path, json.dumps(needed | {name: noise.choice(ODD) for name in noise.sample(sorted(fields), 4)}).encode())
            for _ in range(100)
        ]
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=300) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: client.post(one[0], content=one[1]), asked))
    tally.update(answer.status_code for answer in answers)
    wrong = [
        (body[:300], answer.text[:300])
        for (_, body), answer in zip(asked, answers, strict=True)
        if answer.status_code not in (200, 400, 404, 429)
    ]
    assert wrong == []
    assert {"message", "type", "code"} <= set(answers[0].json()["error"])
    lives(served)


def test_held_connections_and_streams_that_nobody_reads_hold_nobody_up(served: Launcher, tally: Counter[Any]) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    ended = request("POST", COMPLETIONS[1], b"Content-Length: 2", body=b"{}", key="wrong")
    asked = json.dumps({"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 20}).encode()
    stream = request("POST", COMPLETIONS[1], b"Content-Type: application/json", b"Content-Length: %d" % len(asked), body=asked)
    with ExitStack() as held:
        for first in [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n", ended + b"P", request("GET", "/health") + b"\r\n", stream] * 8:
            wire = held.enter_context(socket.create_connection((host, int(port)), 300))
            with suppress(OSError):
                wire.sendall(first)
            tally["held"] += 1
        lives(served)
        deadline = time.monotonic() + 300
        while served.status()["requests"]["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    lives(served)


def test_hostile_headers_lengths_and_paths(served: Launcher, tally: Counter[Any]) -> None:
    noise = random.Random(7)  # noqa: S311 - the same requests every time
    junk = lambda n: bytes(noise.randrange(1, 256) for _ in range(n))  # noqa: E731
    word = lambda: noise.choice([b"\x00", b"\r", b"\n", b"\r\n ", b"\xff", b"%00", b"../", b"A" * 9000, junk(20)])  # noqa: E731
    methods = ["GET", "POST", "OPTIONS", "HEAD", "TRACE", "CONNECT", "PRI", "get", "G\tET", "M" * 300]
    paths = ["/v1/models", "/metrics", "//metrics", "/./metrics", "/v1/../metrics", "/%2e%2e/metrics", "/health/../metrics", "*",
             "http://x/metrics", "/\xff", "/v1/models?" + "q" * 60000, "/metrics#", "/metrics%00", "\\metrics"]  # fmt: skip
    made = []
    for _ in range(400):
        kind = noise.randrange(6)
        path = noise.choice(paths)
        if kind == 0:
            made.append(request(noise.choice(methods), path, b"X: " + word()))
        elif kind == 1:
            made.append(
                request(
                    "POST",
                    "/v1/completions",
                    b"Content-Length: " + noise.choice([b"-1", b"1e9", b"0x10", b"9" * 400, b"1,2", b" "]),
                )
            )
        elif kind == 2:
            made.append(
                request("POST", "/v1/completions", b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")
            )
        elif kind == 3:
            made.append(
                request(
                    "POST",
                    "/v1/completions",
                    b"Transfer-Encoding: chunked",
                    body=noise.choice([b"zz\r\n", b"-5\r\n", b"F" * 40, junk(50)]),
                )
            )
        elif kind == 4:
            made.append(
                request("GET", path, *(b"H%d: %s" % (n, b"v" * noise.randrange(2000)) for n in range(noise.randrange(200))))
            )
        else:
            made.append(junk(noise.randrange(1, 3000)))
    stolen = [
        request("GET", path, key=key) for path in paths for key in ("", "x", KEY + "x", "é", keys.digest(KEY), known().dump())
    ]
    with ThreadPoolExecutor(16) as pool:
        for answer in pool.map(lambda data: raw(served.url, [data + b"\r\n\r\n"]), made):
            tally[answer] += 1
        strangers = list(pool.map(lambda data: raw(served.url, [data]), stolen))
    tally.update(strangers)
    assert set(strangers) <= {400, 401, 414, 431}
    assert not [code for code in tally if isinstance(code, int) and code >= 500]
    lives(served)


def memory(served: Launcher) -> int:
    return sum(child.memory_info().rss for child in served.children if child.is_running())


def test_huge_and_slow_requests_are_cut_off(served: Launcher, tally: Counter[Any]) -> None:
    before = memory(served)
    endless = [b"GET /health HTTP/1.1\r\nHost: x\r\n"] + [b"X-%d: " % n + b"v" * 60000 + b"\r\n" for n in range(300)]
    one_header = [b"GET /health HTTP/1.1\r\nX: ", *[b"v" * 65536] * 300]
    head = request("POST", "/v1/completions", b"Transfer-Encoding: chunked")
    piece = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
    trailers = [head + b"0\r\n", *[b"T: " + b"v" * 60000 + b"\r\n"] * 300]
    assert raw(served.url, endless) in ("closed", 431)
    assert raw(served.url, one_header) in ("closed", 431)
    assert raw(served.url, trailers) in ("closed", 400, 413, 431)
    assert raw(served.url, [head, *[piece] * (LARGEST_BODY // (1 << 20) + 4)]) in ("closed", 413)
    assert raw(served.url, [request("POST", "/v1/completions", b"Content-Length: %d" % (LARGEST_BODY + 1))]) == 413
    assert memory(served) - before < 300 << 20

    slow_heads = [[b"GET /health HTTP/1.1\r\nHost: x\r\n", b"X: "] + [b"v"] * 30] * 20
    slow_bodies = [[request("POST", "/v1/completions", b"Content-Length: 1000"), *[b"x"] * 30]] * 20
    kept: list[int] = []

    def ask() -> None:
        while len(kept) < 20:
            kept.append(served.ask("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})[0])

    others = threading.Thread(target=ask)
    others.start()
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda pieces: raw(served.url, pieces, pause=0.3), [*slow_heads, *slow_bodies]))
    others.join(300)
    tally.update(answers)
    assert set(answers[:20]) == {"closed"}
    assert set(answers[20:]) <= {408, "closed"}
    assert 408 in answers
    assert kept == [200] * 20  # slow ones hold nobody up
    lives(served)


def test_strangers_left_no_account_and_the_key_is_in_no_file(served: Launcher) -> None:
    counted = served.usage()
    assert list(counted["keys"]) == [known().keys[0].id]
    assert counted["keys"][known().keys[0].id]["requests"] > 100
    holders = [path for path in [served.log, *served.run_dir.rglob("*")] if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holders == []
