"""The vLLM process: started, watched, ended; and what it died of, in one line."""

from __future__ import annotations

import ctypes
import importlib
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from typing import IO

import psutil

from vllm_mistral import ARCHITECTURE, MODEL_CLASS
from vllm_mistral.contract import Code, LaunchError

PR_SET_PDEATHSIG = 1

NOISE = re.compile(r"^(\(\w+[^)]*\) )?(\w+ \d\d-\d\d \d\d:\d\d:\d\d )?(\[[^]]*\] )?")


def check_installed() -> None:
    """LaunchError if vLLM would not find our plugin at all."""
    if not any(point.name == "mistral_swa" for point in entry_points(group="vllm.general_plugins")):
        raise LaunchError(Code.PLUGIN, "the plugin vllm-mistral is not installed on this node; run mistralctl up again")


def check_port(host: str, port: int) -> None:
    """LaunchError if another program has the port, whose answers would be taken for vLLM's."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise LaunchError(Code.ENGINE, f"{host}:{port} cannot be used: {error.strerror}; choose another --port") from error


def check_class() -> None:
    """LaunchError with the true cause if the model class cannot be loaded, which vLLM only mentions in its log.

    Imports vLLM, so it is asked only after vLLM has failed.
    """
    try:
        importlib.import_module("vllm_mistral").register()
        module, _, name = MODEL_CLASS.partition(":")
        getattr(importlib.import_module(module), name)
    except Exception as error:
        raise LaunchError(
            Code.PLUGIN, f"the model class {ARCHITECTURE} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


class Engine:
    """`vllm serve` with the given arguments, in a process of its own; its output passes through to ours."""

    def __init__(self, arguments: Sequence[str], environ: dict[str, str], host: str, port: int) -> None:
        self.url = f"http://{host}:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
        self.process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_die_with_the_launcher
        )
        self.lines: deque[str] = deque(maxlen=2000)
        if self.process.stdout is None:
            raise RuntimeError("a pipe was asked for")
        self._reader = threading.Thread(target=self._pass_on, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _pass_on(self, output: IO[bytes]) -> None:
        for raw in output:
            line = raw.decode("utf-8", "replace")
            self.lines.append(line.rstrip("\n"))
            sys.stdout.write(line)
            sys.stdout.flush()

    def healthy(self) -> bool:
        """Whether /health answers now."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:  # noqa: S310 - http on loopback
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def raise_if_dead(self) -> None:
        """LaunchError with the cause if the process has ended."""
        if self.process.poll() is not None:
            self._reader.join(timeout=5)
            check_class()
            raise LaunchError(
                Code.ENGINE, f"vLLM ended with code {self.process.returncode}: {cause(self.lines)}; see mistralctl logs"
            )

    def end(self, seconds: float) -> None:
        """Ends vLLM and all its processes: it has so many seconds to do so by itself."""
        started = self._tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.hurry()
                self.process.wait()
        self._kill(started)
        self._reader.join(timeout=5)  # ends when the last process that holds the pipe does

    def hurry(self) -> None:
        """Ends vLLM and all its processes now."""
        if self.process.poll() is None:
            started = self._tree()
            self.process.kill()
            self._kill(started)

    def _tree(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    @staticmethod
    def _kill(processes: Sequence[psutil.Process]) -> None:
        for process in processes:  # each knows when it was started, so that a number used again is not hit
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)


def _die_with_the_launcher() -> None:
    """In vLLM's process before it begins: Linux sends it SIGTERM should the launcher be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def cause(lines: Sequence[str]) -> str:
    """The line that names the first error in vLLM's output; the last line if there is none."""
    said = [NOISE.sub("", line).strip() for line in lines]
    named = [number for number, line in enumerate(said) if re.match(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*", line)]
    useful = [number for number in named if "Engine core initialization failed" not in said[number]]
    for number in (useful or named)[:1]:
        if re.search(r"\d validation errors? for ", said[number]) and number + 1 < len(said):  # pydantic says it on the next line
            return said[number + 1].removeprefix("Value error, ").split(" [type=")[0][:400]
        return said[number][:400]
    return next((line for line in reversed(said) if line), "it said nothing")[:400]
