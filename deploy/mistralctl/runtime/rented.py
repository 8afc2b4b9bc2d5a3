"""The task on a machine that is rented through SkyPilot: convergent, so that it goes on wherever an earlier `up` was left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mistral_contract import files, keys
from mistral_contract.envs import Serve, value

from mistralctl import certificates, endpoint, own_files, owners, processes, readiness, state, sweep
from mistralctl.clouds import Lacking, NotUsed, firewall, identity
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Machine, Observed, places, serves
from mistralctl.phases import PhaseEvent, Progress
from mistralctl.runtime import sky, ssh
from mistralctl.runtime.following import Following
from mistralctl.runtime.protocol import Attempt, Server
from mistralctl.state import NOWHERE, Record
from mistralctl.tasks import env, serving_name, what_ends

START_SECONDS = 2400.0
TUNNEL_SECONDS = 60.0
LOOK_SECONDS = 3.0  # after which a tunnel that does not open may be one to another machine
PUBLIC_SECONDS = 60.0
SECRETS_SECONDS = 120.0
LOCK_SECONDS = 15
MACHINES: dict[str, Machine] = {"UP": "up", "STOPPED": "stopped"}


def learn(record: Record) -> Record:
    """Return the record with what SkyPilot knows of the machine by now; its SSH address is kept for later."""
    found = sky.clusters([record.cluster], refresh=False).get(record.cluster)
    if found is None:
        return record
    if found.address is not None:
        ssh.remember(record.name, found.address)
    return replace(
        record, cloud=found.cloud or record.cloud, region=found.region, machine=found.instance_type, spot=found.spot,
        price=found.price, address=found.address.host if record.public and found.address is not None else record.address,
    )  # fmt: skip


def costs(record: Record) -> str:
    """Return that a machine costs from now on, and what ends it, in one line."""
    price = f", {record.price} USD an hour," if record.price is not None else ""
    return (
        f"{record.name} has a machine in {record.cloud}/{record.region}{price} which costs until it ends: mistralctl down {record.name}, or "
        f"by itself after {what_ends(record.task)}"
    )


def _send_secrets(record: Record, secrets: Mapping[str, str]) -> None:
    """Write the secrets to the node, and the address by which the world knows it, for its certificate."""
    if record.public and record.address == NOWHERE:
        raise UserError(f"{record.name}: SkyPilot does not know its machine's address yet; run {record.again} again", Exit.CLOUD)
    if given := {**secrets, **({"address": record.address} if record.public else {})}:
        ssh.write_secrets(record.name, given)


class SecretsSender:
    """Writes the secrets to the node as soon as its machine is there; `finish` says whether that went well."""

    def __init__(self, record: Record, secrets: Mapping[str, str], note: Callable[[str], None] = lambda text: None) -> None:
        self._record, self._secrets, self._note = record, secrets, note
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self) -> None:
        """Start to write them, if that was not begun yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, daemon=True)
            self._thread.start()

    def _send(self) -> None:
        deadline = time.monotonic() + SECRETS_SECONDS
        while True:
            try:
                self._record = learn(self._record)
                if self._record.region:
                    self._note(costs(self._record))
                    self._note = lambda text: None
                _send_secrets(self._record, self._secrets)
                self._error = None
                return
            except ssh.HostKeyChanged as error:
                self._error = error
                return
            except Exception as error:  # noqa: BLE001 - `finish` raises it
                self._error = error
            if time.monotonic() > deadline:
                return
            time.sleep(1)

    def finish(self) -> Record:
        """Return the record as it was learnt, once the secrets are there; UserError if they could not be written."""
        self.begin()
        if self._thread is not None:
            self._thread.join(SECRETS_SECONDS + 10)
            if self._thread.is_alive() and self._error is None:
                what = f"{self._record.name}: its machine did not take the secrets within {SECRETS_SECONDS:.0f} s"
                raise UserError(f"{what}; run {self._record.again}", Exit.NETWORK)
        if self._error is not None:
            raise self._error
        return self._record


@dataclass
class Job:
    """A job of SkyPilot's on the machine; its log is followed in the background."""

    record: Record
    progress: Progress
    following: Following
    log: Path

    @property
    def events(self) -> list[PhaseEvent]:
        """What was heard so far."""
        return self.progress.events

    def wait(self, phase: str, seconds: float | None = None) -> None:
        """Wait until the job has ended a phase; UserError, in its own words, if it ends before that."""
        if not self.following.wait(
            seconds or START_SECONDS, lambda: self.progress.ended(phase), lambda: bool(self.progress.failure)
        ):
            raise self._ended(self.progress.failure or f"its job ended: {self.progress.last[:300]}")

    def _ended(self, why: str) -> UserError:
        return UserError(
            f"{why} (log: {self.log}; the machine goes by itself in a few minutes, or at once with mistralctl down {self.record.name})",
            Exit.SERVER,
        )

    def close(self) -> None:
        """Stop following its log."""
        self.following.close()


