"""The tunnel to a node's server, kept alive: `python -m mistralctl.runtime.tunnel NAME`, in the background.

It dials again whenever the connection ends, and ends itself when the deployment is down, belongs to another tunnel, shows another host key,
or has not been reachable for an hour.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

from mistralctl import state
from mistralctl.runtime import ssh
from mistralctl.tasks import NODE_PORT

LOOK_SECONDS = 1.0
PAUSE_SECONDS = (0.5, 1, 2, 5, 10, 30)
GIVE_UP_SECONDS = 3600.0
GOOD_SECONDS = 20.0  # a connection that lasted so long was one


def _wanted(name: str, port: int) -> bool:
    try:
        record = state.read(name)
    except state.Unreadable:  # as long as nobody says otherwise
        return True
    return record is not None and record.state != "down" and record.port == port and bool(record.cluster)


def _listen(process: subprocess.Popen[str], said: list[str]) -> None:
    """Pass on what ssh says, and keep it; until it has ended."""
    for line in process.stderr or ():
        sys.stderr.write(line)
        sys.stderr.flush()
        said[:] = [*said[-20:], line]
    process.wait()


def keep(name: str) -> int:
    """Dials until it is not wanted any more; the process's exit code."""
    record = state.read(name)
    if record is None:
        return 1
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    failures, last_good = 0, time.monotonic()
    folder = state.folder(name)
    share = ssh.can_share(folder)
    while _wanted(name, record.port) and time.monotonic() - last_good < GIVE_UP_SECONDS:
        began = time.monotonic()
        (folder / ssh.SHARED).unlink(missing_ok=True)  # what one that was killed left; ssh would share nothing
        command = ssh.tunnel_command(name, record.port, NODE_PORT, share=share)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, text=True, errors="replace"
        )
        said: list[str] = []
        waiter = threading.Thread(target=_listen, args=(process, said), daemon=True)
        waiter.start()
        try:
            while waiter.is_alive() and _wanted(name, record.port):
                waiter.join(LOOK_SECONDS)
        finally:
            process.terminate()
            process.wait()
        if any(ssh.REFUSED in line for line in said):
            sys.stderr.write(f"{ssh.HostKeyChanged(name)}\n")
            return 1
        lasted = time.monotonic() - began
        if lasted > GOOD_SECONDS:
            failures, last_good = 0, time.monotonic()
        else:
            failures += 1
        time.sleep(PAUSE_SECONDS[min(failures, len(PAUSE_SECONDS) - 1)])
    return 0


if __name__ == "__main__":
    raise SystemExit(keep(sys.argv[1]))
