"""The task on a cloud, through SkyPilot's SDK: the one module that imports it.

SkyPilot's own output goes into a log file; what it says of its progress becomes phases of ours, and its exceptions become one line.
No cloud's credentials are copied to a node, unless the user's own configuration names an identity for it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mistralctl import clouds, refusals, state
from mistralctl.errors import Exit, UserError
from mistralctl.heavy import uncollected
from mistralctl.runtime import api_server
from mistralctl.runtime.ssh import Address
from mistralctl.tasks import Task

OnLine = Callable[[str], None]

LAUNCH_SECONDS = 3600.0
QUICK_SECONDS = 120.0
DOWN_SECONDS = 900.0
CANCEL_SECONDS = 60.0  # a drain is at most 25 s, and SkyPilot kills after 30 s
# What its client raises when the API server cannot be reached, or ends while it is listened to.
LOST = ("ApiServerConnectionError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "ChunkedEncodingError")
COPIES_KEYS = ("LOCAL_CREDENTIALS", None)


@dataclass(frozen=True)
class Cluster:
    """A machine as the cloud has it. `status` is SkyPilot's: INIT, UP or STOPPED; prices in USD an hour."""

    name: str
    status: str
    cloud: str
    region: str
    zone: str | None
    instance_type: str
    spot: bool
    price: float | None
    launched_at: float
    address: Address | None


class Lines(io.TextIOBase):
    """A stream that keeps everything in a file and passes whole lines on."""

    def __init__(self, path: Path, on_line: OnLine) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = path.open("a", encoding="utf-8", errors="replace")
        self._on_line = on_line
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._file.write(text)
        self._file.flush()
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._on_line(line)
        return len(text)


def configuration(existing: Mapping[str, Any], users: Mapping[str, Any]) -> dict[str, Any]:
    """The project configuration for SkyPilot: the folder's own (`existing`), and no key of a cloud goes to a node.

    An identity that the user's configuration (`users`) or the folder's names for a cloud is kept.
    """
    found: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in existing.items()}
    for cloud in (*clouds.names(), "kubernetes"):
        section = found.setdefault(cloud, {})
        named = section.get("remote_identity", (users.get(cloud) or {}).get("remote_identity"))
        if named in COPIES_KEYS:
            section["remote_identity"] = "NO_UPLOAD"
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: SkyPilot's configuration cannot be read ({error}); mend it", Exit.CLOUD) from error
    return found if isinstance(found, dict) else {}


def _users_file() -> Path:
    return Path(os.environ.get("SKYPILOT_GLOBAL_CONFIG") or "~/.sky/config.yaml").expanduser()


def _project_file() -> Path:
    return Path(os.environ.get("SKYPILOT_PROJECT_CONFIG") or ".sky.yaml").expanduser()


def own_identity(cloud: str) -> bool:
    """Whether SkyPilot's configuration names an identity of the user's for a cloud's nodes: what it may do, they alone know."""
    sections = [_read_yaml(file).get(cloud) or {} for file in (_project_file(), _users_file())]
    named = next((section["remote_identity"] for section in sections if "remote_identity" in section), None)
    return named not in (*COPIES_KEYS, "NO_UPLOAD", "SERVICE_ACCOUNT")


class _Silence:
    """Standard output and error go nowhere while any thread wants that."""

    def __init__(self) -> None:
        self._lock, self._wanted, self._stack = threading.Lock(), 0, contextlib.ExitStack()

    def begin(self) -> None:
        with self._lock:
            if not self._wanted:
                self._stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                self._stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            self._wanted += 1

    def end(self) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                self._stack.close()


_silence = _Silence()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What SkyPilot prints by itself while it is called goes nowhere."""
    _silence.begin()
    try:
        yield
    finally:
        _silence.end()


@contextlib.contextmanager
def _sdk() -> Iterator[Any]:
    """The module `sky`, with our configuration over the user's; its exceptions become one line."""
    ours = state.home() / "skypilot.yaml"
    project = _project_file()
    if project != ours:  # it is, from the second call on
        state.write_private(ours, yaml.safe_dump(configuration(_read_yaml(project), _read_yaml(_users_file()))))
        os.environ["SKYPILOT_PROJECT_CONFIG"] = str(ours)
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    with state.secrets_hidden():  # its API server, which the first call starts, inherits our environment and stays
        try:
            with _quiet(), uncollected() if "sky" not in sys.modules else contextlib.nullcontext():
                import sky
                from sky.server import common
        except ImportError as error:
            raise UserError(
                f"SkyPilot is not installed; {' or '.join(cloud.install for cloud in clouds.every())}, or use --cloud local",
                Exit.CLOUD,
            ) from error
        if common.is_api_server_local():
            from sky.server.requests.queues import mp_queue

            ports = common.get_local_api_server_port(), mp_queue.get_queue_manager_port()
            api_server.clear_the_way(common.get_server_url(), ports)
        try:
            yield sky
        except UserError:
            raise
        except Exception as error:
            raise _in_our_words(sky, error) from error


