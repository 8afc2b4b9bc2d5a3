"""What this laptop remembers of each deployment: a record and a key, in files that only the user can read."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import repeat
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from mistral_contract import files, untrusted
from mistral_contract.envs import MINUTES, USD, Env, Serve
from mistral_contract.envs import of as envs_of
from mistral_contract.suggest import suggest

from mistralctl import clouds, own_files, tasks
from mistralctl.errors import Exit, UserError
from mistralctl.spec import NAME_PATTERN

if TYPE_CHECKING:
    from pydantic import TypeAdapter

State = Literal["starting", "up", "down"]

# Variables that may hold a secret, and that no process needs which we start.
SECRET_VARIABLES = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


SCHEMA = 1  # of the record; a version that changes what a field means counts it up
CLUSTER = "mctl-"  # before a deployment's name: SkyPilot's name of its machine
NOWHERE = "127.0.0.1"  # the address of a machine that has none for others, or none yet


@dataclass(frozen=True)
class Record:
    """A deployment as `up` left it. `pid`, `pid_started` (seconds since the epoch) and `pid_mark` name a process of this machine
    (`processes.mark`).

    On a cloud that process is the tunnel; `cluster` is SkyPilot's name of the machine, `price` USD an hour, `request` SkyPilot's
    id of a launch that nobody heard the end of, `setup_id` and
    `resources_id` are hashes of what its set-up and the machine itself were made from. `ends_at` (seconds since the epoch) is
    the end that `extend` gave it. Where it is `public`, `address` is the machine's and `host` the name in the user's own certificate.
    `gate` is what the gate's probe found (`gate.Report`), `kind` the name of the task's kind (`tasks.kinds`). `failure` is why the last `up`
    came to nothing. `more` are the fields of a newer version, which are kept as they are.
    `account` is the cloud's in which the machine was rented.
    `weights_digest` is that of the weights which were served first, or were asked for: later ones must have it.
    `command` is the command line that makes it again, empty in records of earlier versions.
    """

    name: str
    cloud: str
    state: State
    model: str
    served_model_name: str
    port: int
    node_dir: str
    serving_id: str
    created_at: float
    chat: bool = True
    pid: int | None = None
    pid_started: float | None = None
    phases: tuple[dict[str, Any], ...] = ()
    task: dict[str, Any] = field(default_factory=dict)
    cluster: str = ""
    region: str = ""
    machine: str = ""
    spot: bool = False
    price: float | None = None
    request: str = ""
    setup_id: str = ""
    resources_id: str = ""
    ends_at: float | None = None
    public: bool = False
    address: str = NOWHERE
    host: str = ""
    gate: dict[str, Any] = field(default_factory=dict)
    kind: str = "serve"
    pid_mark: str = ""
    failure: str = ""
    account: str = ""
    weights_digest: str = ""
    command: str = ""
    schema: int = SCHEMA
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return Path(self.node_dir) / files.RUN.of(self.name)

    @property
    def again(self) -> str:
        """The command that brings it up again where it was: one without its cloud might rent a machine."""
        return self.command or shlex.join(["mistralctl", "up", self.model, "--name", self.name, "--cloud", self.cloud])

    @property
    def base_url(self) -> str:
        return f"https://{self.host or self.address}:{self.port}/v1" if self.public else f"http://127.0.0.1:{self.port}/v1"


class _Hidden:
    """The variables that may hold a secret, out of this process's environment while anybody wants them to be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._kept: dict[str, str] = {}

    def begin(self) -> None:
        with self._lock:
            self._wanted += 1
            self._kept |= {name: os.environ.pop(name) for name in SECRET_VARIABLES if name in os.environ}

    def end(self) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                os.environ.update(self._kept)
                self._kept = {}


_hidden = _Hidden()


@contextmanager
def secrets_hidden() -> Iterator[None]:
    """While this lasts, in whichever thread, no process that a library starts inherits a secret of ours."""
    _hidden.begin()
    try:
        yield
    finally:
        _hidden.end()


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that we start."""
    return {name: environ[name] for name in environ if name not in SECRET_VARIABLES}  # those may be hidden meanwhile


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of everything that mistralctl keeps on this machine: MISTRALCTL_HOME, or ~/.mistralctl."""
    return Path(environ.get("MISTRALCTL_HOME") or Path.home() / ".mistralctl").absolute()


