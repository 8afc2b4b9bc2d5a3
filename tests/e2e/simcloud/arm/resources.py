"""The documents of a subscription: resource groups and what lies in them, found by ids in any case of letters."""

from __future__ import annotations

import copy
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from simcloud.arm.errors import Refused
from simcloud.arm.identity import SUBSCRIPTION, TENANT

Document = dict[str, Any]
ROOT = f"/subscriptions/{SUBSCRIPTION}"
# Regions of the catalog, and home of nothing: a machine's address says its region.
REGIONS = (
    "eastus", "eastus2", "centralus", "southcentralus", "westus", "westus2", "westus3", "northeurope", "westeurope", "uksouth",
    "swedencentral", "australiaeast",
)  # fmt: skip
FIRST_NETWORK = 100  # the nodes of a region lie in 127.(100 + its number).0.0/16
IN_USE = {
    "networkinterfaces": "NicInUse", "publicipaddresses": "PublicIPAddressCannotBeDeleted", "disks": "OperationNotAllowed",
    "virtualnetworks": "InUseSubnetCannotBeDeleted", "networksecuritygroups": "InUseNetworkSecurityGroupCannotBeDeleted",
}  # fmt: skip
CHILDREN = {"networksecuritygroups": "securityRules", "virtualnetworks": "subnets", "networkinterfaces": "ipConfigurations"}


def group_id(name: str) -> str:
    return f"{ROOT}/resourceGroups/{name}"


def kind_of(identifier: str) -> str:
    """microsoft.compute/virtualmachines, say."""
    parts = identifier.lower().strip("/").split("/")
    start = len(parts) - 1 - parts[::-1].index("providers") + 1
    return "/".join([parts[start], *parts[start + 1 :: 2]])


def public(document: Document) -> Document:
    """A document without what only this program knows of it."""
    return {key: value for key, value in document.items() if not key.startswith("_")}


