"""SimCloud: what a test sees of the simulated clouds, and of the laptop that uses them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from simcloud import clouds, control, image, linux, tls
from simcloud.faults import KINDS, Journal
from simcloud.nodes import UNSHARE
from simcloud.world import READY

HERE = Path(__file__).parent
PROGRAMS = ("unshare", "ip", "ssh", "sshd", "rsync", "sudo", "nc", "setpriv")
START_SECONDS = 90
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SimUnavailable(RuntimeError):
    """The simulator cannot run here; the message says what is missing."""


class CommandFailed(subprocess.CalledProcessError):
    """A command of the laptop that ended badly, with the ends of what it wrote."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{(self.stdout or '')[-3000:]}\n{(self.stderr or '')[-5000:]}"


@dataclass(frozen=True)
class Instance:
    """A machine as its cloud lists it."""

    id: str
    type: str
    region: str
    zone: str
    state: str
    tags: dict[str, str]
    spot: bool
    address: str | None


def check() -> None:
    """SimUnavailable, naming all that is missing, unless the simulator can run here."""
    if sys.platform != "linux":
        raise SimUnavailable(f"simulated clouds need Linux's namespaces; this is {sys.platform}")
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        raise SimUnavailable(f"programs are missing: {', '.join(missing)}; install them with `make simcloud-packages`")
    if os.geteuid() != 0:
        raise SimUnavailable("simulated clouds need root, for mounts and namespaces")
    if not any(line.split()[-1] == "overlay" for line in Path("/proc/filesystems").read_text().splitlines()):
        raise SimUnavailable("the kernel has no overlayfs; try `modprobe overlay`")
    tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    if tried.returncode:
        raise SimUnavailable(f"namespaces or mounts are forbidden here: {tried.stderr.strip()}")
    try:
        import flask  # noqa: F401
        import moto  # noqa: F401
    except ImportError as error:
        raise SimUnavailable(f"{error.name} is not installed; run `make setup`") from error


