"""A laptop that is not Linux: what works there works, and what cannot is said at once, with what to use instead."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import filelock  # noqa: F401 - before this is called Windows, where it needs what only Windows has
import pytest
from conftest import Run
from mistralctl import node
from mistralctl.commands import doctor, up
from mistralctl.commands import plan as plan_command
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.tasks import NODE_PYTHON

# What Python does not have on macOS, taken away before anything of mistralctl is imported. psutil, sysconfig and urllib bring parts of
# their own for macOS, which are not here: the former two are loaded first, and urllib's question for the system's proxies finds none.
MACOS = """
import os, sys, sysconfig, types
import psutil
del os.sched_getaffinity, os.sched_setaffinity, os.posix_fallocate, os.memfd_create
if hasattr(psutil.Process, "cpu_affinity"):
    del psutil.Process.cpu_affinity
sysconfig.get_config_vars()
sys.platform = "darwin"
proxies = types.ModuleType("_scproxy")
proxies._get_proxy_settings = proxies._get_proxies = dict
sys.modules["_scproxy"] = proxies

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/sys/"):
        raise RuntimeError(f"Linux only: {arguments[0]}")

sys.addaudithook(watch)
"""


@pytest.fixture
def macos(mistralctl: Run, tmp_path: Path) -> Run:
    """Runs `mistralctl` as macOS would."""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(MACOS)
    return lambda *arguments: mistralctl(*arguments, PYTHONPATH=str(tmp_path / "shim"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "--cloud", "gcp"),
        ("up", "--cloud", "aws", "--dry-run"),
        ("models",),
        ("gpus",),
        ("status",),
        ("weights", "--help"),
    ],
)
def test_what_needs_no_account_works_on_macos(arguments: tuple[str, ...], macos: Run, mistralctl: Run) -> None:
    done = macos(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == mistralctl(*arguments).stdout


@pytest.mark.parametrize("arguments", [("plan",), ("up",), ("up", "--dry-run"), ("up", "smollm2-135m-instruct")])
def test_a_server_on_macos_is_refused_at_once(arguments: tuple[str, ...], macos: Run) -> None:
    done = macos(*arguments, "--cloud", "local")
    assert done.returncode == Exit.MACHINE
    assert done.stderr == (
        "mistralctl: --cloud: local needs Linux, and this is macOS; use Linux (on Windows: WSL2, wsl --install), or a cloud: --cloud aws, "
        "gcp or azure\n"
    )


def test_doctor_on_macos(macos: Run) -> None:
    done = macos("doctor", "-o", "json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert [(checks[name]["ok"], checks[name]["found"]) for name in ("system for local", "system for clouds")] == [
        (False, "macOS"), (True, "macOS"),
    ]  # fmt: skip
    assert checks["system for local"]["mend"] == "use Linux (on Windows: WSL2, wsl --install), or name a cloud"


def test_on_windows_itself_nothing_is_rented_and_wsl_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(home))
    sourced = load({"cloud": ["aws"]}, {}, None, tmp_path)
    expected = plan_command.run(sourced)
    monkeypatch.setattr(sys, "platform", "win32")
    assert plan_command.run(sourced) == expected
    with pytest.raises(UserError, match=r"up does not run on Windows itself; run mistralctl in WSL2") as error:
        up.run(sourced, up.Talk(lambda event: None, lambda question: True, lambda text: None))
    assert error.value.code == Exit.MACHINE
    with pytest.raises(UserError, match="local needs Linux, and this is Windows"):
        plan_command.run(load({"cloud": ["local"]}, {}, None, tmp_path))
    checks = {check.name: check for check in doctor.run().checks}
    assert not checks["system for clouds"].ok
    assert "wsl --install" in checks["system for clouds"].mend


@pytest.mark.parametrize(("version", "ok"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_pythons(version: tuple[int, int], ok: bool, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(home))
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    [check] = [check for check in doctor.run().checks if check.name == "python"]
    assert check.ok is ok
    assert check.mend == "install Python 3.11, 3.12 or 3.13"
    assert node.local_python_version() in ("3.11", "3.13")
    assert NODE_PYTHON == "3.11"