def _in_our_words(sky: Any, error: Exception) -> UserError:
    """SkyPilot's exceptions as one line with a way out."""
    from sky.server import common

    kind, text = type(error).__name__, refusals.plain(str(error))
    first = next((line.strip() for line in text.splitlines() if line.strip()), kind)
    if isinstance(error, sky.exceptions.NoCloudAccessError):
        what = "mistralctl doctor --cloud CLOUD says what a cloud does not like"
        return UserError(f"SkyPilot has no access to any cloud; {what}", Exit.CLOUD)
    if "API server process exited" in text:
        return UserError(f"SkyPilot's API server does not start: {api_server.why_not()}", Exit.CLOUD)
    if kind in LOST:
        local = common.is_api_server_local()
        what = "run the same again, which starts it anew and goes on" if local else "see that it runs, then run the same again"
        return UserError(f"SkyPilot's API server does not answer ({common.get_server_url()}); {what}", Exit.CLOUD)
    if "API server and client version mismatch" in text or kind == "APIVersionMismatchError":
        return UserError("SkyPilot's API server is of another version; run: sky api stop; sky api start", Exit.CLOUD)
    if isinstance(error, sky.exceptions.ClusterOwnerIdentityMismatchError):
        return UserError(f"this machine belongs to another identity of the cloud: {first}", Exit.CLOUD)
    mend = refusals.registering([text])
    return UserError(f"SkyPilot: {first[:400]} ({kind}){mend and f'; {mend}'}", Exit.CLOUD)


def _bounded(sky: Any, request: Any, seconds: float, log: Path, on_line: OnLine) -> Any:
    """The result of a request, its output into the log; cancelled when it takes too long or we are interrupted."""
    outcome: list[Any] = []
    lines = Lines(log, on_line)

    def wait() -> None:
        try:
            outcome.append((True, sky.stream_and_get(request, output_stream=lines)))
        except Exception as error:  # noqa: BLE001 - passed on to the caller below
            outcome.append((False, error))

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    try:
        waiter.join(seconds)
    except BaseException:
        with contextlib.suppress(Exception):
            sky.get(sky.api_cancel([request]))
        raise
    if not outcome:
        with contextlib.suppress(Exception):
            sky.get(sky.api_cancel([request]))
        raise UserError(f"SkyPilot was not done after {seconds / 60:.0f} minutes; see the log {log}", Exit.CLOUD)
    good, value = outcome[0]
    if not good:
        raise value
    return value


def _address(found: Any) -> Address | None:
    handle, credentials = found.handle, found.credentials or {}
    hosts = getattr(handle, "cached_external_ips", None) or []
    ports = getattr(handle, "cached_external_ssh_ports", None) or []
    if not hosts or not {"ssh_private_key", "ssh_private_key_content"} & set(credentials):
        return None
    key = Path(str(credentials.get("ssh_private_key") or "")).expanduser()
    content = credentials.get("ssh_private_key_content")
    if content and not key.is_file():  # the API server runs elsewhere
        key = state.home() / "ssh" / f"{found.name}.key"
        state.write_private(key, content)
    user = str(getattr(handle, "ssh_user", None) or credentials.get("ssh_user") or "ubuntu")
    [machine, *_] = getattr(handle, "instance_ids", None) or [""]
    proxy = credentials.get("ssh_proxy_command") or ""
    return Address(str(hosts[0]), int(ports[0]) if ports else 22, user, str(key), proxy, str(machine))


def _cluster(found: Any) -> Cluster:
    launched = getattr(found.handle, "launched_resources", None)
    price = None
    if launched is not None:
        with contextlib.suppress(Exception):  # a type that the catalog does not know any more
            price = round(float(launched.get_cost(3600)), 4)
    return Cluster(
        found.name, found.status.value, str(found.cloud or getattr(launched, "cloud", "")).lower(),
        str(found.region or getattr(launched, "region", "") or ""), getattr(launched, "zone", None),
        str(getattr(launched, "instance_type", "") or ""), bool(getattr(launched, "use_spot", False)), price,
        float(found.launched_at), _address(found),
    )  # fmt: skip


