"""`mistralctl doctor`: what is missing on this machine or account, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistralctl import node, own_files, owners, package_dir, state, system
from mistralctl.clouds import Cloud, Lacking, every, facts, identity, names
from mistralctl.clouds import checks as further
from mistralctl.errors import Exit, UserError
from mistralctl.gpus import GIB
from mistralctl.machine import this_machine


@dataclass(frozen=True)
class Place:
    """An environment: its Python, and whether it exists already."""

    python: str
    exists: bool


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `needed_for` says what does not work without it; `mend` is a command."""

    name: str
    ok: bool
    found: str
    needed_for: str
    mend: str


@dataclass(frozen=True)
class Doctor:
    """Everything that was looked at."""

    home: str
    laptop: Place
    node: Place
    checks: tuple[Check, ...]


def _skypilot() -> str | None:
    try:
        return importlib.metadata.version("skypilot")
    except importlib.metadata.PackageNotFoundError:
        return None


def _credentials(cloud: Cloud) -> str | None:
    """Where this account's credentials for a cloud seem to be; only looks for them, asks nobody."""
    found = [f"${name}" for name in cloud.variables if os.environ.get(name)]
    return next(iter(found + [str(path) for name in cloud.files if (path := Path.home() / name).exists()]), None)


def _system() -> list[Check]:
    """Whether this operating system can do it at all."""
    local = Check("system for local", system.serves(), system.name(), "--cloud local", f"{system.LINUX}, or name a cloud")
    clouds = Check(
        "system for clouds",
        system.rents(),
        system.name(),
        f"--cloud {', '.join(names())}",
        "wsl --install, then run mistralctl there",
    )
    return [local, clouds]


def _local_checks() -> list[Check]:
    machine = this_machine()
    local = "--cloud local"
    folder = state.home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    loose = own_files.loose(folder)
    return [
        Check("python", node.OLDEST <= sys.version_info[:2] <= node.NEWEST, python, "everything", "install Python 3.11, 3.12 or 3.13"),
        Check("bash", shutil.which("bash") is not None, shutil.which("bash") or "none", local, "apt-get install bash"),
        Check("uv", uv is not None, uv or "none", local, "pip install uv"),
        Check("memory", machine.memory_bytes >= 7.5 * GIB, f"{machine.memory_bytes / GIB:.1f} GiB", local,
              "use a machine with 8 GiB or more"),
        Check("disk", free >= 10, f"{free:.1f} GiB free", local, "free 10 GiB, or set MISTRALCTL_HOME to another disk"),
        Check("writable", os.access(existing, os.W_OK), str(folder), "everything", f"chown -R $(id -u) {existing}"),
        Check("files of one's own", not loose, f"{len(loose)} that other users could have written: {'; '.join(loose[:3])}" if loose else str(folder),
              "everything", f"chown -R $(id -u) {folder}; chmod -R go-w {folder}"),
    ]  # fmt: skip


def _asked(check: str, cloud: str, ask: Callable[[], str]) -> Check:
    use, mend = f"--cloud {cloud}", facts(cloud).sign_in
    try:
        return Check(f"{check} on {cloud}", True, ask(), use, mend)
    except Lacking as error:
        return Check(f"{check} on {cloud}", True, str(error), use, mend)
    except UserError as error:
        return Check(f"{check} on {cloud}", False, str(error), use, mend)


def _ask(cloud: str) -> list[Check]:
    """Asks a cloud whom it takes this laptop for, and SkyPilot whether it would rent a machine there."""
    from mistralctl.runtime import sky

    def enabled() -> str:
        why = sky.refusal_of(cloud, state.home() / "check.log")
        if why:
            raise UserError(why)
        return "enabled"

    checks = [_asked("identity", cloud, lambda: identity(cloud)), _asked("machines", cloud, enabled)]
    more = [Check(f"{one.name} on {cloud}", one.ok, one.found, f"--cloud {cloud}", one.mend) for one in further(cloud)]
    return [*checks, *more]


def node_facts(name: str) -> dict[str, Any]:
    """Return what the machine of a deployment says of itself now (model/node/machine.py); UserError if it cannot be asked."""
    from mistralctl.runtime import facts

    record = state.known(name)
    if record.state == "down":
        raise UserError(f"--node: {name} is down; its last machine is in mistralctl receipt {name}", Exit.NOT_FOUND)
    return facts.read(record)


def role(name: str) -> str:
    """Return a role file, by its name without the ending, with this home's owner and SkyPilot's name for this user in it; makes the owner's id.

    UserError if there is no such file, or SkyPilot never ran here and the file needs its name.
    """
    files = {Path(file).stem: file for cloud in every() for file in cloud.roles}
    if name not in files:
        raise UserError(f"--role: {name!r} is not one of {', '.join(files)}")
    text = (package_dir("docs") / "roles" / files[name]).read_text("utf-8")
    if "OWNER" in text:
        owners.make(os.environ)
    user = owners.skypilot_user()
    if "SKYPILOT_USER" in text and not user:
        raise UserError(
            f"--role: {name} needs SkyPilot's name for this user, which it makes when it first runs; run: sky check", Exit.CLOUD
        )
    return text.replace("OWNER", owners.current(os.environ)).replace("SKYPILOT_USER", user)


def run(clouds: Sequence[str] = ()) -> Doctor:
    """Looks at this machine and account; starts nothing. Asks only the clouds that are named."""
    for named in clouds:
        if named not in names():
            raise UserError(f"--cloud: {named!r} is not one of {', '.join(names())}")
    sky = _skypilot()
    checks = [*_system(), *_local_checks()]
    for cloud in every():
        use = f"--cloud {cloud.name}"
        checks.append(
            Check(
                f"skypilot for {cloud.name}",
                sky is not None,
                sky or "none",
                use,
                cloud.install,
            )
        )
        found = _credentials(cloud)
        checks.append(Check(f"credentials for {cloud.name}", found is not None, found or "none", use, cloud.sign_in))
        if cloud.name in clouds and sky is not None:
            checks += _ask(cloud.name)
    device = "cuda" if this_machine().gpus else "cpu"
    python = node.local_python(device)
    return Doctor(str(state.home()), Place(sys.executable, True), Place(str(python), python.exists()), tuple(checks))
