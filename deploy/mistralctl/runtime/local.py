"""Runs a task on this machine: its own `setup` in the foreground, its own `run` as a background process of its own session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from mistral_contract import files, keys, untrusted

from mistralctl import endpoint, own_files, processes, readiness, reported, state
from mistralctl.errors import Exit, UserError
from mistralctl.gpus import GIB
from mistralctl.lifecycle import Observed
from mistralctl.phases import PhaseEvent, Progress
from mistralctl.runtime.protocol import Attempt, Server
from mistralctl.state import Record
from mistralctl.tasks import Task, env, kind

SETUP_SECONDS = 7200.0
START_SECONDS = 1800.0
BLOCK = 1 << 16
MOST_BACK = 64 << 20  # of a log that is asked for its last lines; the launcher rotates it at a quarter of that
DRAIN_SECONDS = 40.0
SEAL_SECONDS = 240.0  # for a run of training that is asked to end: its step, and a checkpoint of that
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


def _spawn(script: str, task: Task, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            ["bash", "-c", script], env=environment(task, os.environ), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
        )  # fmt: skip


class Session:
    """A script of a task that runs here in a session of its own; what it writes to the log is heard while somebody waits."""

    def __init__(self, record: Record, script: str, log: Path, progress: Progress) -> None:
        self._log, self._progress, self._offset = log, progress, log.stat().st_size
        self._older = _Older(log)
        self._process = _spawn(script, record.task, log)
        self.record = processes.noted(record, self._process.pid)

    @property
    def events(self) -> list[PhaseEvent]:
        """What was heard so far, of earlier sessions of the attempt, too."""
        return self._progress.events

    def _hear(self) -> None:
        """Take the whole lines that were written since the last call."""
        with self._log.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._tell(self._older.since(self._offset))
                self._offset = 0
            file.seek(self._offset)
            block = file.read()
        whole = block.rfind(b"\n") + 1
        self._offset += whole
        self._tell(block[:whole])

    def _tell(self, lines: bytes) -> None:
        for line in lines.decode("utf-8", "replace").splitlines():
            self._progress.line(line)

    def _code(self) -> int | None:
        """The exit code of the script; None while it runs."""
        return self._process.poll()

    def _follow(self, until: Callable[[], bool], seconds: float) -> int | None:
        """Wait until `until` says so, None, or the script has ended, its exit code; UserError after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            code = self._code()
            self._hear()
            if until() or code is not None:
                return None if until() else code
            if time.monotonic() > deadline:
                raise UserError(f"not done after {seconds / 60:.0f} minutes; see the log {self._log}", Exit.SERVER)
            time.sleep(0.1)

    def finish(self) -> None:
        """Wait until the script has done its work; UserError with its own words if it fails. Whatever goes wrong, nothing of it is left."""
        try:
            if code := self._follow(lambda: False, SETUP_SECONDS):
                raise self._ended(code)
        except BaseException:
            processes.end(lambda: processes.session(self.record), drain=3)  # a server beside it may serve
            raise

    def wait(self, phase: str, seconds: float | None = None) -> None:
        """Wait until the server has ended a phase; UserError, in its own words, if it ends before that."""
        code = self._follow(lambda: self._progress.ended(phase), seconds or START_SECONDS)
        if code is not None:
            raise self._ended(code)

    def _ended(self, code: int) -> UserError:
        why = self._progress.failure or f"it ended with code {code}: {self._progress.last[:300]}"
        return UserError(f"{why} (log: {self._log})", Exit.SERVER)

    def close(self) -> None:
        """Do nothing: a log here is read while somebody waits, and at no other time."""


class Attached(Session):
    """A session that another command started; its log is heard from its first line on."""

    def __init__(self, record: Record, log: Path, progress: Progress) -> None:
        self._log, self._progress, self._offset, self.record = log, progress, 0, record
        self._older = _Older(log)

    def _code(self) -> int | None:
        return None if processes.alive(self.record) else -1


def _target(destination: str, node_dir: str) -> Path:
    path = Path(destination)
    if not path.is_relative_to(node_dir):
        raise ValueError(f"{destination} is outside of the node's folder {node_dir}")
    return path


def place_files(task: Task) -> None:
    """Copies the task's file mounts into the node's folder."""
    for destination, source in task["file_mounts"].items():
        target = _target(destination, env(task, "node_dir"))
        if Path(source).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            continue
        own_files.remove(target)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".venv", "*.egg-info"))


def node_folders(record: Record) -> list[Path]:
    """What a server on this machine is made of: its environment, its weights, its own folder."""
    node_dir, task = Path(record.node_dir), record.task
    return [
        node_dir / files.ENVIRONMENTS.name / env(task, "env_id"),
        node_dir / files.WEIGHTS.name / env(task, "weights_id"),
        record.run_dir,
    ]


