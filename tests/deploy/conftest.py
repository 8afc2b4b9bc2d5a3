"""The command line as a person runs it, in a process of its own with a home folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from mistralctl import package_dir, system

sys.path.append(str(package_dir("model") / "node"))  # the guard, which needs nothing of vLLM, for tests of the gate

Run = Callable[..., subprocess.CompletedProcess[str]]
PROGRAM = ("-m", "mistralctl")
# What a server on this machine needs of Linux is planned on macOS too: the tests of both say the same.
AS_LINUX = "from mistralctl import system; system.serves = lambda: True; import runpy; runpy.run_module('mistralctl', run_name='__main__')"


@pytest.fixture(autouse=True)
def a_machine_that_serves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `--cloud local` be planned on macOS; test_system.py asks for the real answer."""
    if request.node.path.stem != "test_system":
        monkeypatch.setattr(system, "serves", lambda: True)


@pytest.fixture(autouse=True)
def no_session_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 keeps the credentials that it found first."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def forked() -> Iterator[Callable[..., int]]:
    """Runs `mistralctl` in a process of its own that need not import it (forks.py); its exit code."""
    with subprocess.Popen(
        [sys.executable, Path(__file__).parent / "forks.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(**asked: object) -> int:
            assert server.stdin
            assert server.stdout
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.communicate()


@pytest.fixture
def mistralctl(home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """Runs `mistralctl ARGUMENT...` in an empty folder; keyword arguments are further variables.

    By a new interpreter where a test is marked `interpreter`, where the interpreter's own variables are given, and on macOS.
    """
    folder = tmp_path / "cwd"
    folder.mkdir()
    program = PROGRAM if sys.platform == "linux" or request.node.path.stem == "test_system" else ("-c", AS_LINUX)
    new = sys.platform != "linux" or request.node.get_closest_marker("interpreter") is not None

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MISTRALCTL_", "HF_"))}
        env = kept | {"HOME": str(home), "MISTRALCTL_OWNER": "tests", "COLUMNS": "120", **variables}
        if new or any(name.startswith("PYTHON") for name in variables):
            command = [sys.executable, *program, *arguments]
            return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        out, err = tmp_path / "mistralctl.out", tmp_path / "mistralctl.err"
        for file in (out, err):
            file.write_text("")
        code = request.getfixturevalue("forked")(arguments=arguments, env=env, cwd=str(folder), out=str(out), err=str(err))
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

    return run
