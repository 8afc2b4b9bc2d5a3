"""Several clouds at once: refusals in the first ones end on the last: `make e2e`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from deployments import PLACES, gone, simulated, status, story
from running import MODEL
from simcloud import SimCloud

FIRST, LAST = [PLACES["aws"], PLACES["azure"]], PLACES["gcp"]  # by the price of the cheapest machine that fits


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    with simulated(tmp_path_factory.mktemp("together"), list(PLACES)) as sim:
        yield sim


def test_refusals_in_the_first_clouds_end_on_the_last(sim: SimCloud) -> None:
    with story(f"{', '.join(place.cloud for place in FIRST)} refuse", LAST.cloud):
        for place in FIRST:
            sim.fault(place.cloud, "capacity")
        clouds = [word for place in PLACES.values() for word in ("--cloud", place.cloud)]
        command = ["mistralctl", "up", MODEL, *clouds, "--weights", LAST.weights, "--name", "moved", "-o", "json"]
        up = sim.run(command, timeout=900)
        result = json.loads(up.stdout)
        assert (result["cloud"], bool(result["answer"])) == (LAST.cloud, True)
        assert [len(sim.instances(place.cloud)) for place in PLACES.values()] == [int(place is LAST) for place in PLACES.values()]
        for place in FIRST:
            assert place.codes["capacity"] in up.stderr
        assert status(sim, "moved")["state"] == "up"
        gone(sim, LAST, "moved")
