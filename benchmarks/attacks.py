"""What strangers without a key can do to a server, before a change and after it, as a table in Markdown.

Each attack runs from a process of its own against the loopback, with bounds on connections, bytes, seconds and open files. While it goes on, a
good client asks with its key over new connections; what counts is the longest that one of its requests takes, with all its new attempts.
The server is uvicorn with guard and protocol as vLLM starts them, before an application that answers at once; it may open 2,048 files.

    python benchmarks/attacks.py [--before REVISION] [--only NAME] [-o FILE]      # in the node's environment: make bench

`--before` runs the same against the guard of a revision of this repository, in a worktree that is removed afterwards.

An attack is a function of `Target` and seconds that returns the bytes that the server took, and a row of ATTACKS.
"""

from __future__ import annotations

import argparse
import http.client
import os
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key-of-this-benchmark-0123456789abcdef"
SERVERS_FILES, ATTACKERS_FILES, ATTACKERS_MEMORY = 2048, 6000, 4 << 30
CONNECTIONS = 4000  # more than the server may have files
SECONDS = 10.0  # that an attack goes on
PATIENCE = 20.0  # that the good client tries, before its time counts as more
START_SECONDS = 60.0
THREADS = 8  # of an attacker
MOST_BYTES = 2 << 30
BAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """Where the server is."""

    port: int
    tls: bool = False

    def connect(self, seconds: float = 5.0) -> socket.socket:
        """A new TCP connection, without TLS on it."""
        return socket.create_connection(("127.0.0.1", self.port), seconds)


