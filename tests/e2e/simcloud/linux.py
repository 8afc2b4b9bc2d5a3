"""The few system calls that Python 3.11 does not offer. Standard library only: programs inside the namespaces import it too."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from pathlib import Path

READ_ONLY, NO_SUID, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 32, 4096, 16384, 1 << 18
SETPTRACER_PDEATHSIG = 1
NEW_NET = 0x40000000
FIXED_PORTS = "46580,46590,50011"  # of SkyPilot's API server, of its skylet on a node, of the API server's queue

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: Path | str, target: Path | str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2); the target must exist."""
    given = [os.fsencode(source), os.fsencode(target), kind.encode() or None]
    _checked(_libc.mount(*given, ctypes.c_ulong(flags), options.encode() or None), f"mount {kind or source} on {target}")


def bind(source: Path | str, target: Path | str, read_only: bool = False) -> None:
    """Shows a file or folder at a second place."""
    mount(source, target, flags=BIND)
    if read_only:
        mount(source, target, flags=BIND | REMOUNT | READ_ONLY)


def overlay(target: Path, lower: Path | str, upper: Path, work: Path, options: str = "") -> None:
    """A writable view of `lower` whose changes go to `upper`."""
    mount("overlay", target, "overlay", 0, f"lowerdir={lower},upperdir={upper},workdir={work}{options}")


def setns(handle: int, kind: int = 0) -> None:
    """Enters a namespace; one of processes takes effect for children only, one of networks for this thread only."""
    _checked(_libc.setns(handle, kind), "setns")


def die_with_parent() -> None:
    """The kernel kills this process when the thread that made it ends."""
    _checked(_libc.prctl(SETPTRACER_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def loopback_up() -> None:
    """Switches `lo` on in this network namespace, in which no connection takes a port of SkyPilot's for its own end by chance."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_local_reserved_ports").write_text(FIXED_PORTS)


def minimal_devices(folder: Path) -> None:
    """A /dev with the few devices that programs expect, and terminals of its own."""
    mount("tmpfs", folder, "tmpfs", NO_SUID, "mode=755,size=64k,nr_inodes=256")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (folder / name).touch()
        bind(f"/dev/{name}", folder / name)
    for name in ("pts", "shm"):
        (folder / name).mkdir()
    mount("devpts", folder / "pts", "devpts", NO_SUID, "newinstance,ptmxmode=0666,mode=0620,gid=5")
    mount("tmpfs", folder / "shm", "tmpfs", NO_SUID, "mode=1777")
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
                         ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):  # fmt: skip
        (folder / name).symlink_to(target)


def child_of(pid: int) -> int | None:
    """The first child of a process, None while it has none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0
