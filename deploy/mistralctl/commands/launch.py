"""`mistralctl up` on a cloud: convergent, so that it goes on wherever an earlier one was left."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from mistralctl import certificates, endpoint, gate, phases, readiness, state
from mistralctl.clouds import LOCAL, NotUsed, listing
from mistralctl.commands import down, extend, logs
from mistralctl.commands import plan as plan_command
from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.phases import Milestones, PhaseEvent
from mistralctl.plan import Plan
from mistralctl.runtime import rundir, ssh
from mistralctl.runtime.local import alive
from mistralctl.state import NOWHERE, Record
from mistralctl.tasks import Task, owner, resources_id, setup_id
from mistralctl.tasks.serve import node_port

if TYPE_CHECKING:
    from mistralctl.runtime.following import Following

START_SECONDS = 2400.0
TUNNEL_SECONDS = 60.0
PUBLIC_SECONDS = 60.0
SECRETS_SECONDS = 120.0
WORDS_SECONDS = 3.0  # for a launcher that ends its server to say why

OnPhase = Callable[[PhaseEvent], None]
Confirm = Callable[[str], bool]
Check = Callable[[bool], None]


def cluster_name(name: str) -> str:
    """SkyPilot's name of a deployment's machine, apart from the user's own clusters."""
    return f"mctl-{name}"


@dataclass
class Progress:
    """What was heard so far, passed on as it comes."""

    on_phase: OnPhase
    milestones: Milestones = field(default_factory=Milestones)
    events: list[PhaseEvent] = field(default_factory=list)
    failure: str = ""
    last: str = ""

    def hear(self, event: PhaseEvent) -> None:
        """Takes an event."""
        self.events.append(event)
        if event.event == "fail":
            self.failure = event.message
        self.on_phase(event)

    def line(self, line: str) -> None:
        """Takes a line of SkyPilot's or of the job's log."""
        if phases.parse(line) is None and line.strip():
            self.last = line.strip()
        self.failure = phases.full_memory(line) or self.failure
        for event in self.milestones.read(line, time.time()):
            self.hear(event)

    def ended(self, phase: str) -> bool:
        """Whether a phase has come to its end."""
        return any(event.phase == phase and event.event == "end" for event in self.events)


def learn(record: Record) -> Record:
    """The record with what SkyPilot knows of the machine by now; its SSH address is kept for later."""
    from mistralctl.runtime import sky

    found = sky.clusters([record.cluster], refresh=False).get(record.cluster)
    if found is None:
        return record
    if found.address is not None:
        ssh.remember(record.name, found.address)
    return replace(
        record, cloud=found.cloud or record.cloud, region=found.region, machine=found.instance_type, spot=found.spot,
        price=found.price, address=found.address.host if record.public and found.address is not None else record.address,
    )  # fmt: skip


def _send_secrets(record: Record, secrets: Mapping[str, str]) -> None:
    """Writes the secrets to the node, and the address by which the world knows it, for its certificate."""
    if record.public and record.address == NOWHERE:
        raise UserError(f"{record.name}: SkyPilot does not know its machine's address yet; run mistralctl up again", Exit.CLOUD)
    ssh.write_secrets(record.name, {**secrets, **({"address": record.address} if record.public else {})})


