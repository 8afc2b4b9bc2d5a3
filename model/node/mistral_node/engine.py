"""The process of an engine: started, watched, ended; and what it died of, in one line."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import urllib.error
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mistral_contract import ports
from mistral_node import log, ward
from mistral_node.client import Client
from mistral_node.contract import Code, LaunchError
from mistral_node.engines import Kind

KILL_SECONDS = 10.0
KILLED = "was killed (signal 9): by somebody, or by the kernel because the machine's memory was full"
MEMORY_FULL = "the kernel ended a process meanwhile, because the machine's memory was full"
VMSTAT = Path("/proc/vmstat")
LONGEST_LINE = 64 << 10
NOISE = re.compile(r"^(\(\w+[^)]*\) )?(\w+ \d\d-\d\d \d\d:\d\d:\d\d )?(\[[^]]*\] )?")


def out_of_memory_kills() -> int:
    """How many processes the kernel has ended for want of memory since the machine started; 0 where it does not say."""
    with suppress(OSError):
        for line in VMSTAT.read_text("ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


_held: dict[int, socket.socket | None] = {}


def hold_port(port: int) -> None:
    """Keep the other deployments of this machine from a port while this process lives; LaunchError if one has it.

    vLLM binds its port long before it listens, so that two could bind the same one, and the second would never answer.
    """
    if port not in _held:
        try:
            _held[port] = ports.hold(port)
        except OSError:
            raise LaunchError(
                Code.ENGINE, f"port {port} is held by another deployment on this machine; choose another --port"
            ) from None


def check_port(host: str, port: int) -> None:
    """LaunchError if another program has the port, whose answers would be taken for the engine's, or is about to have it."""
    hold_port(port)
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise LaunchError(Code.ENGINE, f"{host}:{port} cannot be used: {error.strerror}; choose another --port") from error


@dataclass(frozen=True)
class Command:
    """How an engine is run: `files` are written for it with mode 0600; `prefix` is a command that runs the one behind it as another user."""

    kind: Kind
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    prefix: Sequence[str] = ()


class Engine:
    """An engine in a process of its own; its output passes through to ours."""

    def __init__(self, command: Command, client: Client) -> None:
        self.kind = command.kind
        self.client = client
        self._kills, self._was_healthy = out_of_memory_kills(), False
        self.process = subprocess.Popen(
            [*command.prefix, sys.executable, "-I", ward.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: deque[str] = deque(maxlen=2000)
        if self.process.stdout is None:
            raise RuntimeError("a pipe was asked for")
        self._reader = threading.Thread(target=self._pass_on, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        words = [sys.executable, "-m", *self.kind.MODULE, *command.arguments]
        log.line(f"starts {shlex.join(words)}")
        self._say(json.dumps({"command": words, "environment": dict(command.environment), "files": dict(command.files)}))

    def _say(self, line: str) -> None:
        """To the ward, unless it has ended already."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.write(line.encode() + b"\n")
                self.process.stdin.flush()

    def _pass_on(self, output: IO[bytes]) -> None:
        for raw in iter(lambda: output.readline(LONGEST_LINE), b""):
            line = raw.decode("utf-8", "replace").rstrip("\n")
            self.lines.append(line)
            log.line(line, ours=False)

    def healthy(self) -> bool:
        """Whether /health answers now."""
        try:
            self.client.ask("/health", seconds=5)
        except (urllib.error.URLError, OSError):
            return False
        self._was_healthy = True
        return True

    def raise_if_dead(self) -> None:
        """LaunchError with the cause if the process has ended."""
        if self.process.poll() is not None:
            self._reader.join(timeout=5)
            if not self._was_healthy:
                self.kind.check_class()
            code, last = self.process.returncode, cause(self.lines)
            why = f"{self.kind.NAME} ended with code {code}: {last}"
            if code in (-9, 128 + 9):
                why = f"{self.kind.NAME} {KILLED}"
            elif meant := self.kind.why_ended(last):
                why = f"{meant}: {MEMORY_FULL}" if out_of_memory_kills() > self._kills else meant
            raise LaunchError(Code.ENGINE, f"{why}; see mistralctl logs")

    def end(self, seconds: float) -> None:
        """Ends the engine and all its processes: it has so many seconds to do so by itself."""
        self._say("end")
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.hurry()
        self._reader.join(timeout=5)  # ends when the last process that holds the pipe does

    def hurry(self) -> None:
        """Ends the engine and all its processes now."""
        self._say("kill")
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)


def cause(lines: Sequence[str]) -> str:
    """The line that names the first error in an engine's output; the last line if there is none."""
    said = [NOISE.sub("", line).strip() for line in lines]
    named = [number for number, line in enumerate(said) if re.match(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*", line)]
    useful = [number for number in named if "Engine core initialization failed" not in said[number]]
    for number in (useful or named)[:1]:
        if re.search(r"\d validation errors? for ", said[number]) and number + 1 < len(said):  # pydantic says it on the next line
            return said[number + 1].removeprefix("Value error, ").split(" [type=")[0][:400]
        return said[number][:400]
    return next((line for line in reversed(said) if line), "it said nothing")[:400]