@dataclass(frozen=True)
class Attack:
    """One row: its name, what it does, and how."""

    name: str
    what: str
    run: Callable[[Target, float], int]
    tls: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an attack came to. `answered` is None where a good client was not answered in PATIENCE seconds."""

    held: int
    taken: int
    logged: int
    answered: float | None

    def cells(self) -> list[str]:
        """For the table."""
        waited = f"> {PATIENCE:.0f} s" if self.answered is None else f"{self.answered:.2f} s"
        return [f"{self.held:,}", size(self.taken), size(self.logged), waited]


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


# Attacks


def _hold(target: Target, seconds: float, first: bytes, then: bytes, again: bytes = b"") -> int:
    """Opens connections as fast as it can, says something on each, after the answer something more, and keeps them all."""
    end = time.monotonic() + seconds

    def some(_: int) -> int:
        wires, taken = [], 0
        while time.monotonic() < end and len(wires) < CONNECTIONS // THREADS:
            with suppress(OSError):
                wire = target.connect(1.0)
                wires.append(wire)
                wire.sendall(first)
                taken += len(first)
                if then:
                    wire.recv(4096)
                    wire.sendall(then)
                    taken += len(then)
        while time.monotonic() < end:
            for wire in wires if again else ():
                with suppress(OSError):
                    taken += wire.send(again)
            time.sleep(0.5)
        return taken

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(some, range(THREADS)))


def _pour(target: Target, seconds: float, first: bytes, piece: bytes) -> int:
    """Sends on one connection what nobody wants, as long as the server takes it."""
    taken, end = 0, time.monotonic() + seconds
    with suppress(OSError), target.connect(2.0) as wire:
        wire.sendall(first)
        while time.monotonic() < end and taken < MOST_BYTES:
            taken += wire.send(piece)
    time.sleep(max(0.0, end - time.monotonic()))
    return taken


def _flood(target: Target, seconds: float, said: bytes) -> int:
    """Asks the same over new connections, several at a time, as fast as the server answers."""

    def one(_: int) -> int:
        taken, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(OSError), target.connect() as wire:
                wire.sendall(said)
                taken += len(said)
                while wire.recv(65536) and len(said) < 2000:
                    break
        return taken

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(one, range(THREADS)))


def _keep_asking(target: Target, seconds: float, said: bytes) -> int:
    """Asks the same over connections that it keeps as long as the server does, several at a time."""

    def one(_: int) -> int:
        taken, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(OSError), target.connect() as wire:
                while time.monotonic() < end:
                    wire.sendall(said)
                    taken += len(said)
                    if not wire.recv(65536):
                        break
        return taken

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(one, range(THREADS)))


def one_byte(target: Target, seconds: float) -> int:
    return _hold(target, seconds, BAD + b"Content-Length: 2\r\n\r\n", b"x")


def half_a_chunk(target: Target, seconds: float) -> int:
    return _hold(target, seconds, BAD + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nab")


def line_ends(target: Target, seconds: float) -> int:
    return _hold(target, seconds, HEALTH, b"\r\n", b"\r\n")


def silence(target: Target, seconds: float) -> int:
    return _hold(target, seconds, b"", b"")


def slow_heads(target: Target, seconds: float) -> int:
    return _hold(target, seconds, b"GET /health HTTP/1.1\r\nX: ", b"", b"x")


def silence_with_tls(target: Target, seconds: float) -> int:
    return _hold(target, seconds, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"")


def refused_body(target: Target, seconds: float) -> int:
    return _pour(target, seconds, BAD + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536)


def refused_chunks(target: Target, seconds: float) -> int:
    return _pour(target, seconds, BAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n")


def body_of_a_health_check(target: Target, seconds: float) -> int:
    return _pour(target, seconds, HEALTH[:-2] + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536)


def requests_without_reading(target: Target, seconds: float) -> int:
    return _pour(target, seconds, b"", HEALTH * 1000)


def long_queries(target: Target, seconds: float) -> int:
    return _keep_asking(target, seconds, b"GET /v1/models?" + b"q" * 60000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")


def refusals(target: Target, seconds: float) -> int:
    return _keep_asking(target, seconds, BAD + b"Content-Length: 0\r\n\r\n")


def no_http(target: Target, seconds: float) -> int:
    return _flood(target, seconds, b"\x00\x01\x02 what?\r\n\r\n")


def websockets(target: Target, seconds: float) -> int:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: bWlzdHJhbGN0bC1wcm9iZQ==\r\n"
    return _flood(target, seconds, b"GET /" + b"w" * 7000 + b" HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")


def no_tls(target: Target, seconds: float) -> int:
    return _flood(target, seconds, HEALTH)


ATTACKS = [
    Attack("one-byte", "a refused request, then one byte of its body", one_byte),
    Attack("half-a-chunk", "a refused request, then half a chunk", half_a_chunk),
    Attack("line-ends", "`/health`, then an empty line now and then", line_ends),
    Attack("silence", "connections that say nothing", silence),
    Attack("slow-heads", "heads that come byte by byte", slow_heads),
    Attack("silence-tls", "TLS handshakes that do not go on", silence_with_tls, tls=True),
    Attack("refused-body", "the body of a refused request, without end", refused_body),
    Attack("refused-chunks", "the same in chunks", refused_chunks),
    Attack("health-body", "a body for `/health`, without end", body_of_a_health_check),
    Attack("without-reading", "requests whose answers are not read", requests_without_reading),
    Attack("long-queries", "refused paths of 60 kB", long_queries),
    Attack("refusals", "refused requests", refusals),
    Attack("no-http", "bytes that are no HTTP", no_http),
    Attack("websockets", "websockets", websockets),
    Attack("no-tls", "plain HTTP where TLS is spoken", no_tls, tls=True),
]


# The server


def serve(folder: Path, port: int) -> None:
    """In the server's process: uvicorn as vLLM starts it, before an application that answers at once."""
    import uvicorn
    from fastapi import FastAPI
    from mistral_contract import keys
    from mistral_node import front, tls
    from mistral_node.traffic import Traffic
    from starlette.responses import JSONResponse

    resource.setrlimit(resource.RLIMIT_NOFILE, (SERVERS_FILES, SERVERS_FILES))
    shared = folder / "shared"
    shared.mkdir()
    keys.write(folder / "keys" / "keys.json", keys.Keys(1, (keys.make(KEY, "benchmark", 1.0),)))
    Traffic(shared, fresh=True).open()
    app = FastAPI()
    app.add_api_route("/health", lambda: None)

    async def complete(request: Any) -> JSONResponse:
        return JSONResponse({"size": len(await request.body())})

    app.add_route("/v1/completions", complete, methods=["POST"])
    app.add_middleware(front.Guard, run_dir=shared)
    options: dict[str, str] = {}
    if os.environ.get("MISTRALCTL_TLS"):
        private, certificate = tls.self_signed(["127.0.0.1"])
        (shared / "tls.key").write_text(private)
        (shared / "tls.crt").write_text(certificate)
        if not hasattr(tls, "served"):  # before the front spoke TLS itself
            options = {"ssl_keyfile": str(shared / "tls.key"), "ssl_certfile": str(shared / "tls.crt")}
    uvicorn.run(app, port=port, **options)  # type: ignore[arg-type]


def packages(root: Path) -> str:
    """PYTHONPATH for the node's packages of a checkout."""
    return os.pathsep.join(str(root / "model" / name) for name in ("contract", "plugin", "node", "weights"))