class SecretsSender:
    """Writes the secrets to the node as soon as its machine is there; `finish` says whether that went well."""

    def __init__(self, record: Record, secrets: Mapping[str, str]) -> None:
        self._record, self._secrets = record, secrets
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self) -> None:
        """Starts to write them, if that was not begun yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, daemon=True)
            self._thread.start()

    def _send(self) -> None:
        deadline = time.monotonic() + SECRETS_SECONDS
        while True:
            try:
                self._record = learn(self._record)
                _send_secrets(self._record, self._secrets)
                self._error = None
                return
            except UserError as error:
                self._error = error
            if time.monotonic() > deadline:
                return
            time.sleep(1)

    def finish(self) -> Record:
        """The record as it was learnt, once the secrets are there; UserError if they could not be written."""
        self.begin()
        if self._thread is not None:
            self._thread.join(SECRETS_SECONDS + 10)
        if self._error is not None:
            raise self._error
        return self._record


def _open_tunnel(record: Record) -> Record:
    """The record with a tunnel, which dials until there is a machine and lets through what its server answers."""
    ssh.end_tunnel(record.pid, record.pid_started)
    record = replace(record, pid=None, pid_started=None)
    state.save(record)  # the tunnel reads its port there
    pid, started = ssh.start_tunnel(record.name)
    record = replace(record, pid=pid, pid_started=started)
    state.save(record)
    return record


def _reach(record: Record) -> Record:
    """Waits until the server answers through the tunnel; UserError if it does not."""
    deadline = time.monotonic() + TUNNEL_SECONDS
    while not readiness.answers(record, probing=True):
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: its server cannot be reached through SSH at 127.0.0.1:{record.port} (log: "
                f"{state.folder(record.name) / 'tunnel.log'}); mistralctl status {record.name} says whether it runs",
                Exit.NETWORK,
            )
        time.sleep(0.1)
    return record


def _publish(record: Record, task: Task) -> Record:
    """A public deployment's record once its server can be reached: its certificate pinned, the cloud's firewall as asked for."""
    allowed = json.loads(task["envs"]["MISTRALCTL_ALLOW"])
    certificates.pin(record.name, rundir.read(record, f"run/{record.name}/shared/tls.crt"))
    listing(record.cloud).narrow(owner(os.environ), record.name, record.region, record.port, allowed or ["0.0.0.0/0"])
    deadline = time.monotonic() + PUBLIC_SECONDS
    while not readiness.answers(record, probing=True):
        if why := readiness.refusal(record):
            raise UserError(f"{record.name}: its server refuses this machine ({why}); add its address with --allow", Exit.NETWORK)
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.name}: its server cannot be reached at {record.address}:{record.port}; if --allow is given, it must hold "
                "this machine's address; a firewall between here and there may forbid it, too",
                Exit.NETWORK,
            )
        time.sleep(0.5)
    return record


def connect(name: str) -> Record:
    """Opens the tunnel of a deployment again, on the same port; the record."""
    record = state.known(name)
    if not record.cluster:
        raise UserError(f"{name} runs on this machine: {record.base_url} needs no tunnel", Exit.CONFLICT)
    if record.state == "down":
        raise UserError(f"{name} is down; run mistralctl up first", Exit.NOT_FOUND)
    if record.public:
        raise UserError(f"{name} is public: {record.base_url} needs no tunnel", Exit.CONFLICT)
    _free(record)
    if not endpoint.is_free(record.port):
        raise UserError(f"port {record.port} is taken by another program; stop that program", Exit.CONFLICT)
    return _reach(_open_tunnel(learn(record)))


def _free(record: Record) -> None:
    """Waits until the port that a tunnel of ours had is free again."""
    ssh.end_tunnel(record.pid, record.pid_started)
    deadline = time.monotonic() + 5
    while not endpoint.is_free(record.port) and time.monotonic() < deadline:
        time.sleep(0.1)


def _unchanged(old: Record | None, task: Task) -> Record | None:
    """The record if the deployment is up with this very task, by asking it, which needs neither a cloud nor SkyPilot."""
    if old is None or old.state != "up" or not old.cluster:
        return None
    if old.serving_id != task["envs"]["MISTRALCTL_SERVING_ID"] or old.resources_id != resources_id(task):
        return None
    return old if readiness.answers(old) else None


def _replaced_machine(old: Record, task: Task, confirm: Confirm) -> bool:
    """Whether a machine has to go first, after a yes; UserError if that was not said."""
    if not old.cluster or old.state == "down" or old.resources_id == resources_id(task):
        return False
    machine = f"{old.machine or 'its machine'} in {old.region or old.cloud}"
    question = f"{old.name}: what was changed needs another machine; {machine} and what is on its disk go away"
    if not confirm(question):
        raise UserError(f"{question}; say --yes to do that, or give the new one another --name", Exit.CONFLICT)
    return True


def _start(
    record: Record, task: Task, old: Record | None, secrets: Mapping[str, str], progress: Progress
) -> tuple[Record, str, Following]:
    """Brings machine, set-up and job into being, as far as they are not there; the record, what was done, and the job's log."""
    from mistralctl.runtime import sky
    from mistralctl.runtime.following import Following

    log = state.folder(record.name) / "up.log"
    if old is not None and old.request:
        sky.cancel_request(old.request)
    there = sky.clusters([record.cluster], refresh=old is not None).get(record.cluster)
    living = there is not None and there.status == "UP"
    jobs = sky.running_jobs(record.cluster) if living else None
    same = [job for job, name in (jobs or {}).items() if name == task["name"]]
    set_up = jobs is not None and record.setup_id == setup_id(task)
    if jobs == {}:  # its server has ended: what it said last stays beside the next one's log
        logs.keep(record)
        (log.parent / "serve.log").replace(log.parent / "serve.before.log")
    if there is not None and not same:  # SkyPilot does not change a machine's labels, and its life begins anew
        ttl = task["envs"]["MISTRALCTL_TTL_MINUTES"]
        until = time.time() + START_SECONDS + int(ttl) * 60 if ttl else None
        extend.tell_cloud(replace(record, cloud=there.cloud, region=there.region), until)
    if same or set_up:
        record = learn(record)
        _send_secrets(record, secrets)
        job = same[-1] if same else sky.replace_job(task, record.cluster, log, progress.line)
        action = "replaced" if jobs and not same else "started"
    else:
        record = replace(record, setup_id="")
        if jobs:
            sky.cancel_jobs(record.cluster)
        log.write_bytes(b"")
        sender = SecretsSender(record, secrets)

        def line(text: str) -> None:
            progress.line(text)
            if any(event.phase == "files" for event in progress.events):  # its set-up comes next, and wants them
                sender.begin()

        for event in progress.milestones.begin(time.time()):
            progress.hear(event)
        try:
            job = sky.launch(task, record.cluster, log, line, lambda request: state.save(replace(record, request=request)))
            if there is not None:  # a launch that was interrupted may have come to a job of its own
                sky.cancel_jobs(record.cluster, but=job)
        except UserError as error:
            if progress.failure:
                raise UserError(f"{progress.failure} (log: {log})", Exit.SERVER) from error
            raise
        record = sender.finish()
        state.save(record)
        action = "replaced" if jobs else "started"
    (log.parent / "serve.log").write_bytes(b"")
    if not record.public:
        record = _open_tunnel(record)  # while the engine starts
    return record, action, Following(record.name, record.cluster, job, log.with_name("serve.log"), progress.line)


