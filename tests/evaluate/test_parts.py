"""The parts of an evaluation that need no model: journal, data, intervals, a server that is busy or gone."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mistral_evaluate import endpoint, journal, tokens
from mistral_evaluate.endpoint import Endpoint
from mistral_evaluate.errors import EvaluateError
from mistral_evaluate.job import Address, Job, read
from mistral_evaluate.results import wilson
from mistral_evaluate.suites import SUITES, TASKS
from mistral_node import tls


def test_answers_are_kept_for_the_model_that_gave_them(tmp_path: Path) -> None:
    request = {"prompt": [1, 2], "max_tokens": 1}
    with journal.opened(tmp_path / "j", {"weights": "a"}) as one:
        one.keep(one.key(request), {"logprobs": [-1.5], "greedy": False})
        with pytest.raises(EvaluateError, match="at work already"), journal.opened(tmp_path / "j", {}):
            pass
    with journal.opened(tmp_path / "j", {"weights": "a"}) as one:
        assert one.answer(one.key(request)) == {"logprobs": [-1.5], "greedy": False}
        assert not one.has(one.key(request, 1))
        assert not one.has(one.key(request | {"max_tokens": 2}))
    with journal.opened(tmp_path / "j", {"weights": "b"}) as other:
        assert not other.has(other.key(request))
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [b"", b"\x00\xff\n", b"[]\n", b'{"key": "a"}\n', b'{"key": "a", "answer": 1, "seal": "0"}\n'])
def test_a_damaged_line_is_no_answer_and_hides_no_other(damage: bytes, tmp_path: Path) -> None:
    with journal.opened(tmp_path / "j", {}) as one:
        one.keep("first", 1)
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(damage + whole + whole[:20])
    with journal.opened(tmp_path / "j", {}) as one:
        assert one.has("first")
        assert not one.has("a")
        one.keep("second", 2)
    with journal.opened(tmp_path / "j", {}) as one:
        assert (one.answer("first"), one.answer("second")) == (1, 2)


@pytest.mark.parametrize("name", SUITES["quick"])
def test_the_packages_carry_the_data(name: str) -> None:
    rows = list(TASKS[name].rows())
    assert len(rows) == 100
    assert len({json.dumps(row) for row in rows}) == 100


def test_a_context_of_hellaswag_is_split_where_its_last_sentence_begins() -> None:
    task = TASKS["hellaswag_100"]
    made = task.row({"ctx": "A boy runs. He falls. then he", "activity_label": "a", "endings": ["b"], "expected_index": 2})
    assert (made["ctx_a"], made["ctx_b"], made["label"]) == ("A boy runs. He falls.", "then he", "2")
    whole = task.row({"ctx": "How to run. Run fast.", "activity_label": "a", "endings": ["b"], "expected_index": 0})
    assert (whole["ctx_a"], whole["ctx_b"]) == ("How to run. Run fast.", "")


def test_intervals_of_shares() -> None:
    """Against the values of scipy.stats.binomtest(k, n).proportion_ci(method="wilson")."""
    from scipy.stats import binomtest

    for right, n in ((0, 100), (1, 8), (35, 100), (100, 100)):
        found = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((found.low, found.high), abs=1e-9)


def test_mistrals_own_tokenizer_puts_bos_before_a_text(tmp_path: Path) -> None:
    from checkpoints import mistral_tokenizer

    encoder = tokens.opened(mistral_tokenizer(tmp_path, "tokenizer.model.v1"), "mistral")
    assert encoder.encode("Hello") == [encoder.prefix, *encoder.encode("Hello", special=False)]
    assert encoder.prefix == 1


def test_a_job_is_read_as_it_was_written() -> None:
    job = Job(Address("http://127.0.0.1:1", "key", "m"), {"a": 1}, Path("/t"), "hf", 10, 2, ("x",), Path("/j"), 5)
    assert read(job.dump()) == job
    for text in ("", "[]", "{}", '{"address": {"key": 1}}'):
        with pytest.raises(EvaluateError, match="no job"):
            read(text)


class Busy(ThreadingHTTPServer):
    """A server that takes two requests at a time and refuses the others, which answers after a moment."""

    request_queue_size = 128  # connections that wait to be taken

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock, self.inside, self.answered, self.refused, self.fail = threading.Lock(), 0, 0, 0, 0


class _Handler(BaseHTTPRequestHandler):
    server: Busy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.fail -= 1
            broken, full = self.server.fail >= 0, self.server.inside >= 2
            self.server.inside += 0 if broken or full else 1
            self.server.refused += 1 if broken or full else 0
        if broken or full:
            return self._send(503 if broken else 429, {"error": {"message": "too many"}})
        threading.Event().wait(0.01)
        with self.server.lock:
            self.server.inside -= 1
            self.server.answered += 1
        return self._send(200, {"asked": body})

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if status == 429:
            self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def busy() -> Iterator[Busy]:
    with Busy() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_server_with_tls_is_known_by_its_own_certificate_and_for_its_name(busy: Busy, tmp_path: Path) -> None:
    key, certificate = tls.self_signed(["evaluated.example"])
    for name, text in (("tls.key", key), ("tls.crt", certificate), ("other.crt", tls.self_signed(["evaluated.example"])[1])):
        (tmp_path / name).write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    busy.socket = context.wrap_socket(busy.socket, server_side=True)
    url, found = f"https://127.0.0.1:{busy.server_address[1]}", list[Any]()
    for trusted, host in (("other.crt", "evaluated.example"), ("tls.crt", "other.example"), ("tls.crt", "")):
        with pytest.raises(EvaluateError, match=r"shows another certificate .* nothing was sent"):
            Endpoint(Address(url, "k", "m", str(tmp_path / trusted), host), 1).ask([{}], lambda number, answer: None)
    assert busy.answered == 0
    Endpoint(Address(url, "k", "m", str(tmp_path / "tls.crt"), "evaluated.example"), 2).ask(
        [{}], lambda number, answer: found.append(answer)
    )
    assert found == [{"asked": {"model": "m"}}]


def ask(server: Busy, count: int, most: int = 16) -> tuple[Endpoint, dict[int, Any]]:
    one, found = Endpoint(Address(f"http://127.0.0.1:{server.server_address[1]}", "k", "m"), most), dict[int, Any]()
    one.ask([{"prompt": [number]} for number in range(count)], lambda number, answer: found.update({number: answer}))
    return one, found


def test_a_busy_server_is_asked_less_at_a_time_and_gives_every_answer(busy: Busy) -> None:
    one, found = ask(busy, 200)
    assert {number: answer["asked"]["prompt"] for number, answer in found.items()} == {number: [number] for number in range(200)}
    assert (busy.answered, one.refused, one.sent) == (200, busy.refused, 200 + busy.refused)
    assert 0 < busy.refused < 200  # with 16 at a time all along there are far more
    assert one.limit < 8


def test_a_server_that_fails_for_a_moment_is_asked_again_and_one_that_is_gone_ends_it(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "PAUSES", (0, 0, 0))
    busy.fail = 3
    assert len(ask(busy, 1)[1]) == 1
    busy.fail = 4
    with pytest.raises(
        EvaluateError, match=r"does not answer \(too many\); when it is up again, the same command asks only the rest"
    ):
        ask(busy, 1)
    with pytest.raises(EvaluateError, match="does not answer"):
        Endpoint(Address("http://127.0.0.1:1", "k", "m"), 1).ask([{}], lambda number, answer: None)
