"""Writes down what a process of the CUDA environment of a simulated machine is, and which programs it starts: a line of JSON each in LOG.

gpus.py lays it into that environment as simcloud_asked, which is imported when Python starts. A program that is not there is written down, too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

LOG = "/var/log/asked.jsonl"
DEVICE = "/dev/nvidia-uvm"


def write(**what: object) -> None:
    try:
        with Path(LOG).open("a") as file:
            file.write(json.dumps({"pid": os.getpid()} | what) + "\n")
    except OSError:  # the machine is as it is; the test sees that lines are missing
        pass


def heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        return
    program = os.fsdecode(arguments[0])
    words = [program] if event == "os.system" else [os.fsdecode(word) for word in arguments[1]]
    names = (program, Path(program).name) if event == "os.exec" else (program,)  # exec tries one folder of PATH after the other
    found = event == "os.system" or any(map(shutil.which, names))
    write(event="program", program=program, words=words, found=found)


if __name__ == "simcloud_asked":
    write(event="process", words=sys.orig_argv, user=os.getuid(), environment=dict(os.environ), uvm=Path(DEVICE).exists())
    sys.addaudithook(heard)
