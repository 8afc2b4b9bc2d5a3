"""The vLLM process: started, watched, ended; and what it died of, in one line."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import IO

from vllm_mistral import ARCHITECTURE, MODEL_CLASS
from vllm_mistral.contract import Code, LaunchError
from vllm_mistral.flags import DRAIN_SECONDS

NOISE = re.compile(r"^(\(\w+[^)]*\) )?(\w+ \d\d-\d\d \d\d:\d\d:\d\d )?(\[[^]]*\] )?")


def check_installed() -> None:
    """LaunchError if vLLM would not find our plugin at all."""
    if not any(point.name == "mistral_swa" for point in entry_points(group="vllm.general_plugins")):
        raise LaunchError(Code.PLUGIN, "the plugin vllm-mistral is not installed on this node; run mistralctl up again")


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
        self.process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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

    def end(self) -> None:
        """Asks vLLM to finish what runs (DRAIN_SECONDS at most) and waits until it is gone."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DRAIN_SECONDS + 10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(timeout=5)

    def hurry(self) -> None:
        """Ends the process now."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)


def cause(lines: Sequence[str]) -> str:
    """The line that names the first error of a traceback in vLLM's output; the last line if there is none."""
    errors = [NOISE.sub("", line).strip() for line in lines]
    named = [line for line in errors if re.match(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*", line)]
    useful = [line for line in named if "Engine core initialization failed" not in line]
    return next(iter(useful or named or [line for line in reversed(errors) if line]), "it said nothing")[:400]
