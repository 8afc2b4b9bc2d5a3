"""Which processes belong to a deployment: those that prove it, and no other is ever signalled."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mistralctl import processes, state
from mistralctl.runtime import ssh
from mistralctl.runtime.local import Local
from mistralctl.state import Record

pytestmark = pytest.mark.linux

Start = Callable[..., subprocess.Popen[str]]
SLEEP = "print('there', flush=True); import time; time.sleep(100)"
# As vLLM's engine: the title replaces the environment, and libraries of the deployment's folder are in memory.
TITLED = "import mmap, setproctitle; f = open({file!r}); m = mmap.mmap(f.fileno(), 0, prot=1); setproctitle.setproctitle('VLLM::EngineCore'); "
WRAPPER = """
{python} -c "{sleep}" &
echo there; wait
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "deployments" / "m").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program in a session of its own, with these variables."""
    every: list[subprocess.Popen[str]] = []

    def begin(*command: str, **environ: str) -> subprocess.Popen[str]:
        words = command or (sys.executable, "-c", SLEEP)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MISTRALCTL_")}
        one = subprocess.Popen(words, start_new_session=True, env=kept | environ, stdout=subprocess.PIPE, text=True)
        every.append(one)
        assert one.stdout is not None
        assert one.stdout.readline() == "there\n"
        return one

    yield begin
    for one in every:
        for process in psutil.Process(one.pid).children(recursive=True) if one.poll() is None else ():
            process.kill()
        one.kill()
        one.communicate()


def deployed(home: Path, pid: int | None = None) -> Record:
    record = Record("m", "local", "up", "m", "m", 8999, str(home / "node"), "s", 0.0)
    return record if pid is None else processes.noted(record, pid)


def envs(home: Path, name: str = "m") -> dict[str, str]:
    return {"MISTRALCTL_NAME": name, "MISTRALCTL_NODE_DIR": str(home / "node")}


def test_a_stranger_with_the_id_and_the_session_of_a_server_is_let_be(home: Path, start: Start) -> None:
    """What `down` killed: everything in the session whose number the record has."""
    stranger = start("bash", "-c", WRAPPER.format(python=sys.executable, sleep=SLEEP))
    record = deployed(home, stranger.pid)
    for one in (record, dataclasses.replace(record, pid_mark="")):
        Local().stop(one, drain=0)
    others = start(**envs(home, "other")), start(**envs(home.parent / "another home"))
    Local().stop(deployed(home, others[0].pid), drain=0)
    Local().stop(deployed(home, others[1].pid), drain=0)
    assert [one.poll() for one in (stranger, *others)] == [None] * 3


def test_a_launcher_whose_wrapper_is_dead_is_found_and_ended(home: Path, start: Start) -> None:
    wrapper = start("bash", "-c", WRAPPER.format(python=sys.executable, sleep=SLEEP), **envs(home))
    record = deployed(home, wrapper.pid)
    [launcher] = psutil.Process(wrapper.pid).children()
    wrapper.kill()
    wrapper.wait()
    assert not processes.alive(record)
    assert processes.servers(record) == [launcher]
    assert Local().observe(record, None).jobs == {"": launcher.pid}
    assert Local().observe(None, dataclasses.replace(deployed(home), state="starting")).interrupted
    Local().stop(record, drain=1)
    assert not processes.living(launcher)


def test_an_engine_that_wrote_over_its_environment_is_found_and_a_stranger_like_it_is_not(home: Path, start: Start) -> None:
    library = home / "node" / "envs" / "e" / "library.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"x" * 4096)
    titled = TITLED.format(file=str(library)) + SLEEP
    elsewhere = home.parent / "library.so"
    elsewhere.write_bytes(b"x" * 4096)
    leader = start("bash", "-c", f'{sys.executable} -c "{titled}" & wait')
    stranger = start("bash", "-c", f'{sys.executable} -c "{TITLED.format(file=str(elsewhere)) + SLEEP}" & wait')
    engines = []
    for one in (leader, stranger):
        engines += psutil.Process(one.pid).children()
        one.kill()
        one.wait()
    try:
        assert [processes.servers(deployed(home, one.pid)) for one in (leader, stranger)] == [[engines[0]], []]
        assert processes.servers(deployed(home)) == []  # of another session
    finally:
        for engine in engines:
            engine.kill()


def test_neither_the_clock_nor_another_boot_deceives(home: Path, start: Start) -> None:
    one = start()
    record = deployed(home, one.pid)
    assert processes.alive(dataclasses.replace(record, pid_started=(record.pid_started or 0) + 86400))
    before_the_reboot = "0" * 8 + record.pid_mark[8:]
    assert not processes.alive(dataclasses.replace(record, pid_mark=before_the_reboot))
    assert not processes.alive(dataclasses.replace(record, pid_mark=record.pid_mark + "1"))
    assert processes.alive(dataclasses.replace(record, pid_mark=""))  # of an earlier version
    assert not processes.alive(dataclasses.replace(record, pid_mark="", pid_started=1.0))


def test_a_tunnel_is_known_by_its_deployment_and_its_home(home: Path, start: Start) -> None:
    package = home.parent / "fake" / "mistralctl" / "runtime"
    package.mkdir(parents=True)
    for file in (package / "__init__.py", package.parent / "__init__.py"):
        file.touch()
    (package / "tunnel.py").write_text(SLEEP)
    tunnel = (sys.executable, "-m", "mistralctl.runtime.tunnel")
    found = {"PYTHONPATH": str(package.parents[1]), "MISTRALCTL_HOME": str(home)}
    mine = start(*tunnel, "m", **found)
    others = [start(*tunnel, "n", **found), start(*tunnel, "m", **found | {"MISTRALCTL_HOME": str(home.parent)})]
    # Its ssh, whose tunnel is gone; of another home.
    ssh_of = 'echo there; exec -a ssh tail -F "$0" -- -N 2> /dev/null'
    orphan = start("bash", "-c", ssh_of, str(ssh.config_file("m")))
    others.append(start("bash", "-c", ssh_of, str(home.parent / "deployments" / "m" / "ssh_config")))
    assert {process.pid for process in processes.tunnels("m")} == {mine.pid, orphan.pid}
    ssh.end_tunnel("m")
    assert [one.poll() is None for one in (mine, orphan, *others)] == [False, False, True, True, True]


def test_what_is_marked_as_ours_is_written_to_the_record(home: Path, start: Start) -> None:
    one = start(**envs(home))
    state.save(deployed(home, one.pid))
    assert processes.alive(state.known("m"))
    assert processes.forgotten(state.known("m")).pid_mark == ""