def open_tunnel(record: Record, keep: Callable[[Record], None]) -> Record:
    """Return the record with a tunnel, which dials until there is a machine and lets through what its server answers."""
    ssh.end_tunnel(record.name)
    record = processes.forgotten(record)
    keep(record)  # the tunnel reads its port there
    return processes.noted(record, ssh.start_tunnel(record.name))


def reach(record: Record) -> None:
    """Wait until the server answers through the tunnel; UserError if it does not."""
    deadline, look_at = time.monotonic() + TUNNEL_SECONDS, time.monotonic() + LOOK_SECONDS
    while not readiness.reached(record):
        if time.monotonic() > look_at:
            ssh.verify(record.name)
            look_at = deadline
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: its server cannot be reached through SSH at 127.0.0.1:{record.port} (log: "
                f"{state.folder(record.name) / 'tunnel.log'}); mistralctl status {record.name} says whether it runs",
                Exit.NETWORK,
            )
        time.sleep(0.1)


def publish(record: Record, text: str) -> None:
    """Pin the certificate of a public server, open the cloud's firewall to those who may ask, and wait until that is so."""
    allowed = value(Serve, "allow", record.task["envs"])
    certificates.pin(record.name, text)
    if (asked := firewall(record.cloud)) is not None:
        networks = list(allowed) or ["0.0.0.0/0"]
        if asked.narrow(owners.label(record), record.name, record.region, record.port, networks) == 0:
            raise UserError(
                f"{record.name}: the firewall of {record.cloud} has no rule for port {record.port} of its machine, so nothing says who may "
                f"reach it ({sweep.not_found(record)}); mistralctl down {record.name} takes it away",
                Exit.CLOUD,
            )
    deadline = time.monotonic() + PUBLIC_SECONDS
    while not readiness.reached(record):
        if why := readiness.refusal(record):
            raise UserError(f"{record.name}: its server refuses this machine ({why}); add its address with --allow", Exit.NETWORK)
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: its server cannot be reached at {record.address}:{record.port}; if --allow is given, it must hold "
                "this machine's address; a firewall between here and there may forbid it, too",
                Exit.NETWORK,
            )
        time.sleep(0.5)