@contextmanager
def server(root: Path, attack: Attack) -> Iterator[tuple[Target, psutil.Process, Path]]:
    """One that runs: where, its process, its log."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            target = Target(probe.getsockname()[1], attack.tls)
        environ = os.environ | {"PYTHONPATH": packages(root), "MISTRALCTL_TLS": "self-signed" if attack.tls else ""}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "--serve", name, "--port", str(target.port)], env=environ, stdout=log, stderr=log
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while ask(target) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()[-2000:])
                time.sleep(0.1)
            yield target, psutil.Process(process.pid), folder / "log"
        finally:
            process.kill()
            process.wait()


# The good client


def ask(target: Target, seconds: float = 2.0) -> float | None:
    """Seconds of one request with the key over a connection of its own; None without an answer."""
    began = time.monotonic()
    context = ssl._create_unverified_context() if target.tls else None  # noqa: S323 - this very machine
    connection = (
        http.client.HTTPSConnection("127.0.0.1", target.port, timeout=seconds, context=context)
        if context
        else http.client.HTTPConnection("127.0.0.1", target.port, timeout=seconds)
    )
    try:
        connection.request("POST", "/v1/completions", '{"prompt": "a"}', {"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        answer.read()
        return time.monotonic() - began if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def answered(target: Target) -> float | None:
    """Seconds until a request with the key is answered, with all attempts that it takes."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        if ask(target) is not None:
            return time.monotonic() - began
        time.sleep(0.02)
    return None


def _attacker(attack: Attack, target: Target, seconds: float, taken: object) -> None:
    """In the attacker's process."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (ATTACKERS_FILES, ATTACKERS_FILES))
    resource.setrlimit(resource.RLIMIT_AS, (ATTACKERS_MEMORY, ATTACKERS_MEMORY))
    taken.send(attack.run(target, seconds))  # type: ignore[attr-defined]


def _count(process: psutil.Process, over: threading.Event, held: list[int]) -> None:
    """Notes how many files the server has open, until it is over."""
    while not over.wait(0.1):
        with suppress(psutil.Error):
            held.append(process.num_fds())


def run(attack: Attack, root: Path) -> Outcome:
    """One attack on a new server of a checkout."""
    with server(root, attack) as (target, process, log):
        before, own = log.stat().st_size, process.num_fds()
        processes = get_context("spawn")
        here, there = processes.Pipe(duplex=False)
        attacker = processes.Process(target=_attacker, args=(attack, target, SECONDS, there), daemon=True)
        attacker.start()
        over, held = threading.Event(), [0]
        worst: float | None = 0.0
        counter = threading.Thread(target=_count, args=(process, over, held))
        counter.start()
        end = time.monotonic() + SECONDS + 2
        while worst is not None and time.monotonic() < end:
            took = answered(target)
            worst = None if took is None else max(worst, took)
            time.sleep(0.3)
        over.set()
        counter.join()
        taken = here.recv() if here.poll(PATIENCE) else 0
        attacker.terminate()
        attacker.join()
        return Outcome(max(held) - own, taken, log.stat().st_size - before, worst)


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A worktree of a revision, for as long as it takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "before"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def table(rows: list[tuple[Attack, list[Outcome]]], labels: list[str]) -> str:
    """In Markdown; each cell has what was before and what is after."""
    names = ["connections held", "bytes taken", "bytes logged", "until a good client is answered"]
    joined = " -> ".join(labels)
    lines = [
        f"Each cell: {joined}.",
        "",
        "| attack | `--only` | " + " | ".join(names) + " |",
        "|---|---" + "|--:" * len(names) + "|",
    ]
    for attack, outcomes in rows:
        cells = zip(*(outcome.cells() for outcome in outcomes), strict=True)
        lines.append(f"| {attack.what} | `{attack.name}` | " + " | ".join(" -> ".join(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", metavar="REVISION", help="run the same against the guard of this revision, first")
    parser.add_argument("--only", action="append", metavar="NAME", choices=[attack.name for attack in ATTACKS])
    parser.add_argument("-o", "--output", type=Path, help="write the table to this file")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.port)
        return 0
    with ExitStack() as stack:
        roots = [stack.enter_context(checkout(options.before))] if options.before else []
        roots.append(ROOT)
        rows = []
        for attack in ATTACKS:
            if not options.only or attack.name in options.only:
                rows.append((attack, [run(attack, root) for root in roots]))
                print(attack.name, *(outcome.cells() for outcome in rows[-1][1]), file=sys.stderr, flush=True)
    text = table(rows, ["before", "after"][-len(roots) :])
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
