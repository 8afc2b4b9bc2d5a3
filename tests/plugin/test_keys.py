"""Keys as hashes: their file, how hard a key is to guess, and the guard that reads them again, counts, and holds a key to its limits."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import string
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mistral_contract import keys
from mistral_contract.keys import Key, Keys
from mistral_node import callers, gate, limits, serve
from mistral_node.callers import LOOK_SECONDS, Callers
from mistral_node.contract import LaunchError
from mistral_node.guard import WATCH_SECONDS, Guard
from mistral_node.limits import Account, Meter, Window
from mistral_node.traffic import Traffic
from nodes import KEY, known, write_keys
from test_guard import ask
from vllm_mistral import inspection

OTHER = "mctl-" + "fedcba9876543210" * 3
ASK = ("POST", "/v1/completions")


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {key}".encode()


def test_keys_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = keys.make(
        KEY, "ci", 5.5, expires=9.0, requests_at_once=1, requests_per_minute=2, tokens_per_minute=3, tokens_per_day=4
    )
    found = Keys(7, (made, keys.make(OTHER, "other", 6)))
    assert keys.read(found.dump()) == found
    keys.write(tmp_path / "keys" / "keys.json", found)
    assert keys.read((tmp_path / "keys" / "keys.json").read_text()) == found
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["keys.json"]
    assert KEY not in found.dump()
    assert (made.sha256, made.id) == (keys.digest(KEY), keys.digest(KEY)[:12])
    assert found.changed([made]).keys == (made,)
    assert found.changed([]).serial >= int(time.time()) - 1
    assert replace(found, serial=10**11).changed([]).serial == 10**11 + 1


ONE = {"id": "a", "name": "a", "sha256": "0" * 64, "created": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no JSON"), ("[" * 5000, "is no JSON"), ("[]", "should be an object with version, serial and keys"),
        ('{"version": 1, "serial": 1}', "should be an object with"),
        ('{"version": 2, "serial": 1, "keys": []}', "version 2 is not known here, only 1"),
        ('{"version": 1, "serial": true, "keys": []}', "serial should be a whole number"),
        ('{"version": 1, "serial": 1, "keys": {}}', "keys should be a list"),
        (json.dumps({"version": 1, "serial": 1, "keys": [{}] * 201}), "keys should be a list of at most 200"),
        (" " * 100_001, "should have at most 100000 characters"),
        ({"id": "A"}, r"keys\[0\]: id should match"), ({"id": ...}, r"keys\[0\]: id is missing"), ({"name": "a b"}, "name should match"),
        ({"sha256": "0" * 63}, "sha256 should match"), ({"sha256": "A" * 64}, "sha256 should match"), ({"created": "1"}, "created should be"),
        ({"created": -1}, "created should be"), ({"created": math.nan}, "created should be"), ({"created": None}, "created should be"),
        ({"expires": True}, "expires should be"), ({"tokens_per_day": 0}, "tokens_per_day should be a whole number from 1"),
        ({"requests_at_once": 1.5}, "requests_at_once should be a whole number"), ({"limit": 1}, "unknown field 'limit'; known are id"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(text: str | dict[str, Any], problem: str) -> None:
    if isinstance(text, dict):
        one = {name: value for name, value in (ONE | text).items() if value is not ...}
        text = json.dumps({"version": 1, "serial": 1, "keys": [one]})
    with pytest.raises(ValueError, match=problem) as caught:
        keys.read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["id", "sha256"])
def test_two_of_a_kind_are_refused(field: str) -> None:
    other = {"id": "b", "name": "b", "sha256": "1" * 64, "created": 1, field: ONE[field]}
    with pytest.raises(ValueError, match=f"{field} {ONE[field]} stands twice"):
        keys.read(json.dumps({"version": 1, "serial": 1, "keys": [ONE, other]}))


@pytest.mark.parametrize(
    ("secret", "bits"),
    [
        ("0123456789abcdef" * 2, 128), ("sk-" + "0123456789abcdef" * 2, 128), ("0123456789ABCDEF" * 2, 128), ("0123456789" * 4, 132),
        ("0123456789" * 3, 99), ("00112233-4455-6677-8899-aabbccddeeff", 128), ("0123456789abcde" * 2, 120), (string.ascii_lowercase, 122),
        ("Tr0ub4dor&3", 71), ("", 0),
    ],
)  # fmt: skip
def test_how_hard_a_key_is_to_guess_by_length_and_alphabet(secret: str, bits: int) -> None:
    assert keys.bits(secret) == bits
    if bits >= 128:
        assert keys.check_secret(secret) == secret
    else:
        with pytest.raises(ValueError, match=r"bits by its length|one word of visible"):
            keys.check_secret(secret)


@pytest.mark.parametrize("secret", ["x" * 60, "ab" * 40, "a" * 257, "é" * 40, "with a space " * 5, "line\nbreak" * 8])
def test_a_key_that_is_one_letter_too_long_or_no_word_is_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(ValueError, match="make one with: openssl rand -hex 32") as caught:
        keys.check_secret(secret)
    assert secret not in str(caught.value)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = write_keys(tmp_path)
    Traffic(folder, fresh=True).open()
    return folder


class Answering:
    """The application behind the guard: answers with what it is given, in pieces, each after the event of its number is set."""

    def __init__(self, *pieces: bytes, status: int = 200) -> None:
        self.pieces, self.status = pieces, status
        self.wait: asyncio.Event | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.wait is not None:
            await self.wait.wait()
        await send({"type": "http.response.body", "body": b""})


def usage(prompt: int, answer: int) -> bytes:
    """As vLLM writes it."""
    return json.dumps(
        {"id": "x", "choices": [{"text": 'a "usage": {"total_tokens": 9}'}], "usage":
         {"prompt_tokens": prompt, "total_tokens": prompt + answer, "completion_tokens": answer, "prompt_tokens_details": None}}
    ).encode()  # fmt: skip


def event(text: str, total: int | None = None) -> bytes:
    data = {"choices": [{"text": text}]} | ({"usage": {"prompt_tokens": 1, "total_tokens": total}} if total else {})
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def test_a_changed_file_is_in_force_without_a_restart_and_a_damaged_one_changes_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    guard, file = Guard(Answering(), run_dir), run_dir.parent / "keys" / "keys.json"

    def statuses() -> tuple[int, int]:
        time.sleep(callers.LOOK_SECONDS + 0.05)
        return ask(guard, *ASK, bearer(KEY))[0], ask(guard, *ASK, bearer(OTHER))[0]

    assert statuses() == (200, 401)
    both = known().changed([*known().keys, keys.make(OTHER, "other", 1)])
    keys.write(file, both)
    assert statuses() == (200, 200)
    for damaged in ('{"version": 1', "", "[]"):
        file.write_text(damaged)
        assert statuses() == (200, 200)
    file.unlink()
    assert statuses() == (200, 200)
    said = capfd.readouterr().err
    assert said.count("the keys before it stay\n") == 4  # once for each change, not for each request
    assert "No such file" in said
    keys.write(file, both.changed(both.keys[1:]))
    assert statuses() == (401, 200)
    keys.write(file, both.changed([replace(both.keys[1], expires=time.time() - 1)]))
    assert statuses() == (401, 401)
    assert ask(guard, *ASK, bearer(OTHER))[1]["error"]["message"] == "the API key has expired"


def test_an_idle_server_takes_up_keys_and_says_so_within_a_second(run_dir: Path) -> None:
    assert WATCH_SECONDS + LOOK_SECONDS < 1  # on a machine that has nothing else to do
    guard = Guard(Answering(), run_dir)

    async def lifespan(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await asyncio.sleep(0.2)
        keys.write(run_dir.parent / "keys" / "keys.json", known(serial=4711))
        began = time.monotonic()
        while json.loads((run_dir / "usage.json").read_text())["serial"] != 4711:
            assert time.monotonic() - began < 60
            await asyncio.sleep(0.02)

    async def nothing(message: Any) -> None:
        pass

    guard.app = lifespan
    asyncio.run(guard({"type": "lifespan"}, None, nothing))  # type: ignore[arg-type]


def test_what_is_shown_is_looked_up_by_its_hash_alone(run_dir: Path) -> None:
    """Nothing of a key is kept that a comparison could be timed against."""
    found = Callers(run_dir.parent / "keys" / "keys.json", run_dir / "usage.json")
    assert found.find(KEY.encode()) == known().keys[0]
    for token in (b"", KEY.encode()[:-1], keys.digest(KEY).encode(), bytes.fromhex(keys.digest(KEY)), b"x" * (1 << 20)):
        assert found.find(token) is None
    assert KEY not in repr(vars(found))


def limited(run_dir: Path, app: Any, **given: int) -> Guard:
    write_keys(run_dir.parent, known(**given))
    return Guard(app, run_dir)


def test_requests_a_minute(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_800_000_000.0]
    monkeypatch.setattr("mistral_node.guard.time.time", lambda: now[0])
    guard = limited(run_dir, Answering(usage(1, 1)), requests_per_minute=3)
    assert [ask(guard, *ASK, bearer(KEY))[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask(guard, "GET", "/v1/models", bearer(KEY))[0] == 200  # no work
    now[0] += 59
    assert ask(guard, *ASK, bearer(KEY))[0] == 429
    now[0] += 2
    assert [ask(guard, *ASK, bearer(KEY))[0] for _ in range(4)] == [200, 200, 200, 429]
    account = guard.callers.accounts[known().keys[0].id]
    assert (account.requests, account.tokens, account.refused) == (6, 12, 4)


def test_a_refusal_has_openais_form_and_says_when_to_come_back(run_dir: Path) -> None:
    guard = limited(run_dir, Answering(), requests_per_minute=1)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [bearer(KEY)], "client": ("127.0.0.1", 1)}
    for _ in range(2):
        sent.clear()
        asyncio.run(guard(dict(scope), receive, send))
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 429
    assert 1 <= int(headers[b"retry-after"]) <= 61
    wait = headers[b"retry-after"].decode()
    assert json.loads(sent[1]["body"]) == {"error": {
        "message": f"the key test has reached its limit requests_per_minute of 1; try again in {wait} s", "type": "rate_limit_exceeded",
        "param": "requests_per_minute", "code": 429,
    }}  # fmt: skip


def test_requests_at_once(run_dir: Path) -> None:
    app = Answering(usage(1, 1))
    guard = limited(run_dir, app, requests_at_once=2)
    statuses: list[int] = []

    async def one() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await guard({"type": "http", "method": "POST", "path": ASK[1], "headers": [bearer(KEY)], "client": None}, receive, send)

    async def three() -> None:
        app.wait = asyncio.Event()
        running = [asyncio.create_task(one()) for _ in range(2)]
        await asyncio.sleep(0.05)
        await one()
        assert statuses == [200, 200, 429]
        app.wait.set()
        await asyncio.gather(*running)
        await one()
        assert statuses == [200, 200, 429, 200]

    asyncio.run(three())
    assert guard.callers.accounts[known().keys[0].id].running == 0


@pytest.mark.parametrize(("name", "seconds"), [("tokens_per_minute", 60), ("tokens_per_day", 86400)])
def test_tokens_by_what_vllm_says(name: str, seconds: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_800_000_000.0]
    monkeypatch.setattr("mistral_node.guard.time.time", lambda: now[0])
    guard = limited(run_dir, Answering(usage(6, 4)), **{name: 15})
    assert [ask(guard, *ASK, bearer(KEY))[0] for _ in range(3)] == [200, 200, 429]  # 10 are less than 15, 20 are not
    assert ask(guard, *ASK, bearer(KEY))[1]["error"]["param"] == name
    now[0] += seconds * 62 / 60
    assert ask(guard, *ASK, bearer(KEY))[0] == 200


@pytest.mark.parametrize(
    ("pieces", "status", "tokens"),
    [
        ([usage(6, 4)], 200, 10), ([usage(6, 4)[:40], usage(6, 4)[40:]], 200, 10), ([bytes([one]) for one in usage(6, 4)], 200, 10),
        ([event("a"), event("b"), b"data: [DONE]\n\n"], 200, 2 + 25),
        ([event("a"), event("b"), event("", total=33), b"data: [DONE]\n\n"], 200, 33),
        ([event("a", total=31), event("b", total=32)], 200, 32), ([event("a") + event("b")], 200, 2 + 25),
        ([b'{"error": {"message": "no"}}'], 400, 0), ([], 200, 0),
    ],
)  # fmt: skip
def test_tokens_of_answers_and_streams(pieces: list[bytes], status: int, tokens: int) -> None:
    meter = Meter()
    meter.received, meter.status = 100, status
    for piece in pieces:
        meter.feed(piece)
    assert meter.tokens == tokens


def test_the_client_sees_what_the_application_sent(run_dir: Path) -> None:
    pieces = [event("a"), event("b"), b"data: [DONE]\n\n"]
    seen: list[bytes] = []
    guard = Guard(Answering(*pieces), run_dir)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        seen.append(message.get("body", b""))

    asyncio.run(
        guard({"type": "http", "method": "POST", "path": ASK[1], "headers": [bearer(KEY)], "client": None}, receive, send)
    )
    assert seen == [b"", *pieces, b""]


LAST = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":1,"total_tokens":41,"completion_tokens":40}}\n\n'


@pytest.mark.parametrize(
    ("body", "reaches_vllm", "shown"),
    [
        ({"prompt": "a", "stream": True}, '{"prompt": "a", "stream": true,"stream_options":{"include_usage":true}}', False),
        ({"stream_options": {"include_usage": False}, "stream": True},
         '{"stream_options": {"include_usage": false}, "stream": true,"stream_options":{"include_usage":true}}', False),
        ({"stream": True, "stream_options": {"include_usage": True}}, None, True),
        ({"stream": False}, None, True), ({}, None, True),
    ],
)  # fmt: skip
def test_a_stream_says_its_tokens_to_the_guard_alone(
    run_dir: Path, body: dict[str, Any], reaches_vllm: str | None, shown: bool
) -> None:
    got: list[bytes] = []
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (event('a "choices":[] {}'), LAST, b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        seen.append(message.get("body", b""))

    guard = Guard(app, run_dir)
    asyncio.run(
        guard({"type": "http", "method": "POST", "path": ASK[1], "headers": [bearer(KEY)], "client": None}, receive, send)
    )
    assert got == [(reaches_vllm or json.dumps(body)).encode()]
    assert json.loads(got[0]) == (json.loads(reaches_vllm) if reaches_vllm else body)
    assert (LAST in seen) is shown
    assert b"".join(seen).count(b"data: ") == 2 + shown
    assert guard.callers.accounts[known().keys[0].id].tokens == 41


def test_where_vllm_says_usage_to_everybody_the_guard_asks_for_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_VLLM_ARGS", '["--enable-force-include-usage"]')
    assert Guard(Answering(), run_dir)._asks_usage is False
    monkeypatch.delenv("MISTRALCTL_VLLM_ARGS")
    assert Guard(Answering(), run_dir)._asks_usage is True


def test_a_window_is_never_too_short_and_takes_no_memory() -> None:
    window, now = Window(60), 1_800_000_000.9
    window.add(now, 5)
    assert (window.total(now + 60), window.total(now + 61.2)) == (5, 0)
    window.add(now + 61.2, 3)
    assert window.total(now) == 3  # a clock that goes back forgets nothing
    assert window.total(now + 61.2) == 0  # and keeps nothing for ever
    window.add(now + 61.2, 3)
    assert 1 <= window.wait(now + 61.2, 3) <= 61
    window.add(now + 10**9, 1)
    assert window.total(now + 10**9) == 1
    assert len(window.dump()) == limits.SLOTS + 2


def test_counts_outlive_a_server_and_are_those_of_known_keys_only(run_dir: Path) -> None:
    guard = limited(run_dir, Answering(usage(6, 4)), tokens_per_day=15)
    assert [ask(guard, *ASK, bearer(KEY))[0] for _ in range(3)] == [200, 200, 429]
    guard.callers.save()
    counted = json.loads((run_dir / "usage.json").read_text())
    name = known().keys[0].id
    assert {field: counted["keys"][name][field] for field in ("requests", "tokens", "refused")} == {
        "requests": 2,
        "tokens": 20,
        "refused": 1,
    }
    assert ask(Guard(Answering(), run_dir), *ASK, bearer(KEY))[0] == 429  # the next server, on the same node
    write_keys(run_dir.parent, Keys(2, (keys.make(OTHER, "other", 1),)))
    assert Guard(Answering(), run_dir).callers.accounts == {}
    for damaged in (
        "",
        "[]",
        '{"keys": {"x": 1}}',
        json.dumps({"keys": {name: {"requests": 1, "tokens": 1, "refused": 1, "day": [1]}}}),
    ):
        (run_dir / "usage.json").write_text(damaged)
        write_keys(run_dir.parent)
        assert Guard(Answering(), run_dir).callers.accounts == {}


@pytest.mark.parametrize("newest", [10**9, 10**18, 10**39])
def test_what_was_counted_in_the_future_holds_nobody_for_ever(run_dir: Path, newest: int) -> None:
    """The clock was set back, or vLLM's user wrote the file."""
    name, day = known().keys[0].id, [newest, *[5] * (limits.SLOTS + 1)]
    account = {"requests": 1, "tokens": 1, "refused": 0, "day": day}
    (run_dir / "usage.json").write_text(json.dumps({"keys": {name: account}, "refused": {}}))
    counted = Guard(Answering(), run_dir).callers.accounts[name]
    key = keys.make(KEY, "one", 1, tokens_per_day=10)
    assert counted.held(key, time.time()) is not None
    assert counted.held(key, time.time() + 2 * limits.DAY) is None


