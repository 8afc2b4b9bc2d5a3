"""node_init.py JSON: the first process of a simulated machine, in namespaces of its own: lays out the system, starts sshd.

It ends when the machine is powered off (status 0: a signal from `shutdown` inside), and everything on the machine with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from simcloud import gpus, images, linux, tls

IMAGE_USER = "ubuntu"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
METADATA_ADDRESS = "169.254.169.254"
# A real node has memory of its own. Ray on a simulated one sees the whole machine's and would end jobs for what others use.
VARIABLES = {"RAY_memory_monitor_refresh_ms": "0"}


@dataclass(frozen=True)
class Machine:
    """What a cloud tells a machine when it boots. `keys`: user name to the public keys that may sign in; `hosts`: names of hosts to
    their addresses; `authority`: the file with the certificate that the machine trusts; `gpus`: their names; `asked`: the cloud's reference of the
    image that was asked for (images.py); `disk_mib`: how much may be written on its disk, which is then forgotten over a stop."""

    id: str
    address: str
    hostname: str
    image: str
    folder: str
    keys: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    authority: str = ""
    boot_seconds: float = 0
    gpus: tuple[str, ...] = ()
    cloud: str = ""
    asked: str | dict[str, Any] = ""
    disk_mib: int = 0

    def dump(self) -> str:
        return json.dumps(asdict(self))


def lay_out(machine: Machine) -> Path:
    """The machine's file system, mounted: its disk (kept over a stop) over the image, and what a kernel and a boot make."""
    folder = Path(machine.folder)
    root, disk = folder / "root", folder
    if machine.disk_mib:
        disk = folder / "disk"
        disk.mkdir(exist_ok=True)
        linux.mount("tmpfs", disk, "tmpfs", 0, f"size={machine.disk_mib}m")
    work = disk / "work"
    shutil.rmtree(work, ignore_errors=True)  # what `volatile` left there would forbid a second boot
    for made in (root, work, disk / "upper", disk / "tmp"):
        made.mkdir(exist_ok=True)
    (disk / "tmp").chmod(0o1777)
    linux.overlay(root, machine.image, disk / "upper", work, ",volatile")
    linux.mount("proc", root / "proc", "proc")
    linux.mount("sysfs", root / "sys", "sysfs", linux.READ_ONLY)
    linux.minimal_devices(root / "dev")
    linux.mount("tmpfs", root / "run", "tmpfs", linux.NO_SUID, "mode=755")
    for made in (root / "run" / "sshd", root / "run" / "lock"):
        made.mkdir()
    linux.bind(disk / "tmp", root / "tmp")
    etc = root / "etc"
    trusted: dict[str, str] = {}
    if machine.authority:
        shutil.copy(machine.authority, etc / "ssl" / tls.AUTHORITY)
        trusted = dict.fromkeys(tls.VARIABLES, f"/etc/ssl/{tls.AUTHORITY}")
    (etc / "environment").write_text(
        "".join(f"{name}={value}\n" for name, value in (VARIABLES | machine.environment | trusted).items())
    )
    (etc / "hostname").write_text(f"{machine.hostname}\n")
    names = {"localhost": "127.0.0.1", machine.hostname: machine.address} | machine.hosts
    (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").touch()
    subprocess.run(["hostname", machine.hostname], check=True)
    return root


def let_in(root: Path, user: str, keys: str) -> None:
    """What cloud-init does: a user who may do everything, and the keys to sign in with.

    Each cloud has its own name for the user; it becomes the name of the one whom the image has, with its home folder.
    """
    inside = ["chroot", str(root)]
    if subprocess.run([*inside, "id", user], capture_output=True).returncode:
        subprocess.run([*inside, "usermod", "--login", user, "--home", f"/home/{user}", IMAGE_USER], check=True)
        subprocess.run([*inside, "groupmod", "--new-name", user, IMAGE_USER], check=True)
        (root / "home" / user).symlink_to(IMAGE_USER)
        (root / "etc/sudoers.d" / f"90-{user}").write_text(f"{user} ALL=(ALL) NOPASSWD:ALL\n")
    ssh = root / "home" / user / ".ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    (ssh / "authorized_keys").write_text(keys)
    (ssh / "authorized_keys").chmod(0o600)
    subprocess.run([*inside, "chown", "-R", f"{user}:{user}", f"/home/{user}/.ssh"], check=True)


def main() -> None:
    machine = Machine(**json.loads(sys.argv[1]))

    def power_off(_: int, __: FrameType | None) -> None:
        os._exit(0)

    signal.signal(signal.SIGUSR1, power_off)
    os.environ["PATH"] = PATH
    linux.loopback_up()
    subprocess.run(["ip", "address", "add", f"{METADATA_ADDRESS}/32", "dev", "lo"], check=True)
    root = lay_out(machine)
    for user, keys in machine.keys.items():
        let_in(root, user, keys)
    if machine.gpus:
        gpus.show(root, machine.cloud, tuple(machine.gpus), images.of(machine.cloud, machine.asked))
    time.sleep(machine.boot_seconds)
    key = root / "etc/ssh/ssh_host_ed25519_key"
    if not key.exists():
        subprocess.run(
            ["chroot", root, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/ssh_host_ed25519_key"], check=True
        )
    subprocess.Popen(["chroot", root, "/usr/sbin/sshd", "-D", "-e"], env={"PATH": PATH}, cwd="/")
    while True:  # a first process buries the orphans
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


if __name__ == "__main__":
    main()
