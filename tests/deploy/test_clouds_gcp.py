"""How what outlived its machine on GCP is known: by the names that SkyPilot gives. What the API says is tried in tests/e2e."""

from __future__ import annotations

import pytest
from mistralctl.clouds.gcp.api import DISK, RULE, SHORTENED, named_like

USER = "0a1b2c3d"


@pytest.mark.parametrize("name", ["served", "a", "smollm2-135m-instruct", "mistral-7b-instruct-v0-1", "a" * 40])
def test_the_names_that_skypilot_gives_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sky.utils.common_utils import make_cluster_name_on_cloud

    monkeypatch.setenv("SKYPILOT_USER_ID", USER)
    cluster = make_cluster_name_on_cloud(f"mctl-{name}", max_length=SHORTENED)
    for found in (RULE.fullmatch(f"sky-ports-{cluster}"), DISK.fullmatch(f"{cluster}-head-0a1b2c-compute")):
        assert found is not None
        assert (found["cluster"], found["user"]) == (cluster, USER)
        assert named_like(found, name)
        assert not named_like(found, f"x{name}")
        assert not named_like(found, "other")


@pytest.mark.parametrize(
    "name", ["skypilot-vpc-allow-ssh", "default-allow-internal", "sky-ports-mine-0a1b2c3d", "mctl-x", "data-mctl-x-0a1b2c3d"]
)
def test_what_is_shared_or_somebody_elses_is_not(name: str) -> None:
    assert RULE.fullmatch(name) is None
    assert DISK.fullmatch(name) is None
