"""The launcher: `python -m mistral_node.serve` serves what the contract says, and ends when it is due.

Contract, secrets, plugin, weights, engine, check, gate, ready; then it waits for a signal, for idleness, for the end of the
deployment's lifetime, or for vLLM to die, which it starts again as often as the contract says. Exit codes: docs/contract.md.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mistral_contract import envs, files, keys, untrusted
from mistral_contract.adapters import served_rank
from mistral_node import adapters, canary, contract, disk, engines, gate, lifetime, log, pulse, tls, weights
from mistral_node.client import Client
from mistral_node.contract import Code, Contract, LaunchError
from mistral_node.engine import Command, Engine, check_port
from mistral_node.engines import DRAIN_SECONDS
from mistral_node.isolation import prepare
from mistral_node.key_source import KeySource
from mistral_node.phases import Status, say
from mistral_node.traffic import Count, Traffic

SECRETS_SECONDS = 600.0
KEYS_SECONDS = 10.0  # for the first look at the object that holds the keys; a start waits no longer
START_SECONDS = 1800.0
POLL_SECONDS, SOON_SECONDS = 0.5, 0.1  # SOON: somebody waits for what is polled
# Before a server that died is started again; twice as long each time.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0
# Who signals the whole tree of a job signals us, and the wrapper around us, which passes it on: that is one signal.
SAME_SECONDS = 0.5
# A cancelled job is killed 30 s after its signal: vLLM has what the running requests leave of that, but not less than 3 s.
END_SECONDS, LEAST_END_SECONDS = 29.0, 3.0
# On a node the server of a job that was cancelled may still be ending. If its launcher did not hear of that, or hangs, it is told
# after END_SECONDS, and killed when it has had them twice; its ward has 30 s then.
TERM_SECONDS, KILL_SECONDS, PORT_SECONDS = 35.0, 70.0, 120.0
# A process that was killed gives a GPU's memory back after it has closed its sockets.
GPU_SECONDS, SMI_SECONDS = 60.0, 20.0


class _Signals:
    """Set by SIGTERM or SIGINT; a second one ends the engine at once."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.asked_at = 0.0
        self.hurried = False
        self.engine: Engine | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: object) -> None:
        if not self.asked.is_set():
            self.asked_at = time.monotonic()
        elif time.monotonic() - self.asked_at > SAME_SECONDS and self.engine is not None:
            self.hurried = True
            threading.Thread(target=self.engine.hurry).start()  # what was interrupted may be telling the engine something
        self.asked.set()


class _Asked(Exception):
    """A signal came before the server was ready."""


def wait_for_secrets(wanted: Contract, asked: threading.Event, seconds: float = SECRETS_SECONDS) -> dict[str, str]:
    """What the laptop sends beside the task, once all that the contract names is there; empty if that is nothing.

    LaunchError if it does not come, or others can read it.
    """
    file, deadline, problem = wanted.run_dir / files.SECRETS.name, time.monotonic() + seconds, "no secrets came"
    while wanted.secrets:
        try:
            if file.stat().st_mode & 0o077:
                raise LaunchError(Code.SECRETS, f"{file} can be read by others; run chmod 600 on it")
            found = untrusted.read_file(file)
            missing = [name for name in wanted.secrets if not isinstance(found[name], str) or not found[name]]
            if not missing:
                return dict(found)
            problem = f"{file} has no {missing[0]}"
        except FileNotFoundError:
            pass
        except KeyError as error:
            problem = f"{file} has no {error.args[0]}"
        except (OSError, ValueError, TypeError):  # perhaps it is still being written
            problem = f"{file} is no JSON object of texts"
        if time.monotonic() > deadline:
            raise LaunchError(Code.SECRETS, f"{problem} within {seconds:.0f} s; run mistralctl up again")
        if asked.wait(SOON_SECONDS):
            raise _Asked
    return {}


def settle_keys(wanted: Contract) -> None:
    """Puts the task's keys where the guard reads them, unless newer ones are there: `mistralctl keys` may have changed them since the task was
    made, or they came from MISTRALCTL_KEYS_URI. LaunchError if nobody could ask."""
    wanted_keys = wanted.keys or keys.Keys()
    path, there = wanted.run_dir / files.KEYS.name / files.KEYS_FILE.name, None
    try:
        there = keys.read(path.read_text("utf-8"))
    except FileNotFoundError:
        pass
    except ValueError as error:
        log.line(f"{path}: {error}; the task's keys replace it")
    if there is None or there.serial < wanted_keys.serial:
        if not wanted_keys.keys:
            raise LaunchError(
                Code.CONTRACT, "MISTRALCTL_KEYS names no key, so nobody could ask; start the deployment with mistralctl up"
            )
        keys.take(path, wanted.run_dir / files.KEYS_LOCK.name, wanted_keys)


