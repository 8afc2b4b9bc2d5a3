"""Failure stories on the simulated AWS alone, longer than what every test run should take: `make e2e`.

Each line that is printed is a row of the table: the story, what was seen, and how long it took.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployments import AUTOSTOP_SECONDS, PLACES, gone, on_node, status, story, when
from mistralctl import package_dir
from running import launchers, stopped
from simcloud import SimCloud
from test_aws import CLOUD, UP, killed_in, up

__all__ = ["CLOUD", "story"]
AWS = PLACES["aws"]
IDLE, TTL = 1, 4  # minutes


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def test_wrong_credentials_are_named(sim: SimCloud) -> None:
    with story("credentials that AWS refuses"):
        named = "AWS refused GetCallerIdentity (InvalidClientTokenId); sign in again: aws configure"
        sim.run(["sky", "check", "aws"])
        sim.fault("aws", "credentials")
        for _ in range(2):  # SkyPilot takes the cloud for enabled, and then it does not
            refused = sim.run([*UP, "--name", "wrong"], check=False)
            assert (refused.returncode, refused.stderr.splitlines()[-1]) == (8, f"mistralctl: {named}")
            sim.run(["sky", "check", "aws"], check=False)
        doctor = sim.run(["mistralctl", "doctor", "--cloud", "aws"]).stdout
        assert f"\n--  identity on aws        {named} " in doctor  # what SkyPilot thinks of its access is older at times
        sim.clear_faults()
        gone(sim, AWS, "wrong")


def test_a_price_of_today_above_the_limit_is_said_in_exactly_one_line(sim: SimCloud) -> None:
    with story("SkyPilot's catalog asks more than --max-price, which the snapshot does not know"):
        catalog = sim.home / ".sky" / "catalogs" / "v8" / "aws" / "vms.csv"
        before = catalog.read_text()
        head, *rows = csv.reader(before.splitlines())
        with catalog.open("w", newline="") as file:
            csv.writer(file).writerows(
                [head, *([f"{float(cell) * 10}" if name == "Price" and cell else cell for name, cell in zip(head, row, strict=True)]
                         for row in rows)]
            )  # fmt: skip
        sim.run(["sky", "api", "stop"])  # it has read the old one
        try:
            refused = sim.run([*UP, "--name", "dear", "--max-price", "0.2"], check=False)
        finally:
            catalog.write_text(before)
            sim.run(["sky", "api", "stop"])
        print(refused.stderr)
        assert refused.returncode == 8
        [line] = [line for line in refused.stderr.splitlines() if line.startswith("mistralctl: ")]
        assert line.startswith(
            "mistralctl: --max-price 0.2 USD an hour: by today's catalog of SkyPilot no such machine costs so little; "
        )
        gone(sim, AWS, "dear")


@pytest.mark.parametrize(("mib", "full"), [(64, "/weights/"), (300, "/weights ")])
def test_a_node_with_a_full_disk_is_named(sim: SimCloud, mib: int, full: str) -> None:
    with story(f"a node on whose disk {mib} MiB can be written"):
        sim.fault("aws", "small_disk", mib=mib)
        ended = sim.run([*UP, "--name", "full"], check=False)
        print(ended.stderr)
        assert ended.returncode == 9
        assert "the disk " in ended.stderr
        assert full in ended.stderr
        gone(sim, AWS, "full")


def test_a_machine_that_is_gone_is_said_plainly_and_brought_back(sim: SimCloud) -> None:
    with story("the hardware dies and the machine is terminated while it serves; up brings it back"):
        up(sim, "--name", "taken")
        [before] = sim.instances("aws")
        sim.kill_node(before.id)
        sim.run(["aws", "ec2", "terminate-instances", "--instance-ids", before.id])
        one = status(sim, "taken")
        assert one["state"] == "lost"
        assert "its machine is gone" in one["why"]
        assert up(sim, "--name", "taken")["action"] == "started"
        [after] = sim.instances("aws")
        assert after.id != before.id
        gone(sim, AWS, "taken")


def test_a_laptop_that_is_killed_while_files_go_there_leaves_what_down_takes_away(sim: SimCloud) -> None:
    with story("kill -9 while the files are sent; down takes all away"):
        killed_in(sim, "files ...")


def kill_the_api_server(sim: SimCloud) -> None:
    sim.run(["pkill", "-9", "-f", "sky.server.server"])


def test_an_api_server_that_is_killed_is_started_again(sim: SimCloud) -> None:
    with story("SkyPilot's API server is killed: in the middle of up, and before status and down"):
        process = sim.popen([*UP, "--name", "again"])
        assert process.stderr
        for line in process.stderr:
            if line.startswith("SkyPilot's runtime"):
                break
        kill_the_api_server(sim)
        _, said = process.communicate(timeout=600)
        assert process.returncode == 8
        [line] = [line for line in said.splitlines() if line.startswith("mistralctl: ")]
        assert line.startswith(
            "mistralctl: SkyPilot's API server does not answer (http://127.0.0.1:46580); run the same again, which "
        )
        assert up(sim, "--name", "again")["answer"]
        assert len(sim.instances("aws")) == 1
        kill_the_api_server(sim)
        assert status(sim, "again")["state"] == "up"  # without SkyPilot
        gone(sim, AWS, "again")


def test_a_log_that_is_cut_off_goes_on(sim: SimCloud) -> None:
    with story("the connection that carries the log is cut while the engine starts"):
        process = sim.popen([*UP, "--name", "cut"])
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("engine ..."):
                sim.run(["pkill", "-f", "ssh -F .*deployments/cut/ssh_config node .*tail -n"])
        assert process.wait(timeout=600) == 0
        assert [line for line in said if line.startswith("engine: done")]
        log = (sim.home / ".mistralctl" / "deployments" / "cut" / "serve.log").read_text()
        assert log.count('"phase": "engine", "event": "start"') == 1  # no line twice
        gone(sim, AWS, "cut")


FINISHED = """
import socket
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname(), source_address=("127.0.0.1", 46580))
peer, _ = server.accept()
client.close()
"""
LISTENING = "import socket, time; server = socket.create_server(('127.0.0.1', 50011)); print('here', flush=True); time.sleep(600)"


def test_a_port_of_the_api_server_that_another_program_has(sim: SimCloud) -> None:
    sim.fault("aws", "capacity")
    with story("a finished connection has the API server's port for a minute: it is waited for"):
        sim.run(["sky", "api", "stop"])
        sim.run([sys.executable, "-c", FINISHED])
        refused = sim.run([*UP, "--name", "held"], check=False)
        assert "InsufficientInstanceCapacity" in refused.stderr
    with story("another program listens on a port of the API server: it is named"):
        sim.run(["sky", "api", "stop"])
        program = sim.popen([sys.executable, "-c", LISTENING])
        assert program.stdout
        program.stdout.readline()
        refused = sim.run([*UP, "--name", "held"], check=False)
        print(refused.stderr)
        program.terminate()
        program.communicate(timeout=600)
        assert refused.returncode == 8
        [line] = [line for line in refused.stderr.splitlines() if line.startswith("mistralctl: ")]
        assert line.startswith("mistralctl: SkyPilot's API server does not start: port 50011 is held by python")
        assert line.endswith("; end that, or export SKYPILOT_API_SERVER_LOCAL_PORT=46600 or any other free port")
    gone(sim, AWS, "held")


OLD_SERVER = """
import runpy, sys
import sky.server.constants
sky.server.constants.API_VERSION = 1
sys.argv[1:] = ["--host=127.0.0.1", "--port=46580"]
runpy.run_module("sky.server.server", run_name="__main__")
"""


def test_an_api_server_of_another_version_is_named_and_the_way_out_works(sim: SimCloud) -> None:
    with story("SkyPilot's API server is of another version"):
        sim.run(["sky", "api", "stop"])
        server = sim.popen([sys.executable, "-c", OLD_SERVER, "-m", "sky.server.server", "--port=46580"])
        refused = subprocess.CompletedProcess[str]([], 0, "", "")
        for _ in range(300):
            refused = sim.run(["curl", "-sf", "http://127.0.0.1:46580/api/health"], check=False)
            if refused.returncode == 0:
                break
            time.sleep(1)
        refused = sim.run([*UP, "--name", "old"], check=False)
        print(refused.stderr)
        assert refused.returncode == 8
        [line] = [line for line in refused.stderr.splitlines() if line.startswith("mistralctl: ")]
        assert line.endswith("is of another version; run: sky api stop; sky api start")
        sim.run(["bash", "-c", "sky api stop; sky api start"])
        server.communicate(timeout=600)
        assert "enabled" in sim.run(["mistralctl", "doctor", "--cloud", "aws"]).stdout


def test_idle_and_hung_machines_end_by_themselves_with_the_laptop_off(sim: SimCloud) -> None:
    """Two at once: one with requests until a moment, then none; one whose launcher hangs."""
    with story(f"--idle {IDLE}m after the last request, and --ttl {TTL}m with a launcher that hangs; the laptop is off"):
        up(sim, "--name", "quiet", "--idle", f"{IDLE}m", "--ttl", "never", "--yes")
        on_node(sim, "quiet", "nohup sleep 7200 > /dev/null 2>&1 &")  # a process is no request
        last, off = [0.0], threading.Event()

        def traffic() -> None:
            while not off.wait(15):
                sim.run(["mistralctl", "chat", "quiet", "-m", "Hello"])
                last[0] = time.time()

        asking = threading.Thread(target=traffic)
        asking.start()
        began = time.time()
        try:
            up(sim, "--name", "hung", "--idle", "never", "--ttl", f"{TTL}m")
            [hung] = launchers(sim.root, "hung")
            hung.send_signal(signal.SIGSTOP)
            time.sleep(max(0.0, began + IDLE * 60 + 20 - time.time()))
            assert len(launchers(sim.root, "quiet")) == 1  # requests kept it for longer than it may be idle
        finally:
            off.set()
            asking.join()
        machines = {one.tags["mistralctl-name"]: one.id for one in sim.instances("aws")}
        [node] = (sim.root / "aws" / "nodes" / machines["hung"]).glob("upper/home/*/.mistralctl/run/hung/ends_at")
        ends_at = int(node.read_text())
        sim.kill_laptop()

        def taken_away(name: str) -> bool:
            return machines[name] not in [one.id for one in sim.instances("aws")]

        ended = when(lambda: not launchers(sim.root, "quiet"), IDLE * 60 + 60)
        killed = when(lambda: not launchers(sim.root, "hung"), max(0.0, ends_at - time.time()) + 150)
        away = {name: when(lambda name=name: taken_away(name), AUTOSTOP_SECONDS) for name in ("quiet", "hung")}  # type: ignore[misc]
        print(
            f"\nidle {IDLE}m: last request, {ended - last[0]:.0f} s later launcher ended, {away['quiet'] - ended:.0f} s later machine gone"
        )
        print(
            f"ttl {TTL}m, launcher stopped: end of life, {killed - ends_at:.0f} s later killed, {away['hung'] - killed:.0f} s later machine gone"
        )
        assert IDLE * 60 <= ended - last[0] < IDLE * 60 + 60
        assert 90 <= killed - ends_at < 120
        assert sim.instances("aws") == []
        assert sim.volumes("aws") == []
        left = sim.run(["mistralctl", "reap", "--cloud", "aws", "--all-owners", "--dry-run", "-o", "json"]).stdout
        assert json.loads(left)["parts"] == []


def test_a_set_up_that_hangs_ends_its_machine_with_the_laptop_off(sim: SimCloud, tmp_path: Path) -> None:
    """Its limit is a minute; SkyPilot's job is set up for ever, so its autostop alone would wait for ever."""
    checkout = package_dir("model").parent
    for part in ("deploy", "model", "task_templates"):
        shutil.copytree(checkout / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", ".venv"))
    tasks = tmp_path / "deploy" / "mistralctl" / "tasks" / "__init__.py"
    tasks.write_text(tasks.read_text().replace("SETUP_MINUTES = 60", "SETUP_MINUTES = 1"))
    with story("a set-up hangs, with a minute as its limit; the laptop is off"):
        process = sim.popen([*UP, "--name", "hangs", "--ttl", "never", "--yes"], env={"PYTHONPATH": str(tmp_path / "deploy")})
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("environment of vLLM ..."):
                break
        [machine] = sim.instances("aws")
        began, held = time.time(), stopped(sim.root, "hangs", "setup.sh")
        sim.kill_laptop()
        said += (process.communicate(timeout=600)[1] or "").splitlines(keepends=True)
        assert held
        gone_at = when(lambda: machine.id not in [one.id for one in sim.instances("aws")], 60 + 10 + 180)
        print(f"\nset-up hung: {gone_at - began:.0f} s later its machine was gone")
        [note] = [line for line in said if line.startswith("note: hangs has a machine in aws/us-east-1, ")]
        assert note.endswith("or by itself after a set-up of 1m, 30m without a request\n")
        assert sim.volumes("aws") == []