class Resources:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._all: dict[str, Document] = {}
        self._addresses: set[str] = set()

    def get(self, identifier: str) -> Document | None:
        return self._all.get(identifier.lower())

    def find(self, identifier: str) -> Document:
        found = self.get(identifier)
        if found is None:
            parts = identifier.strip("/").split("/")
            raise Refused(404, "ResourceNotFound", (
                f"The Resource '{'/'.join(parts[5:])}' under resource group '{parts[3]}' was not found. For more details please go to "
                "https://aka.ms/ARMResourceNotFoundFix"
            ))  # fmt: skip
        return found

    def group(self, name: str) -> Document:
        found = self.get(group_id(name))
        if found is None:
            raise Refused(404, "ResourceGroupNotFound", f"Resource group '{name}' could not be found.")
        return found

    def open_group(self, name: str) -> Document:
        """A group into which something can be put."""
        found = self.group(name)
        if found["properties"]["provisioningState"] == "Deleting":
            raise Refused(409, "ResourceGroupBeingDeleted", (
                f"The resource group '{name}' is in deprovisioning state and cannot perform this operation."
            ))  # fmt: skip
        return found

    def groups(self) -> list[Document]:
        return [one for one in list(self._all.values()) if one["type"] == "Microsoft.Resources/resourceGroups"]

    def within(self, group: str | None = None, kind: str | None = None) -> list[Document]:
        """What lies in a group (or in all), of a type (or of all)."""
        below = f"{group_id(group)}/providers/".lower() if group else ""
        return [
            one for key, one in list(self._all.items())
            if "/providers/" in key and key.startswith(below) and (kind is None or kind_of(key) == kind)
        ]  # fmt: skip

    def put_group(self, name: str, body: Document) -> tuple[Document, bool]:
        with self.lock:
            old = self.get(group_id(name))
            region = body["location"]
            if old is not None:
                self.open_group(name)
                if old["location"] != region:
                    raise Refused(409, "InvalidResourceGroupLocation", (
                        f"Invalid resource group location '{region}'. The Resource group already exists in location '{old['location']}'."
                    ))  # fmt: skip
            if region not in REGIONS:
                raise Refused(400, "LocationNotAvailableForResourceGroup", f"The provided location '{region}' is not available.")
            made = {
                "id": group_id(name), "name": name, "type": "Microsoft.Resources/resourceGroups", "location": region,
                "tags": body.get("tags") or {}, "properties": {"provisioningState": "Succeeded"},
            }  # fmt: skip
            self._all[group_id(name).lower()] = made
            return made, old is None

    def add(self, document: Document) -> None:
        document.setdefault("_created", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self._all[document["id"].lower()] = document

    def put(self, identifier: str, body: Document) -> Document:
        """Makes a resource or changes it: anything but a machine."""
        with self.lock:
            parts = identifier.strip("/").split("/")
            group = self.open_group(parts[3])
            old, kind = self.get(identifier), kind_of(identifier).rpartition("/")[2]
            made: Document = {"id": identifier, "name": parts[-1], "type": "/".join([parts[5], *parts[6::2]])} | (old or {})
            made |= {key: body[key] for key in ("location", "tags", "sku", "identity") if body.get(key) is not None}
            properties = copy.deepcopy(body.get("properties") or {}) | {"provisioningState": "Succeeded"}
            for child in properties.get(CHILDREN.get(kind, "")) or []:
                child.setdefault("id", f"{identifier}/{CHILDREN[kind]}/{child['name']}")
                child.setdefault("properties", {})["provisioningState"] = "Succeeded"
            region = str(made.get("location") or group["location"])
            if kind == "userassignedidentities":
                properties = old["properties"] if old else {
                    "tenantId": TENANT, "principalId": str(uuid.uuid4()), "clientId": str(uuid.uuid4())
                }  # fmt: skip
            elif kind == "roleassignments":
                properties.setdefault("scope", group["id"])
            elif kind == "publicipaddresses":
                properties["ipAddress"] = old["properties"]["ipAddress"] if old else self._address(region)
            elif kind == "networkinterfaces":
                self._connect(properties, old, region)
            made["properties"] = properties
            self.add(made)
            return made

    def _connect(self, properties: Document, old: Document | None, region: str) -> None:
        """Checks what an interface names; its private address is the public one."""
        if properties.get("networkSecurityGroup"):
            self.find(properties["networkSecurityGroup"]["id"])
        for configuration in properties["ipConfigurations"]:
            of = configuration["properties"]
            self.find(of["subnet"]["id"].rpartition("/subnets/")[0])
            if of.get("publicIPAddress"):
                of["privateIPAddress"] = self.find(of["publicIPAddress"]["id"])["properties"]["ipAddress"]
            elif old:
                of["privateIPAddress"] = old["properties"]["ipConfigurations"][0]["properties"]["privateIPAddress"]
            else:
                of["privateIPAddress"] = self._address(region)

    def _address(self, region: str) -> str:
        network = f"127.{FIRST_NETWORK + REGIONS.index(region)}"
        free = next(
            one for number in range(4, 65000) if (one := f"{network}.{number >> 8}.{number & 255}") not in self._addresses
        )
        self._addresses.add(free)
        return free

    def delete(self, identifier: str, *, force: bool = False) -> None:
        """Takes a resource away, unless another one uses it."""
        with self.lock:
            found = self.get(identifier)
            if found is None:
                return
            kind = kind_of(identifier).rpartition("/")[2]
            if not force and kind in IN_USE:
                for user in self._users(identifier):
                    raise Refused(400, IN_USE[kind], f"{identifier} is used by existing resource {user} and cannot be deleted.")
            del self._all[identifier.lower()]
            if kind == "publicipaddresses":
                self._addresses.discard(found["properties"]["ipAddress"])

    def _users(self, identifier: str) -> Iterator[str]:
        own = identifier.lower()
        for key, one in self._all.items():
            if "/providers/" in key and "/deployments/" not in key and not key.startswith(own) and own in json.dumps(one).lower():
                yield one["id"]

    def delete_group(self, name: str, machine: Callable[[Document], None]) -> None:
        """Takes a group away with all that is in it; `machine` takes a machine away."""
        for one in self.within(name, "microsoft.compute/virtualmachines"):
            machine(one)
        with self.lock:
            for one in self.within(name):
                self.delete(one["id"], force=True)
            self._all.pop(group_id(name).lower(), None)
