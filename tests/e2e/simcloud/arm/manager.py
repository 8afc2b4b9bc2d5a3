"""management.azure.com: what may be asked of the documents, and operations that go on after the answer."""

from __future__ import annotations

import copy
import itertools
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from simcloud.arm import errors, identity
from simcloud.arm.errors import Refused
from simcloud.arm.identity import SUBSCRIPTION, TENANT
from simcloud.arm.resources import REGIONS, ROOT, Document, group_id, kind_of, public
from simcloud.arm.template import Template
from simcloud.arm.web import Answer, Asked

if TYPE_CHECKING:
    from simcloud.clouds.azure import Azure

VERBS = {"GET": "read", "HEAD": "read", "PUT": "write", "PATCH": "write", "DELETE": "delete", "POST": "action"}
MACHINES = "microsoft.compute/virtualmachines"
GROUP_DELETION_SECONDS = 3.0
OURS = {"id": ROOT, "subscriptionId": SUBSCRIPTION, "displayName": "simulated", "state": "Enabled", "tenantId": TENANT}
PROVIDERS = [f"Microsoft.{name}" for name in ("Authorization", "Compute", "ManagedIdentity", "Network", "Resources", "Storage")]
# The marketplace: images to versions to the GB that a disk needs.
MARKETPLACE = {
    "microsoft-dsvm:ubuntu-hpc:2204": {"22.04.2023080201": 30, "22.04.2025102701": 64, "22.04.2026082801": 64},
    "microsoft-dsvm:ubuntu-hpc:2004": {"20.04.2024102301": 30},
}
_TAG = re.compile(r"tagName eq '([^']*)'(?: and tagValue eq '([^']*)')?")


def listed(documents: Iterable[Document], query: dict[str, str] | None = None) -> Answer:
    """A page of documents, those with the tag that the query's filter names."""
    wanted = _TAG.match((query or {}).get("$filter", ""))
    found = list(documents)
    if wanted:
        found = [one for one in found if wanted[1] in (tags := one.get("tags") or {}) and wanted[2] in (None, tags[wanted[1]])]
    return Answer(200, {"value": [public(one) for one in found]})