@pytest.mark.parametrize("how", ["pipe", "deep", "infinite", "huge"])
def test_counts_that_others_wrote_never_hold_a_start(run_dir: Path, how: str) -> None:
    path = run_dir / "usage.json"
    if how == "pipe":
        os.mkfifo(path)
    else:
        texts = {
            "deep": "[" * 100_000,
            "infinite": '{"keys": {}, "refused": {"a": 1e999}}',
            "huge": '{"keys": "' + "x" * (5 << 20) + '"}',
        }
        path.write_text(texts[how])
    assert Guard(Answering(), run_dir).callers.accounts == {}
    assert serve._usage_kept(run_dir) == "" or how in ("deep", "infinite")


@pytest.mark.parametrize("how", ["pipe", "deep"])
@pytest.mark.parametrize("name", ["engine.json", "routes.json"])
def test_what_vllm_writes_never_holds_its_launcher(tmp_path: Path, name: str, how: str) -> None:
    if how == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text("[" * 100_000)
    assert inspection.read(tmp_path) is None
    with pytest.raises(LaunchError, match="did not say which routes it has"):
        gate._walk(None, tmp_path / "routes.json")  # type: ignore[arg-type]


def test_strangers_cost_no_memory(run_dir: Path) -> None:
    guard = Guard(Answering(), run_dir)
    for number in range(300):
        assert ask(guard, *ASK, bearer(f"sk-{number}"))[0] == 401
    assert guard.callers.accounts == {}


def test_an_account_is_held_by_the_first_limit_that_it_breaks() -> None:
    account, now = Account(), 1_800_000_000.0
    key = Key("a", "a", "0" * 64, 0, requests_at_once=1, requests_per_minute=1, tokens_per_minute=1, tokens_per_day=1)
    assert account.held(key, now) is None
    account.begin(now)
    assert account.held(key, now) == ("requests_at_once", 1)
    account.end(now, 5)
    assert account.held(key, now) == ("requests_per_minute", 61)
    name, wait = account.held(replace(key, requests_per_minute=None, tokens_per_minute=None), now) or ("", 0)
    assert name == "tokens_per_day"
    assert 86400 - 1440 < wait <= 86400 + 1440
    assert re.fullmatch(r"[a-z_]+", name)