@contextmanager
def followed_keys(wanted: Contract, status: Status, asked: threading.Event) -> Iterator[None]:
    """Follows the object that holds the keys, if the contract names one; it was looked at once, or is slow, when this is entered."""
    if wanted.keys_uri is None:
        yield
        return
    source = KeySource(wanted.keys_uri, wanted.run_dir)
    source.start()
    try:
        source.first(asked, KEYS_SECONDS)
        status.watched = lambda: {"keys": source.status()}
        yield
    finally:
        source.end()


def _usage_kept(shared: Path) -> str:
    """What the last guard has counted here; empty where that cannot be read."""
    try:
        return untrusted.contents(shared / files.USAGE.name, untrusted.MOST_BYTES).decode("utf-8")
    except (OSError, ValueError):
        return ""


def predecessors(name: str) -> list[psutil.Process]:
    """The other launchers of a deployment that this user runs in this node's folder: of jobs that were cancelled."""
    found, (named, folder) = [], (envs.variable("name"), envs.variable("node_dir"))
    here = os.path.realpath(os.environ.get(folder, ""))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.pid != os.getpid() and process.uids().real == os.getuid() and "mistral_node.serve" in process.cmdline()
            environ = process.environ() if ours else {}
            if environ.get(named) == name and os.path.realpath(environ.get(folder, "")) == here:
                found.append(process)
    return found


def until_free(host: str, port: int, asked: threading.Event, name: str) -> None:
    """Waits until no other program has the port, and ends other launchers of the deployment `name` that do not do so by themselves;
    LaunchError if the port is not free after PORT_SECONDS."""
    began, steps = time.monotonic(), [(TERM_SECONDS, signal.SIGTERM), (KILL_SECONDS, signal.SIGKILL)]
    while True:
        try:
            return check_port(host, port)
        except LaunchError:
            if (waited := time.monotonic() - began) > PORT_SECONDS:
                raise
        if steps and waited > steps[0][0]:
            _, number = steps.pop(0)
            for process in predecessors(name):
                log.line(f"an earlier launcher (process {process.pid}) still has the port; it gets {number.name}")
                with suppress(psutil.Error):
                    process.send_signal(number)
        if asked.wait(SOON_SECONDS):
            raise _Asked


def gpu_holders(wanted: Contract) -> list[int]:
    """The processes of this deployment that hold memory of a GPU, by nvidia-smi: of a server that is ending. Others may hold it for ever."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=SMI_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = set()
    for word in filter(str.isdecimal, said.split()):
        with suppress(psutil.Error):  # it is gone, or another user's
            process = psutil.Process(int(word))
            if process.username() == wanted.serve_user or process.environ().get(envs.variable("name")) == wanted.name:
                found.add(process.pid)
    return sorted(found)


def until_gpu_free(wanted: Contract, asked: threading.Event) -> None:
    """Waits until no earlier server of this deployment holds memory of a GPU, of which vLLM wants its whole share at once; GPU_SECONDS at
    most, as vLLM says best what is too little."""
    deadline, named = time.monotonic() + GPU_SECONDS, None
    while holders := gpu_holders(wanted):
        if holders != named:
            named = holders
            log.line(f"waits until an earlier server (processes {', '.join(map(str, holders))}) gives the GPU's memory back")
        if time.monotonic() > deadline:
            log.line(f"the GPU's memory was not given back within {GPU_SECONDS:.0f} s; starts nevertheless")
            return
        if asked.wait(POLL_SECONDS):
            raise _Asked


def _until_healthy(engine: Engine, asked: threading.Event) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not engine.healthy():
        engine.raise_if_dead()
        if time.monotonic() > deadline:
            raise LaunchError(Code.ENGINE, f"{engine.kind.NAME} was not healthy after {START_SECONDS / 60:.0f} minutes")
        if asked.wait(SOON_SECONDS):
            raise _Asked


def _serve(wanted: Contract, engine: Engine, traffic: Traffic, status: Status, asked: threading.Event) -> str:
    """Waits until the end is due; why it is."""
    ready = float(status.fields["ready_at"] or time.time())
    started, beat = float(status.fields["started_at"]), pulse.Pulse(traffic.beats)
    while not asked.wait(POLL_SECONDS):
        engine.raise_if_dead()
        silent, count = beat.silent(traffic.beats), traffic.read()
        status.set(state="stuck" if silent >= pulse.MISSED_SECONDS else "ready")
        if silent >= pulse.STUCK_SECONDS:
            raise LaunchError(
                Code.ENGINE, f"{engine.kind.NAME}'s engine answered nothing for {pulse.STUCK_SECONDS:.0f} s; see mistralctl logs"
            )
        status.set(requests={**asdict(count), "last_at": count.last_at or None})
        now = time.time()
        ends_at = lifetime.ends_at(wanted.run_dir, started, wanted.ttl_minutes)
        budget = lifetime.budget(wanted.run_dir, started, wanted.budget, wanted.price)
        ends = [end for end in (ends_at, budget.ends_at if budget else None) if end is not None]
        status.set(ends_at=min(ends, default=None), budget=asdict(budget) if budget else None)
        if ends_at is not None and now >= ends_at:
            return "its lifetime is over"
        if budget is not None and now >= budget.ends_at:
            return f"its budget of {budget.usd:.2f} USD is spent"
        quiet = now - max(count.last_at, ready)
        if wanted.idle_minutes is not None and count.running == 0 and quiet >= wanted.idle_minutes * 60:
            return f"nobody asked anything for {wanted.idle_minutes} minutes"
    return "it was asked to"


def _drain(traffic: Traffic, status: Status, signals: _Signals) -> None:
    """Waits for the requests that run, DRAIN_SECONDS at most or until a second signal; new ones are refused."""
    traffic.drain()
    deadline = time.monotonic() + DRAIN_SECONDS
    while (count := traffic.read()).running and time.monotonic() < deadline and not signals.hurried:
        status.set(requests={**asdict(count), "last_at": count.last_at or None})
        time.sleep(0.1)
    status.set(requests={**asdict(count), "last_at": count.last_at or None})


@dataclass(frozen=True)
class _Address:
    """Where all servers of a launcher answer: made once, so that a client's pinned certificate outlives a server."""

    url: str
    certificate: str = ""
    private: str = field(default="", repr=False)

    @property
    def context(self) -> ssl.SSLContext | None:
        """What the launcher trusts; None without TLS."""
        return tls.trusting(self.certificate) if self.certificate else None


