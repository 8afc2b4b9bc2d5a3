"""Nothing is left behind on the simulated AWS, with the laptop off: `make e2e`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from simcloud import SimCloud
from stories_aws import story
from test_aws import UP, sim

__all__ = ["sim"]  # the fixture, found by its name
OWNER = {"MISTRALCTL_OWNER": "story"}


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
