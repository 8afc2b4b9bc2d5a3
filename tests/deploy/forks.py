"""`mistralctl` in processes of its own, each forked from an interpreter that has imported it: importing takes most of a short command's time.

Reads a JSON object a line: `arguments`, `env`, `cwd`, and the files `out` and `err` for what it writes; answers each with its exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import sys

import mistralctl


def main() -> None:
    for module in pkgutil.walk_packages(mistralctl.__path__, "mistralctl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()
    for line in sys.stdin:
        if os.fork() == 0:
            run(**json.loads(line))
            return
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.wait()[1])}\n")
        sys.stdout.flush()


def run(arguments: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
    sys.argv = ["mistralctl", *arguments]
    runpy.run_module("mistralctl", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