def _address(wanted: Contract, sent: Mapping[str, str]) -> _Address:
    """With TLS: the certificate that the laptop sent, or one for the address by which the laptop knows this machine."""
    if not wanted.tls:
        return _Address(f"http://127.0.0.1:{wanted.port}")
    if wanted.tls == "self-signed":
        private, certificate = tls.self_signed([sent["address"], "127.0.0.1", "localhost"])
    else:
        private, certificate = sent["tls_key"], sent["tls_certificate"]
    return _Address(f"https://127.0.0.1:{wanted.port}", certificate, private)


def _sent_figures(run_dir: Path) -> list[dict[str, Any]]:
    """The figures that the laptop knows of this model's weights, if it has sent any by now; LaunchError if they are none."""
    if not (run_dir / files.SECRETS.name).exists():
        return []
    try:
        sent = untrusted.read_any(str(untrusted.read_file(run_dir / files.SECRETS.name).get("figures", "[]")))
    except (OSError, ValueError) as error:
        raise LaunchError(Code.SECRETS, f"{run_dir / files.SECRETS.name} has figures that are no JSON ({error})") from error
    return [one for one in sent if isinstance(one, dict)] if isinstance(sent, list) else []


def _failed(status: Status, error: LaunchError) -> None:
    """Says what was wrong, at once and once."""
    if status.fields["error"] is None:
        say(status.fields["phase"] or "engine", "fail", str(error))
        status.set(state="failed", error={"code": int(error.code), "message": str(error)})


def _again(wanted: Contract, status: Status, error: LaunchError) -> bool:
    """Whether a failed server is started again: it died, it or one before it had been ready, and not all restarts are used."""
    was_ready, count = status.fields["ready_at"] is not None, status.fields["restarts"]["count"]
    return was_ready and error.code is Code.ENGINE and count < wanted.restart


def _pause(wanted: Contract, status: Status, error: LaunchError, asked: threading.Event) -> None:
    """Says why a server is started again, and waits before that."""
    count = status.fields["restarts"]["count"] + 1
    seconds = min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2 ** (count - 1))
    log.line(f"restart {count} of {wanted.restart} in {seconds:.0f} s, because {error}")
    restarts = {"count": count, "of": wanted.restart, "why": str(error), "at": round(time.time(), 3)}
    status.set(state="starting", phase="", phases=[], restarts=restarts)
    if asked.wait(seconds):
        raise _Asked