class SimCloud:
    """Clouds on this machine, as long as the `with` block lasts. Everything that is made lies below `root`."""

    def __init__(self, clouds: Sequence[str] = ("aws",), *, root: Path) -> None:
        self.clouds = tuple(clouds)
        self.root = root.absolute()
        self.home = self.root / "laptop"
        self.env: dict[str, str] = {}
        self.credentials: dict[str, str] = {}
        self.launch_seconds = 0.0
        self._world: subprocess.Popen[str] | None = None
        self._pid = 0
        self._runs = 0
        self._lock = threading.Lock()

    # ---- from nothing to a running cloud, and back

    def __enter__(self) -> SimCloud:
        check()
        started = time.monotonic()
        layer = image.baked()
        self.root.mkdir(parents=True, exist_ok=True)
        self._lay_out_laptop(layer)
        asked = {"root": str(self.root), "image": str(layer), "clouds": self.clouds}
        with (self.root / "world.log").open("a") as log:
            self._world = subprocess.Popen(
                [*UNSHARE, sys.executable, "-I", str(HERE / "world.py"), json.dumps(asked)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_ready(self._world)
        except BaseException:
            self.close()
            raise
        self.launch_seconds = time.monotonic() - started
        return self

    def _wait_until_ready(self, world: subprocess.Popen[str]) -> None:
        assert world.stdout
        timer = threading.Timer(START_SECONDS, world.kill)
        timer.start()
        line = world.stdout.readline()
        timer.cancel()
        if line.strip() != READY:
            logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in sorted(self.root.glob("*.log")))
            raise RuntimeError(f"the simulated clouds did not start\n{logs}")
        pid = linux.child_of(world.pid)
        assert pid
        self._pid = pid

    def _lay_out_laptop(self, layer: Path) -> None:
        self.home.mkdir()
        wheels = self.home / ".sky" / "wheels"
        shutil.copytree(layer / "wheels", wheels)
        for path in (*wheels.rglob("*"), wheels):  # newer than SkyPilot itself, or it builds the wheel again, from the network
            os.utime(path, (2**32 - 1, 2**32 - 1))
        own_bin = str(Path(sys.executable).parent)
        programs = self.home / "bin"  # where a cloud puts stand-ins of its own command line
        programs.mkdir()
        self.env = {
            "HOME": str(self.home), "PATH": f"{programs}:{own_bin}:{SYSTEM_PATH}", "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8",
            "SHELL": "/bin/bash", "TERM": "dumb", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "DO_NOT_TRACK": "1", "SCARF_NO_ANALYTICS": "true",
            "NO_GCE_CHECK": "true", "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        backends = {name: clouds.backend(name) for name in self.clouds}
        self.env |= tls.make(self.root / "tls", [name for backend in backends.values() for name in backend.NAMES])
        for name, backend in backends.items():
            folder = self.root / name
            folder.mkdir()
            self.env |= backend.prepare(folder, self.home)
            self.credentials |= backend.CREDENTIALS

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of the clouds, the nodes and the laptop, and gives the nodes' disks back; logs stay."""
        world, self._world = self._world, None
        if world is None:
            return
        assert world.stdin
        assert world.stdout
        world.stdin.close()
        try:
            world.wait(20)
        except subprocess.TimeoutExpired:
            world.kill()
            world.wait()
        world.stdout.close()
        for name in self.clouds:
            for node in (self.root / name / "nodes").glob("*"):
                for part in ("upper", "work", "tmp"):
                    shutil.rmtree(node / part, ignore_errors=True)
            shutil.rmtree(self.root / clouds.backend(name).STORE.SCHEME / "data", ignore_errors=True)

    # ---- the laptop

    def _inside(self, command: Sequence[str | Path], cwd: Path | None, kinds: str = "ipc,net,pid,mnt") -> list[str]:
        if self._world is None:
            raise RuntimeError("the SimCloud is not open")
        program = [sys.executable, "-I", str(HERE / "enter.py"), str(self._pid), kinds, str(cwd or self.home)]
        return [*program, *(str(word) for word in command)]

    def popen(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Starts a command as the laptop, with pipes unless told otherwise; signals reach it, killing kills it."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
        return subprocess.Popen(self._inside(command, cwd), env=self.env | dict(env or {}), text=True, **streams)

    def run(
        self, command: Sequence[str | Path], *, timeout: float = 1200, check: bool = True, env: Mapping[str, str] | None = None,
        cwd: Path | None = None, input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Runs a command as the laptop. What it writes goes through files, so that a server it leaves behind holds nobody up."""
        with self._lock:
            self._runs += 1
            base = self.root / "runs" / f"{self._runs:03d}-{Path(str(command[0])).name}"
        base.parent.mkdir(exist_ok=True)
        out, err = base.with_suffix(".out"), base.with_suffix(".err")
        given = subprocess.PIPE if input is not None else subprocess.DEVNULL
        with out.open("w") as out_file, err.open("w") as err_file:
            process = self.popen(command, env=env, cwd=cwd, stdin=given, stdout=out_file, stderr=err_file)
            try:
                if process.stdin and input is not None:
                    process.stdin.write(input)
                    process.stdin.close()
                code = process.wait(timeout)
            except BaseException as error:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    error.output, error.stderr = out.read_bytes(), err.read_bytes()
                raise
        done = subprocess.CompletedProcess([str(word) for word in command], code, out.read_text(), err.read_text())
        if check and code:
            raise CommandFailed(code, done.args, done.stdout, done.stderr)
        return done

    def put_weights(self, folder: Path, url: str) -> None:
        """Uploads a folder to a cloud's object store (s3://BUCKET/PREFIX); the bucket is made if it is not there."""
        scheme = url.partition("://")[0]
        cloud = next(name for name in self.clouds if scheme == clouds.backend(name).STORE.SCHEME)
        # With this machine's own files: of its /tmp the laptop sees few folders (world.own_tmp).
        command = self._inside([sys.executable, HERE / "put.py", cloud, folder.absolute(), url], None, "net,pid")
        subprocess.run(command, env=self.env, check=True, timeout=600, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    # ---- the clouds

    def _call(self, cloud: str, do: str, **arguments: Any) -> Any:
        return control.call(self.root / cloud, do, **arguments)

    def instances(self, cloud: str, gone: bool = False) -> list[Instance]:
        """The machines that the cloud lists, oldest first; `gone`: those that it lists as terminated, too."""
        found = [Instance(**one) for one in self._call(cloud, "instances")]
        return [one for one in found if gone or one.state != "terminated"]

    def volumes(self, cloud: str) -> list[dict[str, Any]]:
        """The disks that the cloud lists."""
        found: list[dict[str, Any]] = self._call(cloud, "volumes")
        return found

    def firewalls(self, cloud: str) -> list[dict[str, Any]]:
        """The security groups or rules that the cloud lists, the default ones among them; `ports`: what each opens to others than
        its own network, with the networks."""
        found: list[dict[str, Any]] = self._call(cloud, "firewalls")
        return found

    def groups(self, cloud: str) -> list[str]:
        """The names of the resource groups that were made there (Azure)."""
        found: list[str] = self._call(cloud, "groups")
        return found

    def journal(self, cloud: str) -> list[dict[str, Any]]:
        """What happened: API calls (`event` "call", with `action` and, if refused, `error`) and what became of machines."""
        return Journal(self.root / cloud / "journal.jsonl").read()

    def fault(
        self, cloud: str, kind: str, *, region: str | None = None, zone: str | None = None, instance_type: str | None = None,
        spot: bool | None = None, action: str | None = None, count: int | None = None, seconds: float | None = None,
        mib: int | None = None,
    ) -> None:  # fmt: skip
        """Lets something go wrong from now on: see faults.py for the kinds and what the arguments mean."""
        if kind not in KINDS:
            raise ValueError(f"{kind}: one of {', '.join(KINDS)}")
        self._call(
            cloud, "fault", kind=kind, region=region, zone=zone, instance_type=instance_type, spot=spot, action=action, count=count,
            seconds=seconds, mib=mib,
        )  # fmt: skip

    def quota(self, cloud: str, code: str, limit: float, *, region: str = "*") -> None:
        """What the cloud says of a quota from now on, until `clear_faults`; launches are refused by faults alone."""
        self._call(cloud, "quota", code=code, limit=limit, region=region)

    def clear_faults(self) -> None:
        """Nothing goes wrong any more, on any cloud."""
        for cloud in self.clouds:
            self._call(cloud, "clear_faults")

    def _owner(self, instance: str) -> str:
        return next(cloud for cloud in self.clouds if any(one.id == instance for one in self.instances(cloud)))

    def preempt(self, instance: str) -> None:
        """The cloud takes a spot machine back."""
        self._call(self._owner(instance), "preempt", id=instance)

    def age(self, instance: str, minutes: float) -> None:
        """A machine was launched so many minutes earlier, as its cloud says from now on."""
        self._call(self._owner(instance), "age", id=instance, minutes=minutes)

    def kill_laptop(self) -> list[str]:
        """Kills every process of the laptop, as a flat battery does; their commands. The next `run` is after a reboot."""
        killed = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home):
                    killed.append(" ".join(process.cmdline()))
                    process.kill()
        return killed

    def kill_node(self, instance: str) -> None:
        """The hardware below a machine dies; the cloud goes on listing it."""
        self._call(self._owner(instance), "kill_node", id=instance)
