"""Azure: Resource Manager, whose virtual machines are nodes; sign-in, managed identities and roles; blobs behind tokens.

SkyPilot, the Azure CLI and the SDKs reach it by the real names of its hosts, which lead here (ADDRESS), over TLS.
"""

from __future__ import annotations

import csv
import http.client
import json
import threading
import time
import uuid
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from simcloud import azurite, catalog, gpus, tls
from simcloud.arm import errors, identity, web
from simcloud.arm.errors import Refused
from simcloud.arm.identity import Grant
from simcloud.arm.manager import Manager
from simcloud.arm.resources import REGIONS, ROOT, Document, Resources
from simcloud.cloud import Cloud
from simcloud.node_init import METADATA_ADDRESS, Machine
from simcloud.nodes import Service

ADDRESS = "127.0.0.4"
API_PORT, METADATA_PORT = 443, 8343
PORTS: tuple[int, ...] = (API_PORT, METADATA_PORT)
MANAGEMENT, LOGIN = "management.azure.com", "login.microsoftonline.com"
NAMES: tuple[str, ...] = (MANAGEMENT, LOGIN, azurite.HOST)
STORE = azurite
CREDENTIALS = {"azure_refresh_token": identity.REFRESH_TOKEN}
CLI = "04b07795-8ddb-461a-bbee-02f9e1bf7b46"  # the Azure CLI's own id, the same everywhere

# What this account has beforehand: a group with the storage account, and an identity that machines may be given.
SHARED = "shared"
NODES_IDENTITY = f"{ROOT}/resourceGroups/{SHARED}/providers/Microsoft.ManagedIdentity/userAssignedIdentities/nodes"
ACCOUNT = f"{ROOT}/resourceGroups/{SHARED}/providers/Microsoft.Storage/storageAccounts/{azurite.ACCOUNT}"

FAMILIES = {
    "Standard_D4s_v5": "standardDSv5Family", "Standard_D8s_v5": "standardDSv5Family", "Standard_D16s_v5": "standardDSv5Family",
    "Standard_NC24ads_A100_v4": "StandardNCADSA100v4Family", "Standard_NC40ads_H100_v5": "StandardNCadsH100v5Family",
    "Standard_NC4as_T4_v3": "Standard NCASv3_T4 Family", "Standard_NV36ads_A10_v5": "StandardNVADSA10v5Family",
}  # fmt: skip
TOTAL, SPOT_TOTAL = "cores", "lowPriorityCores"
LIMIT = 200.0  # cores of each family in each region, unless the test says otherwise


def prepare(folder: Path, home: Path) -> dict[str, str]:
    """What `az login` leaves in the laptop's home: an account and a refresh token; the user's identity for nodes in SkyPilot's
    configuration, because only one of the user's own opens blobs; SkyPilot's catalog: the project's own."""
    settings = home / ".azure"
    settings.mkdir(parents=True)
    user, host = identity.LAPTOP, LOGIN
    account = {
        "id": identity.SUBSCRIPTION, "name": "simulated", "state": "Enabled", "user": {"name": "laptop@example.com", "type": "user"},
        "isDefault": True, "tenantId": identity.TENANT, "environmentName": "AzureCloud", "homeTenantId": identity.TENANT,
        "managedByTenants": [],
    }  # fmt: skip
    whose = {"home_account_id": f"{user}.{identity.TENANT}", "environment": host}
    cache = {
        "Account": {f"{user}.{identity.TENANT}-{host}-{identity.TENANT}": whose | {
            "realm": identity.TENANT, "local_account_id": user, "username": "laptop@example.com", "authority_type": "MSSTS",
        }},
        "RefreshToken": {f"{user}.{identity.TENANT}-{host}-refreshtoken-{CLI}--": whose | {
            "credential_type": "RefreshToken", "secret": identity.REFRESH_TOKEN, "client_id": CLI, "target": "",
        }},
        "AppMetadata": {f"appmetadata-{host}-{CLI}": {"client_id": CLI, "environment": host, "family_id": "1"}},
    }  # fmt: skip
    (settings / "azureProfile.json").write_text(json.dumps({"installationId": "simulated", "subscriptions": [account]}))
    (settings / "msal_token_cache.json").write_text(json.dumps(cache))
    (settings / "clouds.config").write_text(f"[AzureCloud]\nsubscription = {identity.SUBSCRIPTION}\n")
    (settings / "config").write_text("[core]\ncollect_telemetry = no\n")
    # Where `account` is found: without that the CLI's first call loads all that it has, which takes longer than SkyPilot waits here.
    index = {"account": ["azure.cli.command_modules.profile"]}
    index_of = {"version": version("azure-cli-core"), "cloudProfile": "latest", "commandIndex": index}
    (settings / "commandIndex.json").write_text(json.dumps(index_of))
    (home / ".sky" / "config.yaml").write_text(f"azure:\n  remote_identity: {NODES_IDENTITY}\n")
    tables = catalog.lay_out(home, "azure")
    with (tables / "vms.csv").open() as file:
        cores = {row["InstanceType"]: int(float(row["vCPUs"])) for row in csv.DictReader(file)}
    (folder / "cores.json").write_text(json.dumps(cores))
    return {}


