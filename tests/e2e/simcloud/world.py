"""world.py JSON: the first process inside the namespaces: mounts what all share, starts the servers, buries orphans.

It ends when its standard input does, that is with the test that holds the other end, however that came to its end; and with
it, because it is the first, every process in here. What it mounted ends with them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from simcloud import clouds, linux

READY = "ready"


def own_tmp(root: Path) -> None:
    """A /tmp of its own, in which the test's own folders, the checkout and the home folder stay where they are."""
    tmp = root / "tmp"
    kept = (root, Path(__file__), Path(sys.prefix), Path.home())
    tmp.mkdir(exist_ok=True)
    tmp.chmod(0o1777)
    for folder in Path("/tmp").iterdir():
        if folder.is_dir() and (any(path.is_relative_to(folder) for path in kept) or folder.name.startswith("pytest-of-")):
            (tmp / folder.name).mkdir(exist_ok=True)
            linux.bind(folder, tmp / folder.name)
    linux.mount(tmp, "/tmp", flags=linux.BIND | linux.RECURSIVE)


def end_with_the_test() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    asked = json.loads(sys.argv[1])
    root, layer = Path(asked["root"]), Path(asked["image"])
    threading.Thread(target=end_with_the_test, daemon=True).start()
    linux.mount("proc", "/proc", "proc")
    linux.loopback_up()
    backends = {name: clouds.backend(name) for name in asked["clouds"]}
    hosts = root / "hosts"
    led = "".join(f"{backend.ADDRESS} {name}\n" for backend in backends.values() for name in backend.NAMES)
    hosts.write_text(f"127.0.0.1 localhost {os.uname().nodename}\n{led}")
    linux.bind(hosts, "/etc/hosts")
    own_tmp(root)
    image = root / "image"
    image.mkdir(exist_ok=True)
    # Two overlays, one over the other: one with two layers is refused, because the baked one lies inside this system.
    linux.mount("overlay", image, "overlay", linux.READ_ONLY, f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work")

    commands = {backend.STORE.SCHEME: backend.STORE.command(root / backend.STORE.SCHEME) for backend in backends.values()}
    server = [sys.executable, "-I", str(Path(__file__).parent / "server.py")]
    for name in backends:
        commands[name] = [*server, name, str(root / name), str(image)]
    servers = {}
    for name, command in commands.items():
        with (root / f"{name}.log").open("ab") as log:
            servers[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    listening = [("127.0.0.1", backend.STORE.PORT) for backend in backends.values()]
    listening += [(backend.ADDRESS, port) for backend in backends.values() for port in backend.PORTS]
    for address, port in listening:
        while not linux.answers(port, address):
            for name, process in servers.items():
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended with {process.returncode}; see {root / name}.log")
            time.sleep(0.05)
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            time.sleep(1)
            continue
        for name, process in servers.items():
            if process.pid == pid:
                sys.stderr.write(f"{name} ended with {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    main()