def check_disk(task: Task, weights_bytes: int) -> None:
    """UserError when the disk cannot hold what is still missing."""
    node_dir = Path(env(task, "node_dir"))
    node_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    need = 0
    if not (node_dir / files.ENVIRONMENTS.name / env(task, "env_id") / ".complete").exists():
        need += ENVIRONMENT_BYTES
    if not (node_dir / files.WEIGHTS.name / env(task, "weights_id")).exists():
        need += 2 * weights_bytes
    free = shutil.disk_usage(node_dir).free
    if free < need:
        raise UserError(
            f"{node_dir}: {need / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB are free; free some space or set "
            "MISTRALCTL_HOME to a folder on another disk",
            Exit.MACHINE,
        )


def _run_dir(task: Task) -> Path:
    return Path(env(task, "node_dir")) / files.RUN.of(env(task, "name"))


def remove_run(run_dir: Path) -> None:
    """Removes a deployment's folder on the node: sources, secrets, adapters. Environments and weights stay for the next."""
    own_files.remove(run_dir)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What the launcher last said of itself."""
    try:
        return reported.status(_contents(run_dir / files.STATUS.name))
    except (OSError, UserError):
        return None


def _contents(path: Path) -> str:
    """The text of a file of the node's; FileNotFoundError if there is none, UserError if it is no plain file of text."""
    try:
        return untrusted.contents(path, reported.MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run {state.again(path.parent.name)} again", Exit.CONFLICT) from None


class Local:
    """This machine: the task's own `setup` in the foreground, its own `run` as a background process of its own session."""

    rents = False
    packages: tuple[str, ...] = ()

    def cluster(self, name: str) -> str:
        """Return nothing: this machine has no name."""
        return ""

    def observe(self, record: Record | None, wanted: Record | None) -> Observed:
        """Return what is there. A server that does not answer has no name: it is replaced, and not gone on with."""
        one = record or wanted
        if one is None:
            return Observed("up", {}, beside=True)
        known = one.state != "down" and record is not None
        leads = known and processes.alive(one)
        first = one.pid if leads else next((process.pid for process in processes.servers(one)), None)
        jobs = {} if first is None else {"": first}
        answers = bool(jobs) and known and one.state == "up" and readiness.answers(one)
        return Observed("up", jobs, answers, interrupted=bool(jobs) and not (leads and one.state == "up"), beside=True)

    def check(self, attempt: Attempt) -> None:
        """UserError when another user could have written what is run here, or the disk cannot hold what is still missing."""
        for folder in node_folders(attempt.record):
            own_files.require(folder)
        check_disk(attempt.record.task, attempt.disk_bytes)

    def start(self, attempt: Attempt) -> Session:
        """Set this machine up and start the server."""
        attempt.keep(attempt.record)
        return self._serve(attempt, self._set_up(attempt, attempt.keep))

    def replace(self, attempt: Attempt) -> Session:
        """Set up beside the server that serves (what that one has read stays as it was), then start the next in its place."""
        progress = self._set_up(attempt, lambda record: None)
        if attempt.old is not None:
            self.stop(attempt.old)
        attempt.keep(attempt.record)
        return self._serve(attempt, progress)

    def _set_up(self, attempt: Attempt, keep: Callable[[Record], None]) -> Progress:
        """Bring environment and weights; `keep` is told the session as soon as it exists, so that whoever comes later can end it."""
        log, task = _log(attempt.record.name), attempt.record.task
        progress = Progress(attempt.on_phase, attempt.on_line)
        own_files.begin_log(log)
        _Older(log).path.unlink(missing_ok=True)
        place_files(task)
        file = _run_dir(task) / files.SECRETS.name
        if attempt.secrets:
            state.write_private(file, json.dumps(dict(attempt.secrets)))
        else:
            file.unlink(missing_ok=True)
        session = Session(attempt.record, task["setup"], log, progress)
        keep(session.record)
        session.finish()
        return progress

    def _serve(self, attempt: Attempt, progress: Progress) -> Session:
        task = attempt.record.task
        (_run_dir(task) / files.STATUS.name).unlink(missing_ok=True)
        server = Session(attempt.record, task["run"], _log(attempt.record.name), progress)
        attempt.keep(server.record)
        return server

    def attach(self, attempt: Attempt) -> Attached | None:
        """Follow what runs already; a set-up that somebody left alone is no run."""
        old = attempt.old
        if old is None or not processes.alive(old) or read_status(old.run_dir) is None:
            return None
        return Attached(old, _log(old.name), Progress(attempt.on_phase, attempt.on_line))

    def connect(self, attempt: Attempt, server: Server) -> Record:
        """Return the record: a server here is reached as it is."""
        return server.record

    def reconnect(self, record: Record) -> Record:
        """UserError: no way to a server here can be lost."""
        raise UserError(f"{record.name} runs on this machine: {record.base_url} needs no tunnel", Exit.CONFLICT)

    def cancel(self, record: Record) -> Record:
        """End what an `up` that was killed left: its set-up, or a server that nobody was let into."""
        self.stop(record)
        return processes.forgotten(record)

    def stop(self, record: Record, *, drain: float | None = None) -> None:
        """End the server and all that it started; UserError if something of it stays."""
        if drain is None:
            drain = DRAIN_SECONDS if kind(record.kind).serves else SEAL_SECONDS
        there = processes.servers(record)
        left = processes.end(lambda: processes.servers(record), drain=drain)
        if left or (there and not endpoint.is_free(record.port)):
            raise UserError(
                f"{record.name}: processes {', '.join(str(p.pid) for p in left) or '?'} still hold port {record.port}; end them by hand",
                Exit.MACHINE,
            )

    def remove(self, record: Record) -> bool:
        """Return False: this machine stays."""
        return False

    def sweep(self, record: Record, *, promised: bool) -> None:
        """Do nothing: no cloud lists this machine."""

    def forget(self, record: Record) -> Record:
        """Remove sources, secrets and adapters. Environments and weights stay for the next."""
        remove_run(record.run_dir)
        return replace(processes.forgotten(record), state="down")

    def give_up(self, attempt: Attempt, error: BaseException) -> None:
        """End what the attempt started, unless the server that it was to replace serves still; a first one that was interrupted is forgotten."""
        old, now = attempt.old, state.read(attempt.record.name)
        if old is not None and now == old and processes.servers(old):
            return
        if now is not None:
            processes.end(lambda: processes.servers(now), drain=3)
        gone = self.forget(attempt.record if old is None else old)
        if old is None and isinstance(error, KeyboardInterrupt):
            state.forget(gone.name)
        else:
            attempt.keep(gone)

    def logs(self, record: Record, *, follow: bool, lines: int | None) -> Iterator[str]:
        """Return pieces of the log's text: the last `lines` lines (None: all); with `follow` also what comes."""
        path = _log(record.name)
        if not path.is_file():
            raise UserError(f"{record.name} has no log yet; run {record.again} first", Exit.NOT_FOUND)
        rotated = _Older(path)
        older = rotated.path
        with path.open("rb") as file:
            if lines is None:
                if older.is_file():
                    with older.open("rb") as before:
                        while block := before.read(BLOCK):
                            yield block.decode("utf-8", "replace")
            else:
                found = _last(file, lines)
                if len(found) < lines and older.is_file():
                    with older.open("rb") as before:
                        found = _last(before, lines - len(found)) + found
                yield b"".join(found).decode("utf-8", "replace")
            while True:
                block = file.read(BLOCK)
                if block:
                    yield block.decode("utf-8", "replace")
                elif not follow:
                    return
                elif (read := file.tell()) > path.stat().st_size:
                    if missed := rotated.since(read):
                        yield missed.decode("utf-8", "replace")
                    file.seek(0)
                else:
                    record = state.known(record.name)
                    if record.state == "down" or not processes.of(record):
                        return
                    time.sleep(0.2)

    def read(self, record: Record, file: str) -> str:
        """Return the text of a file below the node's folder, empty where it is not there."""
        try:
            return _contents(Path(record.node_dir) / file)
        except FileNotFoundError:
            return ""

    def write(self, record: Record, file: str, text: str) -> None:
        """Replace a file below the node's folder as a whole."""
        keys.put(Path(record.node_dir) / file, text)

    def exchange(self, record: Record, text: str, old: str) -> bool:
        """Replace the node's file of keys if its text is still `old`; False if it is not."""
        node_dir = Path(record.node_dir)
        with keys.alone(node_dir / files.KEYS_LOCK.of(record.name)):
            file = files.KEYS_FILE.of(record.name)
            if self.read(record, file) != old:
                return False
            self.write(record, file, text)
            return True

    def extend(self, record: Record, until: float) -> None:
        """Do nothing: no cloud ends this machine."""


class _Older:
    """What was in a log before it was rotated: the launcher copies it there, where the disk has room."""

    def __init__(self, log: Path) -> None:
        self.path = log.with_name(f"{log.name}.1")
        self._seen = self._made()

    def _made(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def since(self, read: int) -> bytes:
        """Return what was behind the first `read` bytes of the log that was rotated now."""
        before, self._seen = self._seen, self._made()
        if self._seen in (None, before):
            return b""
        try:
            with self.path.open("rb") as file:
                file.seek(read)
                return file.read()
        except OSError:  # it is rotated again
            return b""


def _last(file: BinaryIO, lines: int) -> list[bytes]:
    """Return the last lines of a file, of its last MOST_BACK bytes; it stands at its end afterwards."""
    end = position = file.seek(0, 2)
    pieces: list[bytes] = []
    while position > 0 and end - position < MOST_BACK and sum(piece.count(b"\n") for piece in pieces) <= lines:
        size = min(BLOCK, position)
        position -= size
        file.seek(position)
        pieces.insert(0, file.read(size))
    file.seek(end)
    return b"".join(pieces).splitlines(keepends=True)[-lines:] if lines else []


def _log(name: str) -> Path:
    return state.folder(name) / "up.log"