def _until(phase: str, record: Record, following: Following, progress: Progress) -> None:
    """Waits for the end of a phase of the server's; UserError if its job ends before that."""
    if not following.wait(START_SECONDS, lambda: progress.ended(phase), lambda: bool(progress.failure)):
        raise _ended(record, progress.failure or f"its job ended: {progress.last[:300]}")


def _ended(record: Record, why: str) -> UserError:
    return UserError(
        f"{why} (log: {state.folder(record.name) / 'serve.log'}; the machine goes by itself in a few minutes, or at once with "
        f"mistralctl down {record.name})",
        Exit.SERVER,
    )


def _look(record: Record, following: Following, progress: Progress) -> gate.Report:
    """What the gate sees while the launcher checks what its engine computes; UserError, with the launcher's words if that ended it."""
    try:
        return gate.look(record, progress.hear)
    except UserError as error:
        with contextlib.suppress(UserError):
            following.wait(WORDS_SECONDS, lambda: bool(progress.failure), lambda: False)
        if progress.failure:
            raise _ended(record, progress.failure) from error
        raise


def _clouds(plan: Plan) -> list[str]:
    return list(dict.fromkeys(option.cloud for option in plan.options))


def _sweep(record: Record, clouds: Sequence[str], since: float, refused: UserError) -> None:
    """Makes sure that a launch since then which came to no machine has left nothing on these clouds; the record says how that went.

    What is older stays, though nobody here knows it. UserError with both reasons and tables if something of the launch stays as well, or
    a cloud cannot be asked.
    """
    unsure: list[tuple[str, UserError | None]] = []
    try:
        for cloud in clouds:
            try:
                if down.wait_until_gone(replace(record, cloud=cloud, region=""), promised=False, since=since):
                    unsure.append((cloud, None))
            except NotUsed:
                continue
            except UserError as error:
                unsure.append((cloud, error))
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; something of {record.name} may be left: mistralctl down {record.name} takes it away", Exit.INTERRUPTED
        ) from None
    state.save(replace(record, cloud=unsure[0][0]) if unsure else replace(record, state="down"))
    if errors := [error for _, error in unsure if error is not None]:
        every = [refused, *errors]
        raise UserError("; and ".join(map(str, every)), refused.code, "\n".join(filter(None, (one.details for one in every))))