def folder(name: str) -> Path:
    """Where the record, the key and the logs of a deployment lie."""
    return home() / "deployments" / name


def write_private(path: Path, text: str) -> None:
    """Replaces a file as a whole, on the disk; nobody but the user can read it at any moment."""
    own_files.write(path, text)


class Unreadable(UserError):
    """A record that cannot be used: `state` is `damaged`, or `newer` where another version of mistralctl made it."""

    def __init__(self, message: str, state: Literal["damaged", "newer"] = "damaged") -> None:
        super().__init__(message, Exit.CONFLICT)
        self.state = state


def save(record: Record) -> None:
    """Writes the record."""
    known = asdict(record)
    write_private(folder(record.name) / "record.json", json.dumps(known.pop("more") | known, indent=1) + "\n")


def is_name(name: str) -> bool:
    """Whether a deployment can have this name, and its folder."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def read(name: str) -> Record | None:
    """The record of a name, None if there never was one; Unreadable if what is there is no record of this version."""
    if not is_name(name):
        if name in names():
            raise Unreadable(f"{str(folder(name))!r} has no deployment's name; remove it")
        return None
    path = folder(name) / "record.json"
    try:
        return _record(name, own_files.read(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UserError as error:
        raise Unreadable(str(error)) if not isinstance(error, Unreadable) else error from None
    except (ValueError, TypeError, RecursionError) as error:
        raise Unreadable(
            f"{path} is damaged ({first_problem(error)}); mistralctl down {name} ends what runs of it; delete it and run up again"
        ) from None


def first_problem(error: Exception) -> str:
    """What is wrong, of all that may be."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        one = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}"
    return str(error)[:200]


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


@cache
def _checks() -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _record(name: str, text: str) -> Record:
    """The record in a text; ValueError, TypeError or RecursionError if it is none."""
    data = json.loads(text, parse_constant=_no_constant)
    if not isinstance(data, dict):
        raise ValueError("it is no object")
    path, schema = folder(name) / "record.json", data.get("schema", SCHEMA)
    if type(schema) is int and schema > SCHEMA:
        raise Unreadable(
            f"{path} was made by a newer version of mistralctl (schema {schema}, this one knows {SCHEMA}); use that version, or upgrade",
            "newer",
        )
    known = {one.name for one in fields(Record)} - {"more"}
    data = {key: data[key] for key in data if key in known} | {"more": {key: data[key] for key in data if key not in known}}
    found = _checks().validate_json(json.dumps(data, allow_nan=False), strict=True)
    if found.name != name:
        raise ValueError(f"it is of {found.name!r}")
    known_here = {"cloud": (*clouds.names(), clouds.LOCAL), "kind": [one.name for one in iter_modules(tasks.__path__)]}
    for what, every in known_here.items():
        if (value := getattr(found, what)) not in every:
            raise Unreadable(
                f"{path}: the {what} {value!r} is not known to this version; use the one that made it, or upgrade", "newer"
            )
    if wrong := next((what for what, right in _held(found).items() if not right), ""):
        raise ValueError(wrong)
    return found


def _held(found: Record) -> dict[str, bool]:
    """What holds for each record that `up` writes, beside the types."""
    task = found.task
    texts = [found.node_dir, found.host, found.address, found.region, found.machine]
    envs, resources = task.get("envs", {}), task.get("resources", {})
    labels = resources.get("labels", {}) if isinstance(resources, dict) else None
    return {
        "cluster: it is none of this deployment's": found.cluster in ("", f"{CLUSTER}{found.name}"),
        "pid: it is none of a process": found.pid is None or 0 < found.pid < 1 << 22,
        "port: it is none": 0 <= found.port < 1 << 16,
        "a text holds control characters": all(text.isprintable() for text in texts),
        "task.envs: should be an object of texts": _texts(envs),
        "task.envs: should hold minutes and amounts as the contract has them": not _texts(envs) or all(map(_readable, _NUMBERS, repeat(envs))),
        "task.resources: should be an object": isinstance(resources, dict),
        "task.resources.labels: should be an object of texts": labels is None or _texts(labels),
        "phases: should be names with seconds": all(
            phase.keys() == {"phase", "seconds"} and isinstance(phase["phase"], str) and type(phase["seconds"]) in (int, float)
            for phase in found.phases
        ),
    }  # fmt: skip