def clusters(names: Sequence[str], *, refresh: bool) -> dict[str, Cluster]:
    """The machines of these names, by name; with `refresh`, what the cloud itself says now."""
    with _sdk() as sky:
        mode = sky.StatusRefreshMode.FORCE if refresh else sky.StatusRefreshMode.NONE
        request = sky.status(list(names), refresh=mode, _include_credentials=True)
        found = sky.get(request)
        return {one.name: _cluster(one) for one in found}


def refusal_of(cloud: str, log: Path) -> str:
    """Why SkyPilot would rent no machine on a cloud, in its own check's words; empty if it would."""
    said: list[str] = []
    with _sdk() as sky:
        from sky.client import sdk  # `sky.check` is a module

        found = _bounded(sky, sdk.check((cloud,), verbose=False), QUICK_SECONDS, log, said.append)
        if any("compute" in enabled.get(cloud.upper(), ()) or "compute" in enabled.get(cloud, ()) for enabled in found.values()):
            return ""
    text = refusals.plain("\n".join(said))
    reason = text.partition("Reason")[2].partition(":")[2]
    return " ".join(reason.split())[:120] or "sky check says no more than that it is not enabled"


def _task(sky: Any, task: Task) -> Any:
    return sky.Task.from_yaml_config(copy.deepcopy(task))  # it takes the parts out of what it is given


def launch(task: Task, cluster: str, log: Path, on_line: OnLine, on_request: Callable[[str], None]) -> int:
    """Provisions a machine for the task (or goes on with the one that is there), sets it up, starts its job; the job's id.

    `on_request` is told the id of SkyPilot's request, which goes on in its API server also when this process is gone.
    """
    with _sdk() as sky:
        try:
            with _quiet():
                request = sky.launch(_task(sky, task), cluster_name=cluster)
            on_request(str(request))
            job, _ = _bounded(sky, request, LAUNCH_SECONDS, log, on_line)
        except sky.exceptions.ResourcesUnavailableError as error:
            raise refusals.refused(str(error), error.failover_history, log) from error
        if job is None:
            raise UserError(f"SkyPilot started no job; see the log {log}", Exit.CLOUD)
        return int(job)


def replace_job(task: Task, cluster: str, log: Path, on_line: OnLine) -> int:
    """Ends the running jobs of a machine, which drain first, and starts the task's `run` on it; the job's id."""
    cancel_jobs(cluster)
    with _sdk() as sky:
        with _quiet():
            request = sky.exec(_task(sky, task), cluster)
        job, _ = _bounded(sky, request, QUICK_SECONDS, log, on_line)
        if job is None:
            raise UserError(f"SkyPilot started no job; see the log {log}", Exit.CLOUD)
        return int(job)


def cancel_request(request: str) -> None:
    """Ends a request of an earlier process, if it still runs."""
    with _sdk() as sky, contextlib.suppress(Exception):
        sky.get(sky.api_cancel([request]))


def running_jobs(cluster: str) -> dict[int, str] | None:
    """The names of the jobs that run or wait on a machine, by id; None if its runtime does not work (yet)."""
    with _sdk() as sky:
        try:
            return {job.job_id: job.job_name for job in sky.get(sky.queue(cluster, skip_finished=True))}
        except (sky.exceptions.ClusterNotUpError, sky.exceptions.CommandError):
            return None


def cancel_jobs(cluster: str, but: int | None = None) -> None:
    """Ends the jobs of a machine (all but one) and waits until they have drained."""

    def others() -> list[int]:
        return [job for job in running_jobs(cluster) or () if job != but]

    if not (ids := others()):
        return
    with _sdk() as sky:
        sky.get(sky.cancel(cluster, job_ids=ids))
        deadline = time.monotonic() + CANCEL_SECONDS
        while others() and time.monotonic() < deadline:
            time.sleep(0.5)


def tail(cluster: str, job: int, lines: Lines) -> None:
    """Writes a job's log to a stream until the job has ended."""
    with _sdk() as sky:
        sky.tail_logs(cluster, job, follow=True, output_stream=lines)


def job_log(cluster: str, *, follow: bool, lines: int | None) -> Iterator[str]:
    """Pieces of the log of a machine's last job."""
    with _sdk() as sky:
        pieces = sky.tail_logs(cluster, None, follow=follow, tail=lines or 0, preload_content=False)
        for piece in pieces:
            if piece is not None:
                yield piece


def down(cluster: str, log: Path) -> bool:
    """Takes a machine away; False if SkyPilot knows of none."""
    with _sdk() as sky:
        try:
            _bounded(sky, sky.down(cluster), DOWN_SECONDS, log, lambda line: None)
        except sky.exceptions.ClusterDoesNotExist:
            return False
        return True
