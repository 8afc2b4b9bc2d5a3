"""What this laptop remembers of each deployment: a record and a key, in files that only the user can read."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mistral_contract import files
from mistral_contract.suggest import suggest

from mistralctl.errors import Exit, UserError

State = Literal["starting", "up", "down"]

# Variables that may hold a secret, and that no process needs which we start.
SECRET_VARIABLES = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


NOWHERE = "127.0.0.1"  # the address of a machine that has none for others, or none yet


@dataclass(frozen=True)
class Record:
    """A deployment as `up` left it. `pid`, `pid_started` (seconds since the epoch) and `pid_mark` name a process of this machine
    (`processes.mark`).

    On a cloud that process is the tunnel; `cluster` is SkyPilot's name of the machine, `price` USD an hour, `request` SkyPilot's
    id of a launch that nobody heard the end of, `setup_id` and
    `resources_id` are hashes of what its set-up and the machine itself were made from. `ends_at` (seconds since the epoch) is
    the end that `extend` gave it. Where it is `public`, `address` is the machine's and `host` the name in the user's own certificate.
    `gate` is what the gate's probe found (`gate.Report`), `kind` the name of the task's kind (`tasks.kinds`).
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

    @property
    def run_dir(self) -> Path:
        return Path(self.node_dir) / files.RUN.of(self.name)

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
    """Replaces a file as a whole; nobody but the user can read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save(record: Record) -> None:
    """Writes the record."""
    write_private(folder(record.name) / "record.json", json.dumps(asdict(record), indent=1) + "\n")


def read(name: str) -> Record | None:
    """The record of a name, None if there never was one."""
    path = folder(name) / "record.json"
    try:
        data = json.loads(path.read_text("utf-8"))
        return Record(**{f.name: data[f.name] for f in fields(Record) if f.name in data})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run up again", Exit.CONFLICT) from error


def known(name: str) -> Record:
    """The record of a name; UserError if there never was one."""
    record = read(name)
    if record is None:
        near = suggest(name, names())
        hint = f"did you mean {near}?" if near else "mistralctl status lists what there is"
        raise UserError(f"there is no deployment {name!r}; {hint}", Exit.NOT_FOUND)
    return record


def names() -> list[str]:
    """Every name that was ever up here."""
    return sorted(path.parent.name for path in (home() / "deployments").glob("*/record.json"))


def forget(name: str) -> None:
    """Removes the record and the key, for an `up` that never came to be."""
    for file in ("record.json", "api_key", files.KEYS_FILE.name):
        (folder(name) / file).unlink(missing_ok=True)


def api_key(name: str) -> str:
    """The key of a deployment: made at the first call (256 random bits), the same from then on."""
    path = folder(name) / "api_key"
    if not path.exists():
        write_private(path, f"mctl-{secrets.token_urlsafe(32)}\n")
    return path.read_text("utf-8").strip()
