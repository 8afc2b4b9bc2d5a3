"""Nothing is left behind on the simulated AWS, with the laptop off: `make e2e`. What is printed is the table of times."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import launchers
from simcloud import SimCloud
from stories_aws import story
from test_aws import UP, on_node, sim, up

__all__ = ["sim"]  # the fixture, found by its name
OWNER = {"MISTRALCTL_OWNER": "story"}
IDLE, TTL = 1, 4  # minutes
AUTOSTOP_SECONDS = 5 * 60 + 120  # SkyPilot looks once a minute, and takes its time to terminate


def when(happened: Callable[[], bool], seconds: float) -> float:
    """The time at which something has happened; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:.0f} s"
        time.sleep(0.5)
    return time.time()


@pytest.fixture
def elsewhere(sim: SimCloud, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs mistralctl in a home folder that has the cloud's credentials and nothing else, and still has nothing else afterwards."""
    home = tmp_path / "elsewhere"
    shutil.copytree(sim.home / ".aws", home / ".aws")

    def run(*words: str) -> str:
        return sim.run(["mistralctl", *words], env=OWNER | {"HOME": str(home)}, cwd=home, timeout=300).stdout

    yield run
    assert [path.name for path in home.iterdir()] == [".aws"]


def reaped(elsewhere: Callable[..., str], *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(elsewhere("reap", "--cloud", "aws", "-o", "json", *options))["parts"]
    return found


@pytest.mark.parametrize(
    ("phase", "line"),
    [
        ("provision", "machine ..."), ("node", "SkyPilot's runtime on it ..."), ("files", "files ..."),
        ("setup", "environment of vLLM ..."), ("engine", "engine ..."),
    ],
)  # fmt: skip
def test_reap_takes_what_a_dead_laptop_left(sim: SimCloud, elsewhere: Callable[..., str], phase: str, line: str) -> None:
    with story(f"the laptop dies in the phase {phase}; reap from an empty home, its lifetime over"):
        process = sim.popen([*UP, "--name", f"left-{phase}", "--ttl", "1h"], env=OWNER)
        assert process.stderr
        for said in process.stderr:
            if said.startswith(line):
                break
        when(lambda: bool(sim.instances("aws")), 60)
        killed = sim.kill_laptop()
        assert any("sky" in command for command in killed)  # its API server, which would have gone on
        process.communicate(timeout=30)
        [machine] = sim.instances("aws")
        [living] = reaped(elsewhere, "--dry-run")
        assert (living["id"], living["name"], living["due"]) == (machine.id, f"left-{phase}", "")
        assert [one["deleted"] for one in reaped(elsewhere, "--yes")] == [False]
        sim.age(machine.id, 60 + 45)
        print(f"\n{elsewhere('reap', '--yes')}", end="")
        assert sim.instances("aws") == []
        assert sim.volumes("aws") == []
        assert reaped(elsewhere, "--yes") == []


def test_idle_and_hung_machines_end_by_themselves_with_the_laptop_off(sim: SimCloud, elsewhere: Callable[..., str]) -> None:
    """Two at once: one with requests until a moment, then none; one whose launcher hangs."""
    with story(f"--idle {IDLE}m after the last request, and --ttl {TTL}m with a launcher that hangs; the laptop is off"):
        up(sim, "--name", "quiet", "--idle", f"{IDLE}m", "--ttl", "never")
        on_node(sim, "quiet", "nohup sleep 7200 > /dev/null 2>&1 &")  # a process is no request
        last, off = [0.0], threading.Event()

        def traffic() -> None:
            while not off.wait(15):
                sim.run(["mistralctl", "chat", "quiet", "-m", "Hello"], timeout=120)
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

        def gone(name: str) -> bool:
            return machines[name] not in [one.id for one in sim.instances("aws")]

        ended = when(lambda: not launchers(sim.root, "quiet"), IDLE * 60 + 60)
        killed = when(lambda: not launchers(sim.root, "hung"), max(0.0, ends_at - time.time()) + 150)
        away = {name: when(lambda name=name: gone(name), AUTOSTOP_SECONDS) for name in ("quiet", "hung")}  # type: ignore[misc]
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
        assert reaped(elsewhere, "--dry-run") == []