# What commands count with; the rest of a task is the node's to judge.
_NUMBERS = tuple(row for row in envs_of(Serve) if row.kind in (MINUTES, USD))


def _readable(row: Env, envs: Mapping[str, str]) -> bool:
    try:
        row.read(envs)
    except ValueError:
        return False
    return True


def _texts(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def known(name: str) -> Record:
    """The record of a name; UserError if there never was one."""
    record = read(name)
    if record is None:
        near = suggest(name, filter(is_name, names()))
        hint = f"did you mean {near}?" if near else "mistralctl status lists what there is"
        raise UserError(f"there is no deployment {name!r}; {hint}", Exit.NOT_FOUND)
    return record


def again(name: str) -> str:
    """The command that brings a name up again, as far as this laptop knows of it."""
    with suppress(UserError):
        if (record := read(name)) is not None:
            return record.again
    return "mistralctl up"


def names() -> list[str]:
    """Every name that was ever up here, also of records that cannot be read."""
    found = []
    for path in folder("").glob("*"):
        with suppress(OSError):  # a file, or a folder that this user may not enter
            (path / "record.json").lstat()
            found.append(path.name)
    return sorted(found)


def every() -> tuple[list[Record], dict[str, Unreadable]]:
    """All records that can be read, and why the others cannot, by name."""
    records, unreadable = [], {}
    for name in names():
        try:
            record = read(name)
        except Unreadable as error:
            unreadable[name] = error
        else:
            records += [record] if record is not None else []
    return records, unreadable


@contextmanager
def locked(name: str, doing: str, *, seconds: float = 0) -> Iterator[None]:
    """While this lasts no other command changes the deployment; UserError that says who does, after so many seconds."""
    from filelock import FileLock, Timeout

    place = own_files.folder(folder(name))
    holder = place / "lock.by"
    lock = FileLock(place / "lock", timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        by = "another command"
        with suppress(OSError, UserError):
            by = untrusted.printable(own_files.head(holder, 200).decode("utf-8", "replace"))[:100] or by
        raise UserError(f"{name} is being brought up or down already, by {by}; wait for that to end", Exit.CONFLICT) from None
    except OSError as error:
        raise UserError(
            f"{place / 'lock'} cannot be locked ({error.strerror}); remove it, and try again", Exit.CONFLICT
        ) from None
    try:
        with suppress(OSError, UserError):  # a full disk keeps nobody from `down`
            write_private(holder, f"mistralctl {doing} (process {os.getpid()}, since {time.strftime('%H:%M:%S')})\n")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def forget(name: str) -> None:
    """Removes the record and the key, for an `up` that never came to be."""
    for file in ("record.json", "api_key", files.KEYS_FILE.name):
        (folder(name) / file).unlink(missing_ok=True)


def set_aside(name: str) -> Path:
    """Renames a record that cannot be read, so that the name is free; where it is now."""
    path = folder(name) / "record.json"
    kept = path.with_name("record.damaged")
    if kept.exists() or kept.is_symlink():
        kept.rename(kept.with_name(f"record.damaged.{time.time_ns()}"))
    path.rename(kept)
    return kept


def api_key(name: str) -> str:
    """The key of a deployment: made at the first call (256 random bits), the same from then on."""
    path = folder(name) / "api_key"
    if not path.exists():
        write_private(path, f"mctl-{secrets.token_urlsafe(32)}\n")
    found = own_files.read(path).strip()
    if not re.fullmatch(r"[\x21-\x7e]+", found):
        raise UserError(
            f"{path} is damaged (it holds no key); delete it and run {again(path.parent.name)} again, which makes another",
            Exit.CONFLICT,
        )
    return found
