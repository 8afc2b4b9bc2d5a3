"""A node's folder with a contract and secrets, and the launcher in it as a process."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from mistral_contract import files, keys
from mistral_node.traffic import Traffic

KEY = "sk-test-0123456789abcdef0123456789abcdef"


def known(serial: int = 1, **limits: Any) -> keys.Keys:
    """What a node knows of KEY."""
    return keys.Keys(serial, (keys.make(KEY, "test", 1.0, **limits),))


def write_keys(run_dir: Path, found: keys.Keys | None = None) -> Path:
    """The file of keys beside a folder that a guard shares with its launcher; that folder."""
    keys.write(run_dir / files.KEYS.name / files.KEYS_FILE.name, found or known())
    (run_dir / "shared").mkdir(exist_ok=True)
    return run_dir / "shared"


def free_port() -> int:
    """A port of 127.0.0.1 that is free now, and stays so until its server starts: connections take theirs from 32768 on."""
    while True:
        port = 22000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def variables(node_dir: Path, **changed: str) -> dict[str, str]:
    """The contract of a small deployment called `test`; names without their MISTRALCTL_ in front."""
    values = {
        "NAME": "test", "NODE_DIR": str(node_dir), "DEVICE": "cpu", "PYTHON": "3.11", "ENV_ID": "cpu-0", "MODEL": "tiny",
        "WEIGHTS": "file:///tiny", "REVISION": "", "WEIGHTS_ID": "tiny", "SERVED_NAME": "tiny", "HOST": "127.0.0.1",
        "PORT": "8000", "MAX_MODEL_LEN": "3000", "MAX_NUM_SEQS": "8", "MAX_BATCHED_TOKENS": "256", "SLIDING_WINDOW": "128",
        "TENSOR_PARALLEL": "1", "DTYPE": "float32", "QUANTIZATION": "", "MEMORY_UTILIZATION": "", "KV_CACHE_GIB": "1",
        "TOKENIZER_MODE": "mistral", "TOOL_PARSER": "", "CHAT_TEMPLATE": "own", "LORA": "", "VLLM_ARGS": "",
        "IDLE_MINUTES": "", "TTL_MINUTES": "", "SERVING_ID": "9c1a77e0b2d4", "KEYS": known().dump(), "SECRETS": "[]",
    }  # fmt: skip
    return {f"MISTRALCTL_{name}": value for name, value in (values | changed).items()}


def write_secrets(node_dir: Path, **fields: str) -> Path:
    folder = node_dir / "run" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "secrets.json"
    file.touch(0o600)
    file.write_text(json.dumps(fields))
    return file


class Launcher:
    """`python -m mistral_node.serve` with its output in a file."""

    def __init__(self, node_dir: Path, environ: Mapping[str, str]) -> None:
        self.run_dir = node_dir / "run" / "test"
        self.log = node_dir / "log"
        self.url = f"http://127.0.0.1:{environ['MISTRALCTL_PORT']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "MISTRALCTL_"))}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mistral_node.serve"], env=kept | dict(environ), stdout=output, stderr=subprocess.STDOUT
            )
        self.children: list[psutil.Process] = []

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def until(self, state: str, seconds: float = 600) -> dict[str, Any]:
        """The status once it has this state; fails with the log if the launcher ends before."""
        deadline = time.monotonic() + seconds
        while self.status().get("state") != state:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"not {state} in {seconds} s:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.1)
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        return self.status()

    def until_served(self, count: int, seconds: float = 600) -> None:
        """Waits until the status counts so many requests: the guard counts one after its answer has left."""
        deadline = time.monotonic() + seconds
        while (found := self.status()["requests"]["served"]) != count:
            assert time.monotonic() < deadline, f"{found} requests served, not {count}, in {seconds} s"
            time.sleep(0.05)

    def ask(self, path: str, body: Any = None, *, key: str | None = KEY, method: str | None = None) -> tuple[int, bytes]:
        """Status and body of one request."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str, body: Any = None) -> Any:
        code, answer = self.ask(path, body)
        assert code == 200, answer
        return json.loads(answer)

    def phases(self) -> list[tuple[str, str]]:
        lines = self.log.read_text().splitlines()
        events = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("mistralctl-phase ")]
        return [(event["phase"], event["event"]) for event in events]

    def usage(self) -> dict[str, Any]:
        """What the guard has written of all that was asked until now: it writes when something is new, as one more refusal is."""
        file, traffic = self.run_dir / "shared" / "usage.json", Traffic(self.run_dir / "shared")

        def refused() -> int:
            return int(json.loads(file.read_text())["refused"].get("401", 0))

        self._until(lambda: not traffic.read().running)
        before = refused()
        self.ask("/v1/models", key="wrong")
        self._until(lambda: refused() > before)
        return dict(json.loads(file.read_text()))

    def until_draining(self) -> None:
        """Waits until the guard takes no more requests."""
        traffic = Traffic(self.run_dir / "shared")
        self._until(lambda: traffic.draining)

    def _until(self, happened: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def wait(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)


@contextmanager
def launched(node_dir: Path, **changed: str) -> Iterator[Launcher]:
    """A launcher that is gone afterwards, with all that it started."""
    environ = variables(node_dir, **({"PORT": str(free_port())} | changed))
    environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    launcher = Launcher(node_dir, environ)
    try:
        yield launcher
    finally:
        if launcher.process.poll() is None:
            started = psutil.Process(launcher.process.pid).children(recursive=True)
            launcher.process.send_signal(signal.SIGKILL)
            for process in started:
                if process.is_running():
                    process.kill()
            launcher.process.wait(300)