SERVICES: list[Service] = [(ADDRESS, API_PORT, ADDRESS, API_PORT), (METADATA_ADDRESS, 80, ADDRESS, METADATA_PORT)]


class Azure(Cloud):
    """The virtual machines and who may do what; documents are in `resources`, what is done with them in `Manager`."""

    LAUNCH = "Microsoft.Compute/virtualMachines/write"
    KINDS = (*Cloud.KINDS, "locked", "late_failure", "unregistered")

    def __init__(self, folder: Path, image: Path) -> None:
        super().__init__(folder, image, SERVICES)
        self.resources = Resources()
        self.tokens = identity.Tokens()
        self.cores: dict[str, int] = json.loads((folder / "cores.json").read_text())
        self.manager = Manager(self)
        self.grants = [
            Grant(identity.LAPTOP, identity.OWNER, ROOT), Grant(identity.LAPTOP, identity.BLOB_CONTRIBUTOR, ROOT)
        ]  # fmt: skip
        self.resources.put_group(SHARED, {"location": REGIONS[0]})
        nodes = self.resources.put(NODES_IDENTITY, {"location": REGIONS[0]})["properties"]["principalId"]
        self.grants += [Grant(nodes, identity.CONTRIBUTOR, ROOT), Grant(nodes, identity.BLOB_CONTRIBUTOR, ACCOUNT)]

    # ---- who may do what

    def _grants(self) -> list[Grant]:
        made = [one["properties"] for one in self.resources.within(kind="microsoft.authorization/roleassignments")]
        return self.grants + [Grant(one["principalId"], one["roleDefinitionId"].rpartition("/")[2], one["scope"]) for one in made]

    def may(self, principal: str, action: str, scope: str) -> bool:
        return any(grant.allows(principal, action, scope) for grant in self._grants())

    def has_access(self, principal: str) -> bool:
        return any(grant.principal == principal for grant in self._grants())

    # ---- machines

    def machines(self) -> list[Document]:
        return self.resources.within(kind="microsoft.compute/virtualmachines")

    def find(self, name: str) -> Document:
        return next(one for one in self.machines() if one["name"] == name)

    def interface(self, machine: Document) -> Document:
        return self.resources.find(machine["properties"]["networkProfile"]["networkInterfaces"][0]["id"])

    def address(self, machine: Document) -> str:
        return str(self.interface(machine)["properties"]["ipConfigurations"][0]["properties"]["privateIPAddress"])

    @staticmethod
    def where(machine: Document) -> dict[str, Any]:
        of = machine["properties"]
        spot = of.get("priority") == "Spot"
        return {"region": machine["location"], "zone": None, "instance_type": of["hardwareProfile"]["vmSize"], "spot": spot}

    def used(self, region: str, counter: str) -> int:
        """Cores in use there: of a family, of all, of spot machines. A deallocated machine has none."""
        total = 0
        for one in self.machines():
            where = self.where(one)
            own = SPOT_TOTAL if where["spot"] else FAMILIES.get(where["instance_type"], TOTAL)
            if (
                where["region"] == region
                and one["_power"] != "deallocated"
                and counter in (own, TOTAL if not where["spot"] else own)
            ):
                total += self.cores.get(where["instance_type"], 0)
        return total

    def refused_launch(self, where: dict[str, Any]) -> tuple[bool, Refused] | None:
        """Why Azure refuses a machine, and whether it says so at once; None if it does not."""
        region, kind = where["region"], where["instance_type"]
        family = FAMILIES.get(kind, "standardFamily")
        fault = self.refusal(self.LAUNCH, where)
        if fault and fault.kind in errors.LAUNCH:
            at_once, drawn = errors.LAUNCH[fault.kind][bool(where["spot"])]
            words = drawn.message.format(region=region, type=kind, family=family)
            return at_once, Refused(drawn.status, drawn.code, words)
        if fault:
            return True, self.manager.refusal(fault.kind, identity.LAPTOP, self.LAUNCH, ROOT)
        return None

    def put_machine(self, identifier: str, body: Document) -> tuple[Document, Refused | None]:
        """The document of a new machine, which is not running yet, and why it will not come to run."""
        parts = identifier.strip("/").split("/")
        self.resources.open_group(parts[3])
        properties = dict(body["properties"])
        interface = self.resources.find(properties["networkProfile"]["networkInterfaces"][0]["id"])
        for one in (body.get("identity") or {}).get("userAssignedIdentities") or {}:
            self.resources.find(one)
        made: Document = {
            "id": identifier, "name": parts[-1], "type": "Microsoft.Compute/virtualMachines", "location": body["location"],
            "tags": body.get("tags") or {}, "identity": body.get("identity"), "_power": None,
        }  # fmt: skip
        system = {
            key: value for key, value in (properties.get("osProfile") or {}).items() if key not in ("adminPassword", "customData")
        }
        made["properties"] = properties | {
            "osProfile": system, "vmId": str(uuid.uuid4()), "provisioningState": "Creating",
            "timeCreated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        if properties.get("priority") == "Spot":
            made["properties"].setdefault("evictionPolicy", "Deallocate")
        where = self.where(made)
        refused = self.refused_launch(where)
        if refused:
            at_once, error = refused
            self.journal.write("call", action=self.LAUNCH, error=error.code, **where)
            if at_once:
                raise error
        self.resources.add(made)
        interface["properties"]["virtualMachine"] = {"id": identifier}
        if not refused:
            self._make_disk(made)
        return made, refused[1] if refused else None

    def _make_disk(self, machine: Document) -> None:
        wanted = machine["properties"]["storageProfile"]["osDisk"]
        name = f"{machine['name']}_OsDisk_1_{uuid.uuid4().hex}"
        made = f"{machine['id'].rpartition('/virtualMachines/')[0]}/disks/{name}"
        wanted |= {"name": name, "managedDisk": (wanted.get("managedDisk") or {}) | {"id": made}}
        self.resources.add({
            "id": made, "name": name, "type": "Microsoft.Compute/disks", "location": machine["location"], "managedBy": machine["id"],
            "tags": dict(machine["tags"]), "sku": {"name": wanted["managedDisk"].get("storageAccountType")},
            "properties": {
                "diskSizeGB": wanted.get("diskSizeGB"), "diskState": "Attached", "provisioningState": "Succeeded",
                "timeCreated": machine["properties"]["timeCreated"],
            },
        })  # fmt: skip

    def start(self, machine: Document) -> None:
        """Boots a machine, for the first time or again."""
        profile, address = machine["properties"]["osProfile"], self.address(machine)
        keys = "".join(f"{one['keyData'].strip()}\n" for one in profile["linuxConfiguration"]["ssh"]["publicKeys"])
        machine["_power"] = "running"
        machine["properties"]["provisioningState"] = "Succeeded"
        node = Machine(
            machine["name"], address, machine["name"], str(self.nodes.image), str(self.nodes.path(machine["name"])),
            {profile["adminUsername"]: keys}, hosts=dict.fromkeys(NAMES, ADDRESS),
            authority=str(self.folder.parent / "tls" / tls.AUTHORITY),
            gpus=gpus.of_type("azure", machine["properties"]["hardwareProfile"]["vmSize"]), cloud="azure",
            asked=machine["properties"]["storageProfile"].get("imageReference") or {},
        )  # fmt: skip
        if not self.nodes.is_up(machine["name"]):
            self.power_on(node, lambda: self.ports(machine), self.where(machine))

    def stop(self, machine: Document, power: str, event: str) -> None:
        """Cuts the power. `power`: what the machine is then; deallocated, it costs nothing but its disk."""
        self.nodes.halt(machine["name"])
        machine["_power"] = power
        self.journal.write(event, id=machine["name"])

    def delete_machine(self, machine: Document) -> None:
        """With its disk, where the machine says so."""
        self.nodes.halt(machine["name"], wipe=True)
        self.resources.delete(machine["id"])
        self.interface(machine)["properties"].pop("virtualMachine", None)
        disk = machine["properties"]["storageProfile"]["osDisk"]
        found = self.resources.get((disk.get("managedDisk") or {}).get("id", ""))
        if found and disk.get("deleteOption") == "Delete":
            self.resources.delete(found["id"])
        elif found:
            found.pop("managedBy", None)
            found["properties"]["diskState"] = "Unattached"
        self.journal.write("terminate", id=machine["name"])

    def ports(self, machine: Document) -> set[int]:
        group = self.interface(machine)["properties"].get("networkSecurityGroup")
        return set(open_ports(self.resources.find(group["id"]))) if group else set()

    # ---- the test's back door

    def instances(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one["name"], "type": one["properties"]["hardwareProfile"]["vmSize"], "region": one["location"],
                "zone": one["location"], "state": one["_power"] or one["properties"]["provisioningState"], "tags": one["tags"],
                "spot": self.where(one)["spot"], "address": self.address(one),
            }
            for one in sorted(self.machines(), key=lambda one: one["properties"]["timeCreated"])
        ]  # fmt: skip

    def volumes(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one["name"], "region": one["location"], "state": one["properties"]["diskState"], "tags": one["tags"],
                "size": one["properties"]["diskSizeGB"], "instance": (one.get("managedBy") or "").rpartition("/")[2] or None,
            }
            for one in self.resources.within(kind="microsoft.compute/disks")
        ]  # fmt: skip

    def firewalls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one["id"], "name": one["name"], "region": one["location"], "ports": open_ports(one),
                "tags": one.get("tags") or {},
            }
            for one in self.resources.within(kind="microsoft.network/networksecuritygroups")
        ]  # fmt: skip

    def groups(self) -> list[str]:
        """The resource groups that are there, but for the one that always was."""
        return [one["name"] for one in self.resources.groups() if one["name"] != SHARED]

    def age(self, id: str, minutes: float) -> None:
        """Lets a machine be older than it is."""
        made = time.gmtime(time.time() - minutes * 60)
        self.find(id)["properties"]["timeCreated"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", made)

    def ended(self, id: str, status: int) -> None:
        """A machine that powers itself off is stopped, and paid for; Azure does not take it away."""
        self.journal.write("ended", id=id, status=status)
        for machine in self.machines():
            if machine["name"] == id and status == 0:
                machine["_power"] = "stopped"

    def preempt(self, id: str) -> None:
        """Azure evicts a spot machine: it is deallocated, its disk stays."""
        machine = self.find(id)
        if machine["_power"] != "running":
            raise ValueError(f"{id} does not run: {machine['_power']}")
        self.stop(machine, "deallocated", "preempt")

    # ---- the doors

    def answer(self, asked: web.Asked) -> web.Answer | http.client.HTTPResponse:
        if asked.host == LOGIN:
            form = dict(parse_qsl(asked.body.decode()))
            expired = asked.path.endswith("/token") and self.refusal("login", {}) is not None
            found = identity.login(self.tokens, asked.path, form, expired)
            return web.Answer(400 if "error" in found else 200, found)
        if asked.host == azurite.HOST:
            return self.blobs(asked)
        return self.manager.answer(asked)

    @cached_property
    def _signature(self) -> dict[str, str]:
        return dict(parse_qsl(azurite.signature()))

    def blobs(self, asked: web.Asked) -> web.Answer | http.client.HTTPResponse:
        """The storage account, for identities with a role on it; what is behind knows the account's key only."""
        container = asked.path.strip("/").partition("/")[0]
        action = f"Microsoft.Storage/storageAccounts/blobServices/containers/blobs/{'read' if asked.method in ('GET', 'HEAD') else 'write'}"
        try:
            who = self.tokens.whose(asked.headers.get("Authorization"), identity.STORAGE)
        except Refused as refused:
            return _storage_error(refused.status, "InvalidAuthenticationInfo", refused.message)
        if not self.may(who, action, f"{ACCOUNT}/blobServices/default/containers/{container}"):
            self.journal.write("call", action=action, error="AuthorizationPermissionMismatch", who=who)
            words = "This request is not authorized to perform this operation using this permission."
            return _storage_error(403, "AuthorizationPermissionMismatch", words)
        self.journal.write("call", action=action, who=who, path=asked.path)
        behind = http.client.HTTPConnection("127.0.0.1", azurite.PORT, timeout=120)
        given = {key: value for key, value in asked.headers.items() if key.lower() not in ("authorization", "host", "connection")}
        target = f"/{azurite.ACCOUNT}{quote(asked.path)}?{urlencode(asked.query | self._signature)}"
        behind.request(asked.method, target, asked.body or None, given)
        return behind.getresponse()

    def metadata(self, asked: web.Asked) -> web.Answer:
        """169.254.169.254: who asks is known by the address."""
        machine = next((one for one in self.machines() if one["_power"] == "running" and self.address(one) == asked.who), None)
        if machine is None or asked.headers.get("Metadata") != "true":
            return web.Answer(400, {"error": "bad_request", "error_description": "Required metadata header not specified"})
        if asked.path == "/metadata/identity/oauth2/token":
            given = list((machine.get("identity") or {}).get("userAssignedIdentities") or {})
            owned = [self.resources.get(one) for one in given]
            wanted = asked.query.get("client_id")
            found = [one for one in owned if one and wanted in (None, one["properties"]["clientId"])]
            if len(found) != 1:
                return web.Answer(400, {"error": "invalid_request", "error_description": "Identity not found"})
            token = self.tokens.make(found[0]["properties"]["principalId"], asked.query["resource"], xms_mirid=found[0]["id"])
            seconds = identity.TOKEN_SECONDS
            return web.Answer(200, {
                "access_token": token, "expires_in": str(seconds), "expires_on": str(int(time.time()) + seconds),
                "resource": asked.query["resource"], "token_type": "Bearer", "client_id": found[0]["properties"]["clientId"],
            })  # fmt: skip
        if asked.path == "/metadata/instance":
            of = machine["properties"]
            return web.Answer(200, {"compute": {
                "azEnvironment": "AzurePublicCloud", "location": machine["location"], "name": machine["name"], "vmId": of["vmId"],
                "vmSize": of["hardwareProfile"]["vmSize"], "subscriptionId": identity.SUBSCRIPTION, "resourceId": machine["id"],
                "priority": of.get("priority", "Regular"), "resourceGroupName": machine["id"].split("/")[4],
            }})  # fmt: skip
        if asked.path == "/metadata/instance/compute/storageProfile":
            return web.Answer(200, {"imageReference": machine["properties"]["storageProfile"].get("imageReference", {})})
        return web.Answer(404, {"error": "not found"})


def _storage_error(status: int, code: str, words: str) -> web.Answer:
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{words}</Message></Error>'
    return web.Answer(status, body.encode(), {"Content-Type": "application/xml", "x-ms-error-code": code})


def open_ports(group: Document) -> dict[int, list[str]]:
    """TCP ports that a network security group opens, and to which networks, which is told and not enforced: a rule of a smaller number
    goes before."""
    found: dict[int, list[str]] = {}
    rules = [rule["properties"] for rule in group["properties"].get("securityRules") or []]
    for rule in sorted(rules, key=lambda rule: -int(rule["priority"])):
        if rule["direction"] != "Inbound" or rule["protocol"].lower() not in ("tcp", "*"):
            continue
        for named in [*(rule.get("destinationPortRanges") or []), rule.get("destinationPortRange")]:
            if named and named != "*":
                first, _, last = str(named).partition("-")
                networks = rule.get("sourceAddressPrefixes") or [rule["sourceAddressPrefix"]]
                networks = ["0.0.0.0/0" if network == "*" else network for network in networks]
                for port in range(int(first), min(int(last or first), int(first) + 999) + 1):
                    found.pop(port, None)
                    if rule["access"] == "Allow":
                        found[port] = networks
    return found


def serve(folder: Path, image: Path) -> None:
    """Resource Manager and its like, the metadata service, the back door."""
    azure = Azure(folder, image)
    azure.listen(groups=azure.groups, age=azure.age)
    metadata = web.server(ADDRESS, METADATA_PORT, azure.metadata)
    threading.Thread(target=metadata.serve_forever, daemon=True).start()
    web.server(ADDRESS, API_PORT, azure.answer, folder.parent / "tls" / tls.SERVER).serve_forever()