@contextlib.contextmanager
def _stopped_if_refused(record: Record) -> Iterator[None]:
    """A server that does not pass the gate is stopped."""
    from mistralctl.runtime import sky

    try:
        yield
    except UserError as error:
        if error.code == Exit.SERVER:
            with contextlib.suppress(UserError):  # why it was refused is what the user should read
                sky.cancel_jobs(record.cluster)
        raise


def run(
    sourced: Sourced, plan: Plan, secrets: Mapping[str, str], reserved: set[int], on_phase: OnPhase, confirm: Confirm,
    check: Check,
) -> tuple[Record, str, str]:  # fmt: skip
    """The record of a deployment that answers, what was done (`started`, `replaced`, `unchanged`), and its answer.

    `check` is called before a machine is rented (told whether one of ours goes for it), and stops that with a UserError.
    """
    began, old = time.time(), state.read(plan.name)
    if old is not None and old.cloud == LOCAL and old.state != "down":
        raise UserError(
            f"{plan.name} runs on this machine; run mistralctl down {plan.name}, or give another --name", Exit.CONFLICT
        )
    tunnelled = old is not None and alive(old.pid, old.pid_started)
    place = sourced.place("port") if plan.spec.port else f"port of {plan.name}"
    remembered = old.port if old and not old.public else None
    port = (
        node_port(plan) if plan.spec.public
        else endpoint.choose_port(plan.spec.port, remembered, reserved, place=place, ours=tunnelled)
    )  # fmt: skip
    task = plan_command.render_plan(plan)
    task["name"] = f"{plan.name}-{task['envs']['MISTRALCTL_SERVING_ID']}"
    if (same := _unchanged(old, task)) is not None and same.port == port:
        return same, "unchanged", ""
    from mistralctl.runtime import sky

    record = Record(
        plan.name, plan.chosen.cloud, "starting", plan.model.name, plan.served_model_name, port,
        task["envs"]["MISTRALCTL_NODE_DIR"], task["envs"]["MISTRALCTL_SERVING_ID"], time.time(), plan.model.chat, task=task,
        cluster=cluster_name(plan.name), resources_id=resources_id(task), public=plan.spec.public,
        host=certificates.own(plan.spec).host if plan.spec.cert else "",
    )  # fmt: skip
    if old is not None and old.cluster and old.state != "down":
        replaced = _replaced_machine(old, task, confirm)  # asks before anything is touched
        if replaced:
            check(True)
        ssh.end_tunnel(old.pid, old.pid_started)
        if replaced:
            sky.down(old.cluster, state.folder(plan.name) / "up.log")
            old = None
        else:
            record = replace(record, created_at=old.created_at, setup_id=old.setup_id)  # set only once it was seen through
    else:
        check(False)
    (state.folder(plan.name) / "serve.log").touch()
    state.save(record)
    progress = Progress(on_phase)
    try:
        record, action, following = _start(record, task, old, secrets, progress)
        with contextlib.closing(following):
            _until("engine", record, following, progress)
            state.save(record)
            record = _publish(record, task) if record.public else _reach(record)
            with _stopped_if_refused(record):
                report = _look(record, following, progress)
            _until("ready", record, following, progress)
        record = replace(record, setup_id=setup_id(task))
        state.save(record)
        with _stopped_if_refused(record):
            record = gate.let_in(record, report, progress.hear)
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; {plan.name} may have a machine by now: mistralctl up goes on with it, mistralctl down {plan.name} takes "
            "it away",
            Exit.INTERRUPTED,
        ) from None
    except UserError as error:
        left = state.known(plan.name)
        ssh.end_tunnel(left.pid, left.pid_started)
        if error.code != Exit.CLOUD:
            raise
        clouds, nothing = _clouds(plan), not sky.clusters([record.cluster], refresh=False)
        if len(clouds) == 1:
            # Of credentials that are refused SkyPilot says all kinds of things; this says it plainly.
            try:
                listing(record.cloud).identity()
            except NotUsed:
                state.save(replace(record, state="down") if nothing else record)
                raise
        if nothing:
            _sweep(record, clouds, began, error)
        raise
    record = replace(record, state="up", phases=tuple(asdict(phase) for phase in phases.durations(progress.events)))
    state.save(record)
    return record, action, report.answer
