"""What outlived its machine on GCP is known by our labels alone, which `label_others` gives it; what the API says is tried in tests/e2e."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
from mistralctl.clouds.gcp import api as gcp

OURS, THEIRS = "0123456789abcdef0123", "ffffffffffffffffffff"
CLUSTER = "mctl-one-0a1b2c3d"
ZONE = "https://www.googleapis.com/compute/v1/projects/p/zones/us-central1-a"
MADE = {"creationTimestamp": "2026-11-29T00:00:00Z"}


class Google:
    """As much of Compute Engine as lists, labels and deletes, in place of `api._call`."""

    def __init__(self) -> None:
        self.instances: dict[str, Any] = {}
        self.disks: dict[str, Any] = {}
        self.rules: dict[str, Any] = {}

    def machine(self, cluster: str, owner: str, name: str) -> None:
        node = f"{cluster}-head-x1y2-compute"
        labels = {"mistralctl-owner": owner, "mistralctl-name": name, "ray-cluster-name": cluster}
        boot = {"source": f"{ZONE}/disks/{node}", "autoDelete": True}
        data = {"source": f"{ZONE}/disks/data", "autoDelete": False}  # the user's own
        self.instances[node] = {
            "name": node, "status": "RUNNING", "zone": ZONE, "machineType": "n2", "labels": labels, "disks": [boot, data], **MADE,
        }  # fmt: skip
        self.disk(node, users=["it"])
        self.disk("data", users=["it"])

    def disk(self, name: str, **more: Any) -> None:
        self.disks[name] = {"name": name, "zone": ZONE, "sizeGb": "64", "labelFingerprint": "f", **MADE, **more}

    def rule(self, cluster: str, description: str = "Allow user-specified port ['8000']", **more: Any) -> None:
        given = {"targetTags": [cluster], "allowed": [{"ports": ["8000"]}], "description": description, **MADE}
        self.rules[f"sky-ports-{cluster}"] = {"name": f"sky-ports-{cluster}", **given, **more}

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None) -> Any:
        if path.startswith("aggregated/"):
            kind = path.partition("/")[2]
            return {"items": {"z": {kind: copy.deepcopy(list(getattr(self, kind).values()))}}}
        if path == "global/firewalls":
            return {"items": copy.deepcopy(list(self.rules.values()))}
        kept, name = (self.rules, path.rpartition("/")[2])
        if found := re.fullmatch(r"zones/us-central1-a/(instances|disks)/([^/]+)(/setLabels)?", path):
            kept, name = getattr(self, found[1]), found[2]
        if name not in kept:
            return None
        if method == "DELETE":
            return kept.pop(name)
        if method in ("POST", "PATCH"):
            kept[name] |= {key: value for key, value in (body or {}).items() if key != "labelFingerprint"}
        return copy.deepcopy(kept[name])


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Google:
    found = Google()
    monkeypatch.setattr(gcp, "_call", found.call)
    return found


def test_disk_and_rule_of_a_machine_are_labelled_and_known_when_it_is_gone(google: Google) -> None:
    google.machine(CLUSTER, OURS, "one")
    google.rule(CLUSTER)
    assert gcp.label_others(OURS, "one", "us-central1") == 1
    assert [part.kind for part in gcp.ours(OURS)] == ["machine"]
    assert gcp.narrow(OURS, "one", "us-central1", 8000, ["203.0.113.0/24"]) == 1
    node = f"{CLUSTER}-head-x1y2-compute"
    del google.instances[node]
    for disk in google.disks.values():
        disk["users"] = []
    left = gcp.ours(OURS, "one")
    assert [(part.kind, part.id) for part in left] == [("disk", node), ("rule", f"sky-ports-{CLUSTER}")]
    assert {part.labels["mistralctl-owner"] for part in left} == {OURS}
    assert gcp.ours(OURS, "two") == gcp.ours(THEIRS) == []
    gcp.delete(left)
    assert (list(google.disks), google.rules) == (["data"], {})


def test_what_bears_no_label_or_anothers_is_not_ours_whatever_it_is_called(google: Google) -> None:
    google.disk(f"{CLUSTER}-head-x1y2-compute")
    google.disk(f"{CLUSTER}-head-x1y3-compute", labels={"mistralctl-owner": OURS})
    google.disk(f"{CLUSTER}-head-x1y4-compute", labels={"mistralctl-name": "one", "mistralctl-owner": THEIRS})
    google.rule(CLUSTER)
    google.rule("mctl-two-0a1b2c3d", f"not mistralctl-name=two,mistralctl-owner={OURS}")
    google.rule("mctl-three-0a1b2c3d", f"mistralctl-name=three mistralctl-owner={THEIRS}")
    assert gcp.ours(OURS) == []
    assert [part.id for part in gcp.ours(None)] == [f"{CLUSTER}-head-x1y4-compute", "sky-ports-mctl-three-0a1b2c3d"]


def test_only_what_is_a_machines_own_and_bears_no_owner_is_labelled(google: Google) -> None:
    google.machine(CLUSTER, OURS, "one")
    google.machine("mctl-one-ffffffff", THEIRS, "one")
    google.rule(CLUSTER, targetTags=["everything"])  # one that somebody else made under that name
    before = copy.deepcopy((google.disks, google.rules))
    assert gcp.label_others(OURS, "two", "us-central1") == 0
    assert (google.disks, google.rules) == before
    assert gcp.label_others(OURS, "one", "us-central1") == 1
    changed = {name for name, disk in google.disks.items() if disk != before[0][name]}
    assert (changed, google.rules) == ({f"{CLUSTER}-head-x1y2-compute"}, before[1])
