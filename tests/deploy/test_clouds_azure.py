"""Which resource groups of Azure are ours, and which of them go as a whole; Azure's clients are replaced. What its API says is tried in tests/e2e."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mistralctl.clouds.azure import api as azure
from mistralctl.errors import Exit, UserError

OURS, THEIRS = "0123456789abcdef0123", "ffffffffffffffffffff"
CLUSTER = "mctl-one-0a1b2c3d"
GROUP = f"{CLUSTER}-eastus"


class Azure:
    """As much of Resource Manager as lists, labels and deletes groups and machines."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, str]] = {}
        self.held: dict[str, list[Any]] = {}
        self.deleted: list[str] = []
        groups = SimpleNamespace(list=self.list, get=self.get, update=self.update, begin_delete=lambda name: self.gone(name))
        resources = SimpleNamespace(list_by_resource_group=lambda name, expand="": self.held[name])
        self.resource = SimpleNamespace(resource_groups=groups, resources=resources)
        listing = {"list_all": self.machines, "begin_delete": lambda group, name: self.gone(f"{group}/{name}")}
        disks = {"list": list, "begin_delete": lambda group, name: self.gone(f"{group}/{name}")}
        self.compute = SimpleNamespace(virtual_machines=SimpleNamespace(**listing), disks=SimpleNamespace(**disks))

    def group(self, name: str, tags: dict[str, str] | None = None, **held: str | dict[str, str]) -> None:
        self.groups[name], self.held[name] = tags or {}, []
        for one in ("sky-x-vnet", "sky-x-nsg", f"{CLUSTER}-vm-ip"):
            self.put(name, one, "Microsoft.Network/things")

    def put(self, group: str, name: str, kind: str, tags: dict[str, str] | None = None) -> Any:
        identity = f"/subscriptions/s/resourceGroups/{group}/providers/{kind}/{name}"
        profile, state = SimpleNamespace(vm_size="Standard_D4s_v5"), "Succeeded"
        one = SimpleNamespace(
            id=identity, name=name, type=kind, tags=tags or {}, location="eastus", created_time=None, time_created=None,
            hardware_profile=profile, provisioning_state=state, instance_view=None, storage_profile=None,
        )  # fmt: skip
        self.held[group].append(one)
        return one

    def machine(self, group: str, owner: str, name: str, cluster: str = CLUSTER) -> None:
        tags = {"mistralctl-owner": owner, "mistralctl-name": name, "skypilot-cluster-name": cluster}
        self.put(group, f"{cluster}-vm", "Microsoft.Compute/virtualMachines", tags)

    def machines(self, status_only: str = "") -> list[Any]:
        return [one for held in self.held.values() for one in held if one.type.endswith("virtualMachines")]

    def list(self) -> list[Any]:
        state = SimpleNamespace(provisioning_state="Succeeded")
        return [
            SimpleNamespace(
                id=f"/subscriptions/s/resourceGroups/{name}", name=name, location="eastus", tags=tags, properties=state
            )
            for name, tags in self.groups.items()
        ]

    def get(self, name: str) -> Any:
        return next(one for one in self.list() if one.name == name)

    def update(self, name: str, patch: Any) -> None:
        self.groups[name] = patch.tags

    def gone(self, what: str) -> Any:
        self.deleted.append(what)
        return SimpleNamespace(result=lambda: None)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Azure:
    found = Azure()
    monkeypatch.setattr(azure, "_account", lambda: (None, "s"))
    monkeypatch.setattr(azure, "_clients", lambda *_: (found.compute, found.resource))
    monkeypatch.setattr(azure, "_compute", lambda *_: found.compute)
    return found


def test_a_machines_group_is_labelled_and_known_when_the_machine_is_gone(cloud: Azure) -> None:
    cloud.group(GROUP, {"cost": "team"})
    cloud.machine(GROUP, OURS, "one")
    assert azure.label_others(OURS, "one", "eastus") == 1
    assert azure.label_others(OURS, "two", "eastus") == 0
    assert cloud.groups[GROUP] == {"cost": "team", "mistralctl-owner": OURS, "mistralctl-name": "one"}
    assert [part.kind for part in azure.ours(OURS, "one")] == ["machine"]
    cloud.held[GROUP].pop()
    [left] = azure.ours(OURS, "one")
    assert (left.kind, left.labels["mistralctl-owner"], azure.ours(THEIRS), azure.ours(OURS, "two")) == ("group", OURS, [], [])
    azure.delete([left])
    assert cloud.deleted == [GROUP]


def test_a_group_without_our_labels_is_not_ours_whatever_it_is_called(cloud: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYPILOT_USER_ID", "0a1b2c3d")
    cloud.group(GROUP)
    cloud.group("mctl-two-0a1b2c3d-eastus", {"mistralctl-name": "two", "mistralctl-owner": THEIRS})
    assert azure.ours(OURS) == []
    assert [part.id.rpartition("/")[2] for part in azure.ours(None)] == ["mctl-two-0a1b2c3d-eastus"]


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "before it was labelled"])
def test_a_group_made_for_the_machine_goes_with_it(cloud: Azure, labelled: bool) -> None:
    cloud.group(GROUP)
    cloud.machine(GROUP, OURS, "one")
    if labelled:
        azure.label_others(OURS, "one", "eastus")
    azure.delete(azure.ours(OURS, "one"))
    assert cloud.deleted == [GROUP]


@pytest.mark.parametrize(
    ("name", "kind", "tags"),
    [
        ("photos", "Microsoft.Storage/storageAccounts", {}),
        ("sky-photos", "Microsoft.Storage/storageAccounts", {}),
        ("data", "Microsoft.Compute/disks", {}),
        (f"{CLUSTER}-vm2", "Microsoft.Compute/virtualMachines", {"mistralctl-owner": THEIRS, "mistralctl-name": "one"}),
        (f"{CLUSTER}-data", "Microsoft.Compute/disks", {"mistralctl-owner": OURS, "mistralctl-name": "two"}),
    ],
)
def test_a_group_that_holds_something_else_stays(cloud: Azure, name: str, kind: str, tags: dict[str, str]) -> None:
    cloud.group(GROUP)
    cloud.machine(GROUP, OURS, "one")
    azure.label_others(OURS, "one", "eastus")
    parts = azure.ours(OURS, "one")
    cloud.put(GROUP, name, kind, tags)
    with pytest.raises(
        UserError, match=f"{GROUP} holds {name}, which mistralctl did not make: the resource group stays"
    ) as caught:
        azure.delete(parts)
    assert (caught.value.code, cloud.deleted) == (Exit.CLOUD, [f"{GROUP}/{CLUSTER}-vm"])


def test_a_group_of_the_users_own_is_neither_labelled_nor_deleted(cloud: Azure) -> None:
    cloud.group("mine")
    cloud.machine("mine", OURS, "one")
    assert azure.label_others(OURS, "one", "eastus") == 1
    assert cloud.groups == {"mine": {}}
    azure.delete(azure.ours(OURS, "one"))
    assert cloud.deleted == [f"mine/{CLUSTER}-vm"]
