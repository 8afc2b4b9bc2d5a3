"""What a laptop that died left behind on each simulated cloud is reaped from an empty home: `make e2e`; -k gcp for one cloud."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deployments import Place, story, when
from simcloud import SimCloud
from stories_clouds import place, sim

__all__ = ["place", "sim"]  # the fixtures, found by their names
OWNER = {"MISTRALCTL_OWNER": "story"}


@pytest.fixture
def elsewhere(sim: SimCloud, place: Place, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs mistralctl in a home folder that has the cloud's credentials and nothing else, and still has nothing else afterwards."""
    home = tmp_path / "elsewhere"
    credentials = Path(place.secrets_file).parent
    shutil.copytree(sim.home / credentials, home / credentials)

    def run(*words: str) -> str:
        return sim.run(["mistralctl", *words], env=OWNER | {"HOME": str(home)}, cwd=home).stdout

    yield run
    assert [path.name for path in home.iterdir()] == [credentials.parts[0]]


@pytest.mark.parametrize(
    ("phase", "line"),
    [
        ("provision", "machine ..."), ("node", "SkyPilot's runtime on it ..."), ("files", "files ..."),
        ("setup", "environment of vLLM ..."), ("engine", "engine ..."),
    ],
)  # fmt: skip
def test_reap_takes_what_a_dead_laptop_left(
    sim: SimCloud, place: Place, elsewhere: Callable[..., str], phase: str, line: str
) -> None:
    def reaped(*options: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(elsewhere("reap", "--cloud", place.cloud, "-o", "json", *options))["parts"]
        return found

    with story(f"the laptop dies in the phase {phase}; reap from an empty home, its lifetime over", place.cloud):
        process = sim.popen([*place.up, "--name", f"left-{phase}", "--ttl", "1h"], env=OWNER)
        assert process.stderr
        for said in process.stderr:
            if said.startswith(line):
                break
        when(lambda: bool(sim.instances(place.cloud)), 60)
        killed = sim.kill_laptop()
        assert any("sky" in command for command in killed)  # its API server, which would have gone on
        process.communicate(timeout=600)
        [machine] = sim.instances(place.cloud)
        [living] = reaped("--dry-run")
        assert (living["id"].rpartition("/")[2], living["name"], living["due"]) == (machine.id, f"left-{phase}", "")
        assert [one["deleted"] for one in reaped("--yes")] == [False]
        sim.age(machine.id, 60 + 45)
        print(f"\n{elsewhere('reap', '--cloud', place.cloud, '--yes')}", end="")
        assert sim.instances(place.cloud) == []
        assert sim.volumes(place.cloud) == []
        assert reaped("--yes") == []
