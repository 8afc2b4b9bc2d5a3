"""The machines of one cloud: booted, stopped, wiped; each a tree of processes with a folder as its disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simcloud import linux
from simcloud.node_init import Machine

HERE = Path(__file__).parent
UNSHARE = ["unshare", "--mount", "--propagation", "private", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child=SIGKILL"]
Service = tuple[str, int, str, int]  # address and port on the node, address and port of the cloud's loopback


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    relay: subprocess.Popen[str] | None = None
    expected: bool = False  # that it ends: it was told to


class Nodes:
    """`services` are what every node reaches of its cloud; `ended` is called with the id of a node that ended by itself."""

    def __init__(self, folder: Path, image: Path, services: list[Service], ended: Callable[[str, int], None]) -> None:
        self.folder, self.image, self.services, self.ended = folder, image, services, ended
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()

    def path(self, node: str) -> Path:
        return self.folder / node

    def is_up(self, node: str) -> bool:
        return node in self._running

    def boot(self, machine: Machine, ports: Callable[[], set[int]]) -> None:
        """Starts a machine; `ports` is asked again and again which ports of it are open."""
        folder = Path(machine.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "console.log").open("ab") as log:
            process = subprocess.Popen(
                [*UNSHARE, sys.executable, "-I", str(HERE / "node_init.py"), machine.dump()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        running = _Running(process)
        with self._lock:
            self._running[machine.id] = running
        threading.Thread(target=self._connect, args=(machine, running, ports), daemon=True).start()

    def _connect(self, machine: Machine, running: _Running, ports: Callable[[], set[int]]) -> None:
        process = running.process
        own = Path("/proc/self/ns/net").readlink()
        inside = None
        while process.poll() is None:
            inside = linux.child_of(process.pid)
            try:
                if inside and Path(f"/proc/{inside}/ns/net").readlink() != own:
                    break
            except OSError:
                pass
            time.sleep(0.02)
        if process.poll() is None:
            with (Path(machine.folder) / "console.log").open("ab") as log:
                relay = running.relay = subprocess.Popen(
                    [sys.executable, "-I", str(HERE / "relay.py"), str(inside), machine.address, json.dumps(self.services)],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, bufsize=1,
                )  # fmt: skip
            assert relay.stdin
            told: set[int] | None = None
            while process.poll() is None:
                wanted = ports()
                if wanted != told:
                    try:
                        relay.stdin.write(json.dumps(sorted(wanted)) + "\n")
                    except OSError:
                        break
                    told = wanted
                time.sleep(0.2)
            process.wait()
            relay.kill()
            relay.wait()
        with self._lock:
            if self._running.get(machine.id) is running:
                del self._running[machine.id]
        if not running.expected:
            self.ended(machine.id, process.returncode)

    def halt(self, node: str, wipe: bool = False) -> None:
        """Cuts the power. `wipe`: and gives the disk back."""
        with self._lock:
            running = self._running.pop(node, None)
        if running:
            running.expected = True
            running.process.kill()  # unshare ignores SIGTERM; its child, the first process inside, dies with it
            running.process.wait(10)
        if wipe:
            for part in ("upper", "work", "tmp"):
                shutil.rmtree(self.path(node) / part, ignore_errors=True)