def _server(wanted: Contract, address: _Address, status: Status, signals: _Signals, before: Count) -> str:
    """One server, from its start to its end; why it ended. LaunchError if it fails."""
    run_dir, shared = wanted.run_dir, wanted.shared_dir
    usage = _usage_kept(shared)
    shutil.rmtree(shared, ignore_errors=True)
    isolation = prepare(wanted)
    shared.mkdir(exist_ok=True)
    disk.replaced(shared / files.USAGE.name, usage)
    traffic = Traffic(shared, fresh=True)
    traffic.go_on(before)
    status.set(
        isolation={"user": isolation.user, "why": isolation.why},
        requests={**asdict(traffic.read()), "last_at": before.last_at or None},
    )
    private_files = {}
    if address.certificate:
        private_files = {str(shared / files.PRIVATE_KEY.name): address.private}
        (shared / files.CERTIFICATE.name).write_text(address.certificate, "ascii")
    kind = engines.of(wanted.engine)
    client = Client(address.url, secrets.token_urlsafe(32), address.context)
    engine: Engine | None = None
    end_by: float | None = None
    try:
        with status.during("engine"):
            kind.check_installed()
            if wanted.serve_user:
                until_free(wanted.host, wanted.port, signals.asked, wanted.name)
            else:
                check_port(wanted.host, wanted.port)
            if wanted.device == "cuda":
                until_gpu_free(wanted, signals.asked)
            model_dir = weights.model_dir(wanted.weights_dir, wanted.weights_digest)
            environ = isolation.environment(kind.environment(wanted, os.environ))
            environ[envs.NODE_KEY] = keys.digest(client.key)
            loras = adapters.judged(wanted, model_dir)
            arguments = kind.arguments(wanted, model_dir, served_rank(loras.values()))
            status.set(flags=arguments)
            prefix = isolation.prefix(wanted.weights_dir, model_dir)
            engine = Engine(Command(kind, arguments, environ, private_files, prefix), client)
            signals.engine = engine
            _until_healthy(engine, signals.asked)
        with status.during("check"):
            canary.answers(client, wanted.served_name)
            facts = engines.check(kind, wanted, shared)
            verdict = canary.check(client, wanted, model_dir, facts, _sent_figures(run_dir))
            answers = adapters.check(client, wanted, loras)
            engine.raise_if_dead()
            status.set(canary=asdict(verdict), engine=facts, adapters={name: asdict(answer) for name, answer in answers.items()})
        with status.during("gate"):
            gate.pass_through(client, run_dir, shared)
            engine.raise_if_dead()
        traffic.open()
        at = say("ready", "end")
        status.set(ready_at=status.fields["ready_at"] or at, state="ready", phase="ready")
        why = _serve(wanted, engine, traffic, status, signals.asked)
        log.line(f"ends because {why}")
        status.set(state="draining")
        end_by = time.monotonic() + END_SECONDS
        _drain(traffic, status, signals)
        return why
    except LaunchError as error:
        if status.fields["state"] == "stuck":
            end_by = time.monotonic()  # it would not hear that it shall drain
        if not _again(wanted, status, error):
            _failed(status, error)  # before the engine ends, which may take half a minute
        raise
    finally:
        if engine is not None:
            engine.end(max(LEAST_END_SECONDS, (end_by or time.monotonic() + END_SECONDS) - time.monotonic()))


def _launch(wanted: Contract, status: Status, signals: _Signals) -> None:
    """Serves until the end is due; a server that dies after it was ready is started again, `wanted.restart` times."""
    (wanted.run_dir / files.GATE.name).unlink(missing_ok=True)
    settle_keys(wanted)
    address, before = _address(wanted, wait_for_secrets(wanted, signals.asked)), Count(0, 0, 0.0)
    status.set(restarts={**status.fields["restarts"], "of": wanted.restart})
    while True:
        try:
            return status.set(state="stopped", ended_because=_server(wanted, address, status, signals, before))
        except LaunchError as failed:
            error = failed
        except OSError as failed:
            error = LaunchError(Code.ENGINE, f"the server could not be started: {failed}")
        if not _again(wanted, status, error):
            raise error
        with suppress(OSError):
            before = Traffic(wanted.shared_dir).read()
        _pause(wanted, status, error, signals.asked)


def main() -> int:
    """Runs the launcher; its exit code."""
    signals = _Signals()
    try:
        wanted = contract.read(os.environ)
    except LaunchError as error:
        say("engine", "fail", str(error))
        return error.code
    wanted.run_dir.mkdir(parents=True, exist_ok=True)
    status = Status(
        wanted.run_dir / files.STATUS.name, name=wanted.name, host=wanted.host, port=wanted.port,
        served_model_name=wanted.served_name, serving_id=wanted.serving_id,
    )  # fmt: skip
    try:
        with followed_keys(wanted, status, signals.asked):
            _launch(wanted, status, signals)
    except _Asked:
        status.set(state="stopped", ended_because="it was asked to")
    except LaunchError as error:
        _failed(status, error)
        return error.code
    return Code.OK


if __name__ == "__main__":
    raise SystemExit(main())