class Manager:
    def __init__(self, azure: Azure) -> None:
        self.azure = azure
        self.operations: dict[str, Document] = {}
        self.registered: set[str] = set()  # by hand, since they were not

    # ---- operations that take their time

    def begin(self, work: Callable[[], None] | None = None) -> dict[str, str]:
        """Starts work in a thread; the headers by which a client asks how it goes."""
        operation: Document = {"id": str(uuid.uuid4()), "status": "InProgress"}
        self.operations[operation["id"]] = operation

        def go() -> None:
            try:
                if work:
                    work()
                operation["status"] = "Succeeded"
            except Refused as refused:
                operation.update(status="Failed", **refused.document())
            except Exception as error:  # noqa: BLE001 - the client shall see it
                operation.update(status="Failed", error={"code": "InternalServerError", "message": repr(error)})

        threading.Thread(target=go, daemon=True).start()
        base = f"https://management.azure.com{ROOT}/providers/Microsoft.Simulated/locations/here"
        query = "api-version=2024-01-01"
        return {
            "Retry-After": "1", "Azure-AsyncOperation": f"{base}/operations/{operation['id']}?{query}",
            "Location": f"{base}/operationResults/{operation['id']}?{query}",
        }  # fmt: skip

    def _operation(self, name: str, result: bool) -> Answer:
        found = self.operations[name]
        going = found["status"] == "InProgress"
        if not result:
            return Answer(200, {"name": name} | found, {"Retry-After": "1"} if going else {})
        if going:
            at = f"https://management.azure.com{ROOT}/providers/Microsoft.Simulated/locations/here/operationResults/{name}"
            return Answer(202, None, {"Retry-After": "1", "Location": f"{at}?api-version=2024-01-01"})
        if "error" in found:
            raise Refused(409, found["error"]["code"], found["error"]["message"])
        return Answer(200)

    # ---- who asks what

    def refusal(self, kind: str, who: str, action: str, scope: str) -> Refused:
        """How a fault is worded."""
        named = {"throttle": errors.THROTTLED, "credentials": errors.BAD_TOKEN}
        return named.get(kind) or errors.forbidden(who, action, scope)

    def answer(self, asked: Asked) -> Answer:
        parts = asked.path.strip("/").split("/")
        action, where = action_of(asked.method, parts), {"region": self._region(parts)}
        try:
            who = self.azure.tokens.whose(asked.headers.get("Authorization"), identity.ARM)
            fault = None if action == self.azure.LAUNCH else self.azure.refusal(action, where)
            if fault:
                raise self.refusal(fault.kind, who, action, asked.path)
            # What is asked of the whole subscription, an identity sees as far as it may: here, whoever may anything.
            allowed = self.azure.has_access(who) if len(parts) < 4 else self.azure.may(who, action, asked.path)
            if not allowed and parts != ["subscriptions"] and "Microsoft.Simulated" not in parts:
                raise errors.forbidden(who, action, asked.path)
            self._check_registered(parts)
            given = self._route(asked, parts, who)
        except Refused as refused:
            self.azure.journal.write("call", action=action, path=asked.path, error=refused.code, **where)
            raise
        self.azure.journal.write("call", action=action, path=asked.path, who=who, **where)
        return given

    def _region(self, parts: list[str]) -> str | None:
        if len(parts) > 3 and parts[2].lower() == "resourcegroups" and (group := self.azure.resources.get(group_id(parts[3]))):
            return str(group["location"])
        return None

    # ---- resource providers

    def _is_registered(self, namespace: str) -> bool:
        if self.azure.faults.find(("unregistered",), action=namespace) is None:
            self.registered.discard(namespace.lower())
            return True
        return namespace.lower() in self.registered

    def _check_registered(self, parts: list[str]) -> None:
        """Refuses what is asked of a provider that the subscription has not registered, but for registering it."""
        spaces = [one for before, one in itertools.pairwise(parts) if before.lower() == "providers"]
        if spaces and parts[2:-1] != ["providers"] and parts[-1] != "register" and not self._is_registered(spaces[-1]):
            raise errors.unregistered(spaces[-1])

    def _provider(self, asked: Asked, parts: list[str]) -> Answer:
        """https://learn.microsoft.com/rest/api/resources/providers: one, all, or one that is registered."""
        if asked.method == "POST":
            self.registered.add(parts[3].lower())
        names = [parts[3]] if len(parts) > 3 else list(PROVIDERS)
        shown: list[Document] = [
            {
                "id": f"{ROOT}/providers/{name}", "namespace": name, "resourceTypes": [],
                "registrationState": "Registered" if self._is_registered(name) else "NotRegistered",
            }
            for name in names
        ]  # fmt: skip
        return Answer(200, shown[0] if len(parts) > 3 else {"value": shown})

    def _route(self, asked: Asked, parts: list[str], who: str) -> Answer:
        lower = [part.lower() for part in parts]
        if lower == ["subscriptions"]:
            return Answer(200, {"value": [OURS] if self.azure.has_access(who) else []})
        if lower[:2] != ["subscriptions", SUBSCRIPTION]:
            raise Refused(404, "SubscriptionNotFound", f"The subscription '{asked.path}' could not be found.")
        rest = lower[2:]
        if not rest:
            return Answer(200, OURS)
        if rest == ["locations"]:
            return Answer(200, {"value": [{"id": f"{ROOT}/locations/{one}", "name": one, "displayName": one} for one in REGIONS]})
        if rest == ["resourcegroups"]:
            return listed(self.azure.resources.groups(), asked.query)
        if rest == ["resources"]:
            return listed(self.azure.resources.within(), asked.query)
        if rest[0] == "providers" and (len(rest) < 3 or rest[2] == "register"):
            return self._provider(asked, parts)
        if rest[0] == "providers":
            return self._of_subscription(parts, rest, asked.query)
        if rest[0] == "resourcegroups" and len(rest) == 2:
            return self._group(asked, parts[3])
        if rest[0] == "resourcegroups":
            return self._in_group(asked, parts, rest)
        raise Refused(404, "InvalidResourceType", f"{asked.path} is not simulated")

    def _of_subscription(self, parts: list[str], rest: list[str], query: dict[str, str]) -> Answer:
        if rest[-2] in ("operations", "operationresults"):
            return self._operation(parts[-1], rest[-2] == "operationresults")
        if rest[-1] == "usages":
            return self._usages(rest[-2])
        if "publishers" in rest:
            return _images(rest)
        if rest[-1] == "skus":
            return self._types()
        found = self.azure.resources.within(kind="/".join(rest[1:]))
        if query.get("statusOnly") == "true":  # how the machines are, and nothing of what they are made of
            return listed(
                {key: one[key] for key in ("id", "name", "type", "location")} | {"properties": {"instanceView": view(one)}}
                for one in found
            )
        return listed(found)

    def _usages(self, region: str) -> Answer:
        from simcloud.clouds.azure import FAMILIES, LIMIT, SPOT_TOTAL, TOTAL

        names = dict.fromkeys([TOTAL, SPOT_TOTAL, *FAMILIES.values()])
        return Answer(200, {"value": [
            {
                "unit": "Count", "currentValue": self.azure.used(region, name), "limit": int(self.azure.limit(region, name, LIMIT)),
                "name": {"value": name, "localizedValue": name},
            }
            for name in names
        ]})  # fmt: skip

    def _types(self) -> Answer:
        from simcloud.clouds.azure import FAMILIES

        return Answer(200, {"value": [
            {
                "resourceType": "virtualMachines", "name": name, "family": family, "locations": list(REGIONS), "restrictions": [],
                "capabilities": [{"name": "vCPUs", "value": str(self.azure.cores[name])}],
            }
            for name, family in FAMILIES.items() if name in self.azure.cores
        ]})  # fmt: skip

    # ---- groups

    def _group(self, asked: Asked, name: str) -> Answer:
        resources = self.azure.resources
        if asked.method == "PUT":
            made, new = resources.put_group(name, asked.json())
            return Answer(201 if new else 200, public(made))
        if asked.method == "HEAD":
            return Answer(204 if resources.get(group_id(name)) else 404)
        group = resources.group(name)
        if asked.method == "PATCH":
            group |= {"tags": asked.json()["tags"]} if "tags" in asked.json() else {}
        if asked.method == "DELETE":
            return self._delete_group(group)
        return Answer(200, public(group))

    def _delete_group(self, group: Document) -> Answer:
        name, where = group["name"], {"region": group["location"]}
        if self.azure.faults.find(("locked",), **where):
            raise Refused(409, "ScopeLocked", (
                f"The scope '{group['id']}' cannot perform delete operation because following scope(s) are locked: '{group['id']}'. Please "
                "remove the lock and try again."
            ))  # fmt: skip
        fails = self.azure.faults.find(("late_failure",), **where)
        states = [one["properties"] for one in (group, *self.azure.resources.within(name, MACHINES))]
        for state in states:
            state["provisioningState"] = "Deleting"

        def work() -> None:
            time.sleep(GROUP_DELETION_SECONDS)
            if fails:
                for state in states:
                    state["provisioningState"] = "Succeeded"
                self.azure.journal.write("group_stays", id=name)
                raise Refused(409, "ResourceGroupDeletionBlocked", f"Deletion of resource group '{name}' failed: some stay.")
            self.azure.resources.delete_group(name, self.azure.delete_machine)
            self.azure.journal.write("group_gone", id=name)

        return Answer(202, None, self.begin(work))

    # ---- what lies in groups

    def _in_group(self, asked: Asked, parts: list[str], rest: list[str]) -> Answer:
        resources, group = self.azure.resources, parts[3]
        resources.group(group)
        if rest[2] == "resources":
            hidden = ("microsoft.authorization/roleassignments", "microsoft.resources/deployments")
            dated = (one | {"createdTime": one["_created"]} for one in resources.within(group))
            return listed((one for one in dated if kind_of(one["id"]) not in hidden), asked.query)
        if rest[2] == "deployments":  # a short way to say it
            parts = [*parts[:4], "providers", "Microsoft.Resources", *parts[4:]]
        identifier = f"{group_id(group)}/{'/'.join(parts[4:])}"
        if len(parts) % 2:  # the name of a type or of an action comes last
            parent = identifier.rpartition("/")[0]
            if asked.method == "POST":
                return self._act(resources.find(parent), parts[-1].lower())
            if parts[-1].lower() == "instanceview":
                return Answer(200, view(resources.find(parent)))
            kind = "/".join([parts[5], *parts[6::2]]).lower()
            return listed(resources.within(group, kind))
        kind = kind_of(identifier)
        if kind == "microsoft.resources/deployments":
            return self._deployment(asked, identifier, group)
        if asked.method == "PUT" and kind == MACHINES:
            return self._put_machine(identifier, asked.json())
        if asked.method == "PUT":
            new = resources.get(identifier) is None
            return Answer(201 if new else 200, public(resources.put(identifier, asked.json())))
        if asked.method == "DELETE":
            return self._delete(identifier, kind)
        found = resources.find(identifier)
        if asked.method == "PATCH":
            change = asked.json()
            found |= {"tags": change["tags"]} if "tags" in change else {}
            found["properties"] |= change.get("properties") or {}
        shown = copy.deepcopy(public(found))
        if asked.query.get("$expand") == "instanceView":
            shown["properties"]["instanceView"] = view(found)
        return Answer(200, shown)

    def _put_machine(self, identifier: str, body: Document) -> Answer:
        machine, refused = self.azure.put_machine(identifier, body)

        def work() -> None:
            if refused:
                machine["properties"]["provisioningState"] = "Failed"
                raise refused
            self.azure.start(machine)

        return Answer(201, public(machine), self._only_operation(self.begin(work)))

    @staticmethod
    def _only_operation(headers: dict[str, str]) -> dict[str, str]:
        """A client that was given a Location too would take the machine from there."""
        return {name: value for name, value in headers.items() if name != "Location"}

    def _act(self, machine: Document, action: str) -> Answer:
        azure = self.azure
        actions: dict[str, tuple[str, Callable[[], None]]] = {
            "start": ("starting", lambda: azure.start(machine)),
            "deallocate": ("deallocating", lambda: azure.stop(machine, "deallocated", "stop")),
            "poweroff": ("stopping", lambda: azure.stop(machine, "stopped", "stop")),
        }
        if action not in actions:
            raise Refused(400, "InvalidAction", f"{action} is not simulated")
        machine["_power"], work = actions[action]
        return Answer(202, None, self.begin(work))

    def _deployment(self, asked: Asked, identifier: str, group: str) -> Answer:
        resources = self.azure.resources
        if asked.method == "DELETE":
            resources.delete(identifier)
            return Answer(204)
        if asked.method != "PUT":
            found = resources.get(identifier)
            if found is None:
                raise Refused(404, "DeploymentNotFound", f"Deployment '{identifier.rpartition('/')[2]}' could not be found.")
            return Answer(200, public(found))
        given = asked.json()["properties"]
        # The providers that a template names are registered by deploying it
        # (https://learn.microsoft.com/azure/azure-resource-manager/management/resource-providers-and-types).
        named = {one["type"].partition("/")[0] for one in given["template"]["resources"]}
        self.registered |= {one.lower() for one in named if not self._is_registered(one)}
        template = Template(
            given["template"], given.get("parameters") or {}, resources.open_group(group), resources.put, resources.find
        )
        made: Document = {
            "id": identifier, "name": identifier.rpartition("/")[2], "type": "Microsoft.Resources/deployments",
            "properties": {"provisioningState": "Running", "mode": given.get("mode")},
        }  # fmt: skip
        resources.add(made)

        def work() -> None:
            try:
                made["properties"] |= {"outputs": template.deploy(), "provisioningState": "Succeeded"}
            except Exception:
                made["properties"]["provisioningState"] = "Failed"
                raise

        return Answer(201, public(made), self._only_operation(self.begin(work)))

    def _delete(self, identifier: str, kind: str) -> Answer:
        found = self.azure.resources.get(identifier)
        if found is None:
            return Answer(204)
        if kind == MACHINES:
            found["properties"]["provisioningState"] = "Deleting"
            return Answer(202, None, self.begin(lambda: self.azure.delete_machine(found)))
        self.azure.resources.delete(identifier)
        return Answer(200)


