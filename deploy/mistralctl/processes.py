"""Processes on this machine that belong to a deployment: they are found, and signalled, only by what proves that they do.

A process id is used again, and so is a session's. What proves a server is the deployment's name and folder in its environment, a tunnel the
deployment's files on its command line. Both have these from their start, and no other program comes by them by accident.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
from mistral_contract.envs import variable

from mistralctl import state
from mistralctl.state import Record

BOOT = Path("/proc/sys/kernel/random/boot_id")
TUNNEL = "mistralctl.runtime.tunnel"
KILL_SECONDS = 5.0
LOOK_SECONDS = 0.1

Find = Callable[[], list[psutil.Process]]


@cache
def _boot() -> str:
    return BOOT.read_text("ascii").strip()


def mark(pid: int) -> str:
    """What tells a process from every other one that has had its id, whatever happens to the clock; empty if there is none.

    On Linux the boot and the clock ticks from there to the process's start, which no setting of the clock changes.
    """
    try:
        if sys.platform == "linux":
            ticks = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
            return f"{_boot()}:{ticks}"
        return f"{psutil.Process(pid).create_time():.6f}"  # as the kernel noted it at the start
    except (OSError, IndexError, psutil.Error):
        return ""


def noted(record: Record, pid: int) -> Record:
    """Return the record with a process that was just started."""
    started = None
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(pid).create_time()
    return replace(record, pid=pid, pid_started=started, pid_mark=mark(pid))


def forgotten(record: Record) -> Record:
    """Return the record without its process."""
    return replace(record, pid=None, pid_started=None, pid_mark="")


def living(process: psutil.Process) -> bool:
    """Whether a process runs still."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def alive(record: Record) -> bool:
    """Whether the very process of a record lives. One of an earlier version says only when it was started, by the clock of that time."""
    if record.pid is None:
        return False
    try:
        process = psutil.Process(record.pid)
        if record.pid_mark:
            same = mark(record.pid) == record.pid_mark
        else:
            same = record.pid_started is not None and abs(process.create_time() - record.pid_started) < 2
        return same and living(process)
    except psutil.Error:
        return False


def _ours() -> list[psutil.Process]:
    """This user's processes, less this one and those that it was started from."""
    myself = psutil.Process()
    but = {myself.pid, *(parent.pid for parent in myself.parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in but and process.uids().real == os.getuid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _environ(process: psutil.Process) -> dict[str, str] | None:
    """The environment of a process; empty where it wrote its title over it, as vLLM's engine does. None where it cannot be read."""
    try:
        return {name: value for name, value in process.environ().items() if name}
    except (psutil.Error, OSError):
        return None


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return -1


def _maps(process: psutil.Process, folder: str) -> bool:
    """Whether a process has a file below a folder in its memory."""
    try:
        return f" {folder}/" in Path(f"/proc/{process.pid}/maps").read_text("utf-8", "replace")
    except OSError:
        return False


def servers(record: Record) -> list[psutil.Process]:
    """What runs of a deployment on this machine: set-up, launcher, vLLM, by name and folder in their environment.

    Also what these have started. A process without an environment counts if it is in a session of theirs, or of the record, and has files of
    this very folder in its memory.
    """
    name, folder = variable("name"), variable("node_dir")
    root = os.path.realpath(record.node_dir)
    found: dict[int, psutil.Process] = {}
    wiped = []
    for process in _ours():
        environ = _environ(process)
        if environ is None:
            continue
        if not environ:
            wiped.append(process)
        elif environ.get(name) == record.name and os.path.realpath(environ.get(folder, "/")) == root:
            found[process.pid] = process
    found |= _descendants(found.values())
    sessions = {record.pid, *map(_session, found.values())}
    for process in wiped:
        if process.pid not in found and _session(process) in sessions and _maps(process, root):
            found[process.pid] = process
    return list(found.values())


def _descendants(processes: Iterable[psutil.Process]) -> dict[int, psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for process in list(processes):
        with contextlib.suppress(psutil.Error):
            found |= {child.pid: child for child in process.children(recursive=True) if living(child)}
    return found


def _home(environ: dict[str, str]) -> str:
    return os.path.realpath(environ.get("MISTRALCTL_HOME") or Path(environ.get("HOME", "/")) / ".mistralctl")


def tunnels(name: str) -> list[psutil.Process]:
    """The tunnel of a deployment of this home folder, and its ssh, also one whose tunnel is gone."""
    home, configuration = os.path.realpath(state.home()), str(state.folder(name) / "ssh_config")
    found: dict[int, psutil.Process] = {}
    for process in _ours():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[1:] == ["-m", TUNNEL, name]:
                if _home(_environ(process) or {}) == home:
                    found[process.pid] = process
            elif words[1:2] == ["-F"] and words[2:3] == [configuration] and "-N" in words:
                found[process.pid] = process
    return list((found | _descendants(found.values())).values())


def session(record: Record) -> list[psutil.Process]:
    """What runs of a deployment's server in the session of the record's own process."""
    return [process for process in servers(record) if _session(process) == record.pid]


def of(record: Record) -> list[psutil.Process]:
    """What runs on this machine for a deployment: its server, or the tunnel to it."""
    return tunnels(record.name) if record.cluster else servers(record)


def led(record: Record) -> list[psutil.Process]:
    """The very process of a record, and what it has started: quickly found, and none if that process is gone."""
    if record.pid is None or not alive(record):
        return []
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(record.pid), *_children(record.pid)]
    return []


def _children(pid: int) -> list[psutil.Process]:
    """All that a process has started and that still runs. psutil would read every process of the machine."""
    if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
        return psutil.Process(pid).children(recursive=True)
    found, waiting = [], [pid]
    while waiting:
        for file in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError, psutil.Error):
                more = [psutil.Process(int(word)) for word in file.read_text("ascii").split()]
                found += more
                waiting += [one.pid for one in more]
    return found


def _send(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:  # each knows when it was started, so that an id used again is not hit
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _until_ended(processes: Iterable[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(living, processes)) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def end(find: Find, *, drain: float) -> list[psutil.Process]:
    """End all that `find` finds; return what is left. Those that started the others are asked to drain and get `drain` seconds."""
    seen = {process.pid: process for process in find()}
    first = [process for process in seen.values() if _parent(process) not in seen]
    _send(first, signal.SIGTERM)
    _until_ended(first, drain)
    for number in (signal.SIGTERM, signal.SIGKILL):
        seen |= {process.pid: process for process in find()}
        rest = [process for process in seen.values() if living(process)]
        _send(rest, number)
        _until_ended(rest, KILL_SECONDS)
        if not any(map(living, rest)):
            break
    return [process for process in {**seen, **{one.pid: one for one in find()}}.values() if living(process)]


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.ppid()
    return 0
