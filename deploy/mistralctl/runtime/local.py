"""Runs a task on this machine: its own `setup` in the foreground, its own `run` as a background process of its own session."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from mistralctl import phases, state
from mistralctl.errors import Exit, UserError
from mistralctl.gpus import GIB
from mistralctl.phases import PhaseEvent
from mistralctl.tasks import Task

OnPhase = Callable[[PhaseEvent], None]

SETUP_SECONDS = 7200.0
START_SECONDS = 1800.0
DRAIN_SECONDS = 40.0
ENVIRONMENT_BYTES = 8 * GIB  # vLLM for the CPU: 3.1 GB unpacked, and as much for the downloads in uv's cache
# What belongs to the laptop's own Python and would mislead the node's.
NOT_FOR_THE_NODE = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "PYTHONDONTWRITEBYTECODE",
    "PYDANTIC_DISABLE_PLUGINS",
)


def environment(task: Task, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the task's scripts: the user's, less what is the laptop's own, with the task's envs on top."""
    kept = state.without_secrets(environ)
    found = {k: v for k, v in kept.items() if k not in NOT_FOR_THE_NODE and not k.startswith("MISTRALCTL_")}
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", os.defpath)])
    if found.get("PIP_FIND_LINKS"):  # uv does not read pip's variable; torch's CPU build may lie there
        found.setdefault("UV_FIND_LINKS", found["PIP_FIND_LINKS"])
    return {**found, **task["envs"]}


def members(session: int) -> list[psutil.Process]:
    """Every living process of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def alive(pid: int | None, started: float | None) -> bool:
    """Whether that very process lives: the same id, started at the same time."""
    if pid is None:
        return False
    try:
        process = psutil.Process(pid)
        same = started is None or abs(process.create_time() - started) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end(session: int, *, drain: float = DRAIN_SECONDS) -> None:
    """Ends a whole session: its leader is asked to drain and gets `drain` seconds, then nothing of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(session, signal.SIGTERM)
    deadline = time.monotonic() + drain
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(session)
        while leader.is_running() and leader.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(session, os.WNOHANG)
            time.sleep(0.1)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        rest = members(session)
        for process in rest:
            with contextlib.suppress(psutil.Error):
                process.send_signal(sign)
        if not psutil.wait_procs(rest, timeout=5)[1]:
            return


class Log:
    """The log of one `up`: the scripts write to it, and the events in it are read as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_bytes(b"")
        self._offset = 0

    def new_events(self) -> Iterator[PhaseEvent]:
        """The events of whole lines that were written since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            block = file.read()
        whole = block.rfind(b"\n") + 1
        self._offset += whole
        for line in block[:whole].decode("utf-8", "replace").splitlines():
            event = phases.parse(line)
            if event is not None:
                yield event

    def last_line(self) -> str:
        """The last line that is not a phase's."""
        lines = self.path.read_text("utf-8", "replace").splitlines()[-200:]
        return next((line.strip() for line in reversed(lines) if line.strip() and not phases.parse(line)), "")


def _start(script: str, env: dict[str, str], log: Log) -> subprocess.Popen[bytes]:
    with log.path.open("ab") as output:
        return subprocess.Popen(
            ["bash", "-c", script], env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, cwd="/",
        )  # fmt: skip


def _watch(process: subprocess.Popen[bytes], log: Log, on_phase: OnPhase, seconds: float, until: str | None) -> None:
    """Passes events on until the process ends (or the phase `until` came); UserError with the node's own words if it fails."""
    deadline = time.monotonic() + seconds
    failure = ""
    while True:
        code = process.poll()
        for event in log.new_events():
            on_phase(event)
            failure = event.message if event.event == "fail" else failure
            if until is not None and event.phase == until:
                return
        if code is not None:
            if code == 0 and until is None:
                return
            why = failure or f"it ended with code {code}: {log.last_line()[:300]}"
            raise UserError(f"{why} (log: {log.path})", Exit.SERVER)
        if time.monotonic() > deadline:
            raise UserError(f"not done after {seconds / 60:.0f} minutes; see the log {log.path}", Exit.SERVER)
        time.sleep(0.1)


def _target(destination: str, node_dir: str) -> Path:
    path = Path(destination)
    if not path.is_relative_to(node_dir):
        raise ValueError(f"{destination} is outside of the node's folder {node_dir}")
    return path


def place_files(task: Task) -> None:
    """Copies the task's file mounts into the node's folder."""
    for destination, source in task["file_mounts"].items():
        target = _target(destination, task["envs"]["MISTRALCTL_NODE_DIR"])
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".venv", "*.egg-info"))


def check_disk(task: Task, weights_bytes: int) -> None:
    """UserError when the disk cannot hold what is still missing."""
    envs = task["envs"]
    node_dir = Path(envs["MISTRALCTL_NODE_DIR"])
    node_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    need = 0
    if not (node_dir / "envs" / envs["MISTRALCTL_ENV_ID"] / ".complete").exists():
        need += ENVIRONMENT_BYTES
    if not (node_dir / "weights" / envs["MISTRALCTL_WEIGHTS_ID"]).exists():
        need += 2 * weights_bytes
    free = shutil.disk_usage(node_dir).free
    if free < need:
        raise UserError(
            f"{node_dir}: {need / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB are free; free some space or set "
            "MISTRALCTL_HOME to a folder on another disk",
            Exit.MACHINE,
        )


def _run(
    script: str,
    seconds: float,
    until: str | None,
    task: Task,
    log: Log,
    on_phase: OnPhase,
    on_process: Callable[[int, float], None],
) -> int:
    """Runs a script of the task to its end, or until a phase; the id of its session's leader. Whatever goes wrong, nothing of it is left."""
    process = _start(script, environment(task, os.environ), log)
    try:
        on_process(process.pid, psutil.Process(process.pid).create_time())
        _watch(process, log, on_phase, seconds, until)
    except BaseException:
        end(process.pid, drain=3)
        raise
    return process.pid


def set_up(task: Task, secrets: Mapping[str, str], log: Log, on_phase: OnPhase, on_process: Callable[[int, float], None]) -> None:
    """Sets the node up, beside a server of the deployment that may still run: what that one has read stays as it was.

    `on_process` is told each session as soon as it exists, so that whoever comes later can end it.
    """
    place_files(task)
    state.write_private(_run_dir(task) / "secrets.json", json.dumps(dict(secrets)))
    _run(task["setup"], SETUP_SECONDS, None, task, log, on_phase, on_process)


def serve(task: Task, log: Log, on_phase: OnPhase, on_process: Callable[[int, float], None]) -> int:
    """Starts the server; the id of its session's leader once it said ready."""
    (_run_dir(task) / "status.json").unlink(missing_ok=True)
    return _run(task["run"], START_SECONDS, "ready", task, log, on_phase, on_process)


def _run_dir(task: Task) -> Path:
    return Path(task["envs"]["MISTRALCTL_NODE_DIR"]) / "run" / str(task["envs"]["MISTRALCTL_NAME"])


def remove_run(run_dir: Path) -> None:
    """Removes a deployment's folder on the node: sources, secrets, adapters. Environments and weights stay for the next."""
    shutil.rmtree(run_dir, ignore_errors=True)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What the launcher last said of itself."""
    try:
        data = json.loads((run_dir / "status.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
