"""The watch of a node, the real watch.sh: what it ends, and when it ends the machine. SkyPilot's runtime and sudo are programs that only note."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mistralctl import package_dir

pytestmark = [pytest.mark.linux, pytest.mark.slow]
NODE = package_dir("model") / "node"
# Minutes become seconds, and what it waits for is short.
QUICK = {r"\* 60\)": "* 1)", r"^look=5": "look=1", "grace=60 last=30": "grace=1 last=1", "forgotten=1200": "forgotten=3",
         "sleep 10": "sleep 1", "sleep 300": "sleep 3"}  # fmt: skip


class Machine:
    """A rented machine: its home, and what was asked of SkyPilot's runtime and of root."""

    def __init__(self, home: Path) -> None:
        self.home, self.run_dir, self.asked = home, home / "node" / "run" / "mistral", home / "asked"
        self.scripts = home / "scripts"
        shutil.copytree(NODE, self.scripts, ignore=shutil.ignore_patterns("vllm-*", "mistral_node", "__pycache__"))
        text = (self.scripts / "watch.sh").read_text("utf-8")
        for pattern, short in QUICK.items():
            text, found = re.subn(pattern, short, text, flags=re.MULTILINE)
            assert found, pattern
        (self.scripts / "watch.sh").write_text(text, "utf-8")
        (home / "bin").mkdir()
        for name in ("python", "sudo"):
            (home / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {self.asked}\n')
            (home / "bin" / name).chmod(0o755)
        (home / ".sky").mkdir()
        (home / ".sky" / "python_path").write_text(f"{home}/bin/python\n")

    def environment(self, **envs: str) -> dict[str, str]:
        cloud = json.dumps({"cluster_name": "mctl-mistral", "cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a"})
        return {
            "PATH": f"{self.home}/bin:{os.defpath}", "HOME": str(self.home), "SKYPILOT_CLUSTER_INFO": cloud, "MISTRALCTL_NAME": "mistral",
            "MISTRALCTL_NODE_DIR": "~/node", "MISTRALCTL_SETUP_MINUTES": "3", **envs,
        }  # fmt: skip

    def start(self, script: str, **envs: str) -> subprocess.Popen[bytes]:
        """A job of SkyPilot's: a session of its own, whose log is a pipe until its end."""
        return subprocess.Popen(
            ["bash", "-c", script], env=self.environment(**envs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, cwd=self.scripts,
        )  # fmt: skip

    def processes(self) -> dict[int, list[str]]:
        """The words of those that work in this home, by their numbers, without those that end."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process.cmdline()
        return found

    def watches(self) -> list[str]:
        """What each watch watches; what one starts for a moment is none."""
        found = {pid: words[2] for pid, words in self.processes().items() if words[:2] == ["bash", "watch.sh"]}
        return [what for pid, what in found.items() if what != "start" and psutil.pid_exists(pid) and os.getsid(pid) == pid]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    yield found
    for pid in found.processes():
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()


def until(happened: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


SETUP = "bash watch.sh start setup; exec sleep 1000"


def ended(machine: Machine) -> bool:
    """Whether SkyPilot's runtime was asked to end the machine without waiting for a job, and is sure to run."""
    text = machine.asked.read_text() if machine.asked.exists() else ""
    return (
        'autostop.set_autostop(0, "cloudvmray", autostop.AutostopWaitFor.NONE, True)' in text
        and "sky.skylet.attempt_skylet" in text
    )


def test_a_set_up_that_hangs_is_ended_and_then_its_machine_and_at_last_it_is_powered_off(machine: Machine) -> None:
    job = machine.start(SETUP)
    assert job.wait(300) == -signal.SIGTERM
    until(lambda: ended(machine))
    log = (machine.run_dir / "watch.log").read_text()
    assert "after 3 minutes no server was started; all is ended" in log
    assert "ends this machine through SkyPilot's autostop" in log
    until(lambda: "sudo -n shutdown -h now" in machine.asked.read_text())


def test_the_real_set_up_starts_it_before_all_else(machine: Machine) -> None:
    (machine.home / "bin" / "uv").write_text("#!/bin/bash\nexec sleep 1000\n")
    (machine.home / "bin" / "uv").chmod(0o755)
    job = machine.start(
        "exec bash setup.sh", MISTRALCTL_ENV_ID="cpu-0", MISTRALCTL_DEVICE="cpu", MISTRALCTL_PYTHON="3.11",
        MISTRALCTL_WEIGHTS="pypi://nothing", MISTRALCTL_WEIGHTS_ID="w",
    )  # fmt: skip
    assert job.wait(300) != 0
    until(lambda: ended(machine))
    until(lambda: ["sleep", "1000"] not in machine.processes().values())


def test_it_outlives_its_job_with_all_its_children_and_holds_no_log_open(machine: Machine) -> None:
    job = machine.start(SETUP, MISTRALCTL_SETUP_MINUTES="6")
    until(machine.watches)
    until(lambda: [one.name() for one in psutil.Process(job.pid).children(recursive=True)] in ([], ["sleep"]))
    os.killpg(job.pid, signal.SIGKILL)
    assert job.stdout is not None
    assert job.stdout.read() == b""  # at once: nothing else has the pipe
    assert machine.watches() == ["setup"]
    until(lambda: ended(machine))


def test_a_later_one_replaces_it(machine: Machine) -> None:
    named = machine.run_dir / "watch"
    first = machine.start(SETUP, MISTRALCTL_SETUP_MINUTES="60")
    until(lambda: machine.watches() and named.exists() and named.read_text())
    before = named.read_text()
    second = machine.start(SETUP, MISTRALCTL_SETUP_MINUTES="60")
    until(lambda: named.read_text() not in ("", before))
    until(lambda: not psutil.pid_exists(int(before)) and machine.watches() == ["setup"])
    server = machine.start("sleep 1000 & bash watch.sh start run $!; wait", MISTRALCTL_TTL_MINUTES="60")
    until(lambda: machine.watches() == ["run"])
    assert int((machine.run_dir / "ends_at").read_text()) > time.time() + 50
    assert not ended(machine)
    for job in (first, second, server):
        job.kill()
        job.wait()


def test_a_server_that_outlives_its_lifetime_is_ended_and_a_machine_that_outlives_its_server(machine: Machine) -> None:
    job = machine.start(
        "set -m; (trap '' TERM; exec sleep 1000) & bash watch.sh start run $!; wait $!", MISTRALCTL_TTL_MINUTES="2"
    )
    assert job.wait(300) == 128 + signal.SIGKILL
    until(lambda: ended(machine))
    log = (machine.run_dir / "watch.log").read_text()
    assert log.index("the launcher outlived its lifetime") < log.index("its server has ended and the machine is still there")


@pytest.mark.parametrize("script", [SETUP, "set -m; sleep 1000 & bash watch.sh start run $!; wait $!"])
def test_a_budget_bounds_set_up_and_life_together(machine: Machine, script: str) -> None:
    machine.run_dir.mkdir(parents=True)
    (machine.run_dir / "paid_from").write_text(f"{time.time() - 3598:.0f}\n")  # of an hour's price all but 2 s are spent
    job = machine.start(
        script,
        MISTRALCTL_SETUP_MINUTES="600",
        MISTRALCTL_TTL_MINUTES="600",
        MISTRALCTL_BUDGET="0.8048",
        MISTRALCTL_PRICE="0.8048",
    )
    assert job.wait(300) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    until(lambda: ended(machine))


def test_a_machine_is_paid_for_since_its_first_process_began(machine: Machine) -> None:
    job = machine.start(SETUP, MISTRALCTL_SETUP_MINUTES="60")
    until((machine.run_dir / "paid_from").exists)
    until(lambda: (machine.run_dir / "paid_from").read_text() != "")
    began = psutil.Process(1).create_time()
    assert abs(int((machine.run_dir / "paid_from").read_text()) - began) < 5
    job.kill()
    job.wait()


def test_on_a_machine_that_stays_no_set_up_is_watched_and_no_machine_ended(machine: Machine) -> None:
    here = {"SKYPILOT_CLUSTER_INFO": "", "MISTRALCTL_TTL_MINUTES": "2"}
    job = machine.start(
        "bash watch.sh start setup; sleep 1000 & bash watch.sh start run $!; bash watch.sh run $!; echo end", **here
    )
    assert (
        job.communicate(timeout=600)[0].decode().endswith("the launcher outlived its lifetime; it is ended from outside\nend\n")
    )
    time.sleep(4)
    assert not machine.asked.exists()


@pytest.mark.parametrize("rented", [False, True])
def test_the_real_run_ends_a_launcher_that_hangs(machine: Machine, rented: bool) -> None:
    python = machine.home / "node" / "envs" / "cpu-0" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\ntrap '' TERM\nsleep 1000 &\nwhile :; do wait; done\n")
    python.chmod(0o755)
    here = {} if rented else {"SKYPILOT_CLUSTER_INFO": ""}
    job = machine.start("exec bash run.sh", MISTRALCTL_ENV_ID="cpu-0", MISTRALCTL_TTL_MINUTES="2", **here)
    said = job.communicate(timeout=600)[0].decode()
    assert job.returncode == 128 + signal.SIGKILL
    log = (machine.run_dir / "watch.log").read_text() if rented else said
    assert "the launcher outlived its lifetime; it is ended from outside\n" in log
    until(lambda: ["sleep", "1000"] not in machine.processes().values())
    if rented:
        until(lambda: ended(machine))
    else:
        until(lambda: machine.processes() == {})