class Rented:
    """A machine that SkyPilot rents."""

    rents = True
    packages: tuple[str, ...] = ("skypilot",)

    def cluster(self, name: str) -> str:
        """Return SkyPilot's name of a deployment's machine, apart from the user's own clusters."""
        return f"{state.CLUSTER}{name}"

    def observe(self, record: Record | None, wanted: Record | None) -> Observed:
        """Return what is there. While an interrupted launch may be at work nobody is asked: its end comes first."""
        if wanted is None:
            return Observed("none" if record is None or not sky.clusters([record.cluster], refresh=False) else "up")
        if record is not None and serves(record, wanted.task) and record.port == wanted.port and readiness.answers(record):
            return Observed("up", answers=True)
        if record is not None and record.request:
            return Observed("half made", interrupted=True)
        cluster = self.cluster(wanted.name)
        refresh = record is not None and record.state != "down"
        there = sky.clusters([cluster], refresh=refresh).get(cluster)
        if there is None:
            return Observed()
        machine = MACHINES.get(there.status, "half made")
        jobs = sky.running_jobs(cluster) if machine == "up" else None
        named = None if jobs is None else {name: job for job, name in jobs.items()}
        return Observed(machine, named, cloud=there.cloud, region=there.region)

    def check(self, attempt: Attempt) -> None:
        """Do nothing: the disk of a rented machine is as large as the task says."""

    def start(self, attempt: Attempt) -> Job:
        """Rent the machine, as far as it is not there, set it up and start the job."""
        if attempt.observed.machine == "none":
            ssh.forget_machine(attempt.record.name)
        elif attempt.observed.machine == "up":
            ssh.verify(attempt.record.name)
        progress, observed = self._begin(attempt), attempt.observed
        record = replace(attempt.record, setup_id="")
        log = _log(record.name)
        own_files.begin_log(log)
        sender = SecretsSender(record, attempt.secrets, attempt.note)

        def line(text: str) -> None:
            progress.line(text)
            if any(event.phase == "files" for event in progress.events):  # its set-up comes next, and wants them
                sender.begin()

        progress.begin()
        try:
            job = sky.launch(
                record.task, record.cluster, log, line, lambda request: attempt.keep(replace(record, request=request))
            )
            if observed.machine != "none":  # a launch that was interrupted may have come to a job of its own
                sky.cancel_jobs(record.cluster, but=job)
        except UserError as error:
            if progress.failure:
                raise UserError(f"{progress.failure} (log: {log})", Exit.SERVER) from error
            raise
        return self._follow(sweep.label_others(sender.finish()), job, progress)

    def replace(self, attempt: Attempt) -> Job:
        """Start the job on a machine that is set up, after those that run there; or go on with the one that is the same."""
        progress = self._begin(attempt)
        record = learn(attempt.record)
        ssh.verify(record.name)
        _send_secrets(record, attempt.secrets)
        same = (attempt.observed.jobs or {}).get(serving_name(record.task))
        job = same if same is not None else sky.replace_job(record.task, record.cluster, _log(record.name), progress.line)
        return self._follow(record, job, progress)

    def _begin(self, attempt: Attempt) -> Progress:
        """End the tunnel to the last server, keep what that said, and give the machine that is there its new lifetime."""
        record, observed = attempt.record, attempt.observed
        if attempt.old is not None:
            ssh.end_tunnel(record.name)
        served = _log(record.name).with_name("serve.log")
        if not served.is_file():
            own_files.begin_log(served)
        attempt.keep(record)
        if observed.jobs == {}:  # its server has ended: what it said last stays beside the next one's log
            keep_log(record)
            served.replace(served.with_name("serve.before.log"))
        if observed.machine != "none" and serving_name(record.task) not in (observed.jobs or {}):
            # SkyPilot does not change a machine's labels, and its life begins anew
            ttl = env(record.task, "ttl_minutes")
            until = time.time() + START_SECONDS + int(ttl) * 60 if ttl else None
            there = replace(record, cloud=observed.cloud, region=observed.region)
            with contextlib.suppress(Lacking):
                asked = attempt.old is not None and attempt.old.state != "down"  # else SkyPilot's own memory is all that says so
                if sweep.tell_cloud(there, until, here=True) == 0 and asked and observed.machine != "half made":
                    raise UserError(f"{sweep.not_found(there)}; mistralctl down {record.name} takes it away", Exit.CLOUD)
        return Progress(attempt.on_phase, attempt.on_line)

    def attach(self, attempt: Attempt) -> Job | None:
        """Follow the job of this name that runs or waits on the machine; None if none does."""
        job = (attempt.observed.jobs or {}).get(serving_name(attempt.record.task))
        if job is None:
            return None
        ssh.verify(attempt.record.name)
        return self._follow(learn(attempt.record), job, Progress(attempt.on_phase, attempt.on_line))

    def _follow(self, record: Record, job: int, progress: Progress) -> Job:
        log = _log(record.name).with_name("serve.log")
        own_files.begin_log(log)
        return Job(record, progress, Following(record.name, record.cluster, job, log, progress.line), log)

    def connect(self, attempt: Attempt, server: Server) -> Record:
        """Open the tunnel while the engine starts, or the firewall when it has started; wait until the server answers."""
        record = server.record
        if record.public:
            server.wait("engine")
            publish(record, self.read(record, files.CERTIFICATE.of(record.name)))
            return record
        record = open_tunnel(record, attempt.keep)
        attempt.keep(record)
        server.wait("engine")
        reach(record)
        return record

    def reconnect(self, record: Record) -> Record:
        """Return the record with a new tunnel on the same port, once the server answers through it; UserError if it needs none."""
        name = record.name
        if record.state == "down":
            raise UserError(f"{name} is down; run {record.again} first", Exit.NOT_FOUND)
        if record.public:
            raise UserError(f"{name} is public: {record.base_url} needs no tunnel", Exit.CONFLICT)
        ssh.end_tunnel(record.name)
        deadline = time.monotonic() + 5
        while not endpoint.is_free(record.port) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not endpoint.is_free(record.port):
            raise UserError(f"port {record.port} is taken by another program; stop that program", Exit.CONFLICT)
        record = open_tunnel(learn(record), state.save)
        state.save(record)
        reach(record)
        return record

    def cancel(self, record: Record) -> Record:
        """End the request of a launch that nobody heard the end of."""
        sky.cancel_request(record.request)
        return replace(record, request="")

    def stop(self, record: Record) -> None:
        """End the jobs; their machine stays."""
        sky.cancel_jobs(record.cluster)

    def remove(self, record: Record) -> bool:
        """Take the machine away; False if SkyPilot knew of none."""
        ssh.end_tunnel(record.name)
        return sky.down(record.cluster, state.folder(record.name) / "down.log")

    def sweep(self, record: Record, *, promised: bool) -> None:
        """Wait until the cloud lists nothing of the deployment, and delete what outlives its machine.

        Where mistralctl cannot list a cloud, SkyPilot's promise holds; Lacking if there is none.
        """
        try:
            sweep.wait_until_gone(record, promised=promised)
            sweep.leave_no_other(record)
        except Lacking:
            if not promised:
                raise
        if record.cluster in sky.clusters([record.cluster], refresh=True):
            raise UserError(
                f"{record.name}: {record.cloud} lists nothing with its labels, but SkyPilot says that its machine {record.cluster} is still "
                f"there; look in the cloud's console, then run mistralctl down {record.name} again",
                Exit.CLOUD,
            )

    def forget(self, record: Record) -> Record:
        """Remove the way to the machine."""
        ssh.end_tunnel(record.name)
        ssh.forget_machine(record.name)
        return replace(processes.forgotten(record), state="down", request="")

    def give_up(self, attempt: Attempt, error: BaseException) -> None:
        """End the tunnel; after a refusal make sure that the launch has left nothing on the clouds that were asked."""
        name = attempt.record.name
        if isinstance(error, KeyboardInterrupt):
            raise UserError(
                f"interrupted; {name} may have a machine by now: {attempt.record.again} goes on with it, mistralctl down {name} takes it away; by "
                f"itself it ends after {what_ends(attempt.record.task)}",
                Exit.INTERRUPTED,
            ) from None
        if not isinstance(error, UserError):
            return
        ssh.end_tunnel(name)
        if error.code != Exit.CLOUD:
            return
        record = attempt.record
        clouds = list(dict.fromkeys(place.split()[0].partition("/")[0] for place in places(record.task)))
        nothing = not sky.clusters([record.cluster], refresh=False)
        if len(clouds) == 1:
            # Of credentials that are refused SkyPilot says all kinds of things; this says it plainly.
            try:
                identity(record.cloud)
            except Lacking:
                pass
            except NotUsed:
                attempt.keep(replace(record, state="down") if nothing else record)
                raise
        if nothing:
            sweep.after_refusal(record, clouds, attempt.began, error)

    def logs(self, record: Record, *, follow: bool, lines: int | None) -> Iterator[str]:
        """Return what SkyPilot and set-up wrote, then the server's log from the machine; what is left here of it when that is gone."""
        up, served = _log(record.name), _log(record.name).with_name("serve.log")
        if up.is_file() and (lines is None or record.failure):
            told = up.read_text("utf-8", "replace").splitlines(keepends=True)
            yield "".join(told if lines is None else told[-lines:] if lines else [])
        if record.state == "down" and record.failure and not served.is_file():
            return
        ssh.verify(record.name, seconds=8)  # SkyPilot, which is asked next, would not
        try:
            yield from sky.job_log(record.cluster, follow=follow, lines=lines)
        except UserError:
            if not served.is_file():
                raise
            kept = served.read_text("utf-8", "replace").splitlines(keepends=True)
            yield "".join(kept[-lines:] if lines else kept)

    def read(self, record: Record, file: str) -> str:
        """Return the text of a file below the node's folder, empty where it is not there; UserError if the node cannot be reached."""
        return ssh.run(record.name, f'cat "{ssh.NODE_DIR}/{file}" 2> /dev/null || true', seconds=30)

    def write(self, record: Record, file: str, text: str) -> None:
        """Replace a file below the node's folder as a whole."""
        script = f'cd "{ssh.NODE_DIR}" && {ssh.received(file, text)} && mv "$new" "{file}"'
        ssh.run(record.name, script, given=text, seconds=30)

    def exchange(self, record: Record, text: str, old: str) -> bool:
        """Replace the node's file of keys if its text is still `old`; False if it is not. UserError if the node cannot be reached."""
        file, lock = files.KEYS_FILE.of(record.name), files.KEYS_LOCK.of(record.name)
        script = (
            f'cd "{ssh.NODE_DIR}" && exec 9>> "{lock}" && flock -w {LOCK_SECONDS} 9 && {ssh.received(file, text)} && '
            f'if [ "$(sha256sum < "{file}")" = "{keys.digest(old)}  -" ]; then mv "$new" "{file}"; else rm "$new"; echo changed; fi'
        )
        return not ssh.run(record.name, script, given=text, seconds=2 * LOCK_SECONDS)

    def extend(self, record: Record, until: float) -> None:
        """Write the machine's new end to its label, so that `reap` lets it be; UserError if it has no machine."""
        if sweep.tell_cloud(record, until) == 0:
            raise UserError(f"{sweep.not_found(record)}; its end was not changed", Exit.CLOUD)


def keep_log(record: Record) -> None:
    """Fetch what a machine's last server wrote, as far as it can be had, so that it is here when the machine goes."""
    with contextlib.suppress(UserError):
        text = "".join(sky.job_log(record.cluster, follow=False, lines=None))
        if text:
            state.write_private(_log(record.name).with_name("serve.log"), text)


def _log(name: str) -> Path:
    return state.folder(name) / "up.log"
