"""enter.py PID KINDS FOLDER COMMAND...: runs a command inside namespaces of process PID, in FOLDER. KINDS: say, ipc,net,pid,mnt.

A process cannot move itself into a namespace of processes, only its children: so there are two, of which the outer one
passes on each signal, ends as the inner one ended, and takes it along when it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent.parent))
from simcloud import linux

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    pid, kinds, folder, command = sys.argv[1], sys.argv[2].split(","), sys.argv[3], sys.argv[4:]
    handles = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    for handle in handles:
        linux.setns(handle)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    inner = os.fork()
    if inner == 0:
        linux.die_with_parent()
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python itself; the command shall not inherit it
            signal.signal(ignored, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        try:
            os.chdir(folder)
            os.execvp(command[0], command)  # noqa: S606 - the command is the caller's, as it is
        except OSError as error:
            sys.stderr.write(f"{command[0]}: {error}\n")
            os._exit(127)

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(inner, number)

    for one in PASSED_ON:
        signal.signal(one, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    _, status = os.waitpid(inner, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