def _images(rest: list[str]) -> Answer:
    """The versions of a marketplace image, or one of them, as https://learn.microsoft.com/rest/api/compute/virtual-machine-images has them."""
    of = dict(zip(rest[2::2], rest[3::2], strict=False))
    known = MARKETPLACE.get(":".join(of[one] for one in ("publishers", "offers", "skus")), {})
    if "versions" not in of:
        return Answer(200, [{"id": "/".join(["", *rest, name]), "name": name, "location": of["locations"]} for name in known])
    if of["versions"] not in known:
        raise Refused(404, "NotFound", "Artifact: VMImage was not found.")
    size = {"operatingSystem": "Linux", "sizeInGb": known[of["versions"]]}
    return Answer(200, {
        "id": "/".join(["", *rest]), "name": of["versions"], "location": of["locations"], "properties": {"osDiskImage": size}
    })  # fmt: skip


def action_of(method: str, parts: list[str]) -> str:
    """What Azure calls a request: Microsoft.Compute/virtualMachines/write, say."""
    verb = VERBS[method]
    if parts[2:3] == ["providers"] and len(parts) < 5:
        return f"Microsoft.Resources/subscriptions/providers/{verb}"
    if "providers" in parts[4:] or "providers" in parts[2:3]:
        start = len(parts) - 1 - parts[::-1].index("providers") + 1
        names = [parts[start], *parts[start + 1 :: 2]]
        return "/".join([*names, verb])
    levels = ["subscriptions", "resourceGroups", *parts[4::2]][: max(1, (len(parts) + 1) // 2)]
    return "/".join(["Microsoft.Resources", *levels, verb])


def view(machine: Document) -> dict[str, Any]:
    """How a machine is: that it was made, and its power."""
    made, power = machine["properties"]["provisioningState"], machine["_power"]
    states = [{"code": f"ProvisioningState/{made.lower()}", "level": "Info", "displayStatus": made}]
    if power:
        states.append({"code": f"PowerState/{power}", "level": "Info", "displayStatus": f"VM {power}"})
    return {"statuses": states}
