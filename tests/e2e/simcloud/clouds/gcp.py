"""Google: an instance is a node; its API, its sign-in and its metadata are in gcp_api.py, beside what they know here.

Everything is found under Google's own names, which lead to this machine, over TLS. Nothing answers without a token of
this SimCloud: the laptop gets one for its refresh token, a node from its metadata server, for its service account.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from simcloud import catalog, gcs, tls
from simcloud.cloud import Cloud
from simcloud.faults import ON_BOOT, Fault
from simcloud.node_init import METADATA_ADDRESS, Machine

ADDRESS = "127.0.0.11"
API_PORT, METADATA_PORT = 443, 80
PORTS: tuple[int, ...] = (API_PORT, METADATA_PORT)
SERVICES = ("compute", "cloudresourcemanager", "iam", "serviceusage", "storage", "tpu", "oauth2", "www", "iamcredentials")
NAMES: tuple[str, ...] = tuple(f"{service}.googleapis.com" for service in SERVICES)
STORE = gcs

PROJECT, NUMBER = "simulated-project", "424242424242"
ACCOUNT = "laptop@example.com"
CREDENTIALS = {"gcp_client_secret": "laptop-client-secret", "gcp_refresh_token": "laptop-refresh-token"}
BASE = "https://www.googleapis.com/compute/v1/"
SCOPE = f"projects/{PROJECT}"
Resource = dict[str, Any]


# ---- the laptop


def prepare(folder: Path, home: Path) -> dict[str, str]:
    """Files as `gcloud auth application-default login` leaves them, a stand-in of gcloud, SkyPilot's catalog."""
    settings = home / ".config" / "gcloud"
    (settings / "configurations").mkdir(parents=True)
    key = {
        "type": "authorized_user", "client_id": "laptop-client-id", "client_secret": CREDENTIALS["gcp_client_secret"],
        "refresh_token": CREDENTIALS["gcp_refresh_token"], "account": "", "quota_project_id": PROJECT, "universe_domain": "googleapis.com",
    }  # fmt: skip
    (settings / "application_default_credentials.json").write_text(json.dumps(key, indent=2))
    (settings / "configurations" / "config_default").write_text(f"[core]\naccount = {ACCOUNT}\nproject = {PROJECT}\n")
    (settings / "active_config").write_text("default")
    for name in ("credentials.db", "access_tokens.db"):  # gcloud's own; SkyPilot looks whether they are there
        (settings / name).touch()
    program = home / "bin" / "gcloud"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {Path(gcs.__file__).with_name("gcloud.py")} "$@"\n')
    program.chmod(0o755)
    tables = catalog.lay_out(home, "gcp")
    shutil.copy(tables / "vms.csv", folder / "vms.csv")
    with (tables / "accelerator_quota_mapping.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Accelerator", "OnDemandInstanceCode", "SpotInstanceCode"])
        rows.writerows([name, metric, f"PREEMPTIBLE_{metric}"] for name, metric in GPU_METRICS.items())
    return {}


# ---- what it charges against quotas: https://cloud.google.com/compute/resource-usage

GPU_METRICS = {
    "T4": "NVIDIA_T4_GPUS", "L4": "NVIDIA_L4_GPUS", "V100": "NVIDIA_V100_GPUS", "A100": "NVIDIA_A100_GPUS",
    "A100-80GB": "NVIDIA_A100_80GB_GPUS", "H100": "NVIDIA_H100_GPUS",
}  # fmt: skip
# Google's names of GPUs, and the catalog's.
GPU_NAMES = {
    "nvidia-tesla-t4": "T4", "nvidia-l4": "L4", "nvidia-tesla-v100": "V100", "nvidia-tesla-a100": "A100",
    "nvidia-a100-80gb": "A100-80GB", "nvidia-h100-80gb": "H100",
}  # fmt: skip
REGION_LIMITS = {
    "CPUS": 72, "N2_CPUS": 72, "A2_CPUS": 72, "PREEMPTIBLE_CPUS": 72, "DISKS_TOTAL_GB": 40960, "SSD_TOTAL_GB": 10000, "IN_USE_ADDRESSES": 69,
    **dict.fromkeys(GPU_METRICS.values(), 8), **{f"PREEMPTIBLE_{metric}": 8 for metric in GPU_METRICS.values()},
}  # fmt: skip
GLOBAL = "global"
GLOBAL_LIMITS = {"CPUS_ALL_REGIONS": 256, "GPUS_ALL_REGIONS": 16}


def gpu_name(attached: Resource) -> str:
    return GPU_NAMES[last(attached["acceleratorType"])]


def last(link: str) -> str:
    return link.rsplit("/", 1)[-1]


def path_of(link: str) -> str:
    return link[link.index("projects/") :]


def is_spot(body: Resource) -> bool:
    scheduling = body.get("scheduling", {})
    return bool(scheduling.get("provisioningModel") == "SPOT" or scheduling.get("preemptible"))


def needs(instance: Resource) -> dict[str, int]:
    """What an instance takes of each quota."""
    kind, spot = last(instance["machineType"]), "PREEMPTIBLE_" if is_spot(instance) else ""
    digits = re.search(r"-(\d+)$", kind)
    count = int(digits[1]) if digits else 2
    family = {"n2": "N2_CPUS", "a2": "A2_CPUS"}.get(kind.partition("-")[0], "CPUS")
    found = {f"{spot}CPUS" if spot else family: count, "CPUS_ALL_REGIONS": count, "IN_USE_ADDRESSES": 1}
    for one in instance.get("guestAccelerators", []):
        metric = GPU_METRICS[gpu_name(one)]
        found[spot + metric] = int(one["acceleratorCount"])
        found["GPUS_ALL_REGIONS"] = found.get("GPUS_ALL_REGIONS", 0) + int(one["acceleratorCount"])
    return found


def open_ports(rules: list[Resource]) -> dict[int, list[str]]:
    """TCP ports that somebody outside may reach, and from which networks, which is told and not enforced; of a range, the first
    thousand."""
    found: dict[int, list[str]] = {}
    for rule in rules:
        outside = [network for network in rule.get("sourceRanges", []) if not network.startswith("10.")]
        if rule["disabled"] or rule["direction"] != "INGRESS" or not outside:
            continue
        for allowed in rule.get("allowed", []):
            for ports in allowed.get("ports", []) if allowed["IPProtocol"] in ("tcp", "6") else []:
                low, _, high = ports.partition("-")
                for port in range(int(low), min(int(high or low), int(low) + 999) + 1):
                    found[port] = sorted({*found.get(port, []), *outside})
    return found


class OperationFailed(Exception):
    """What an operation ends with: Google's codes and texts, the way in which refused launches are told."""

    def __init__(self, *errors: tuple[str, str]) -> None:
        super().__init__(str(errors))
        self.errors = [{"code": code, "message": message} for code, message in errors]


class Google(Cloud):
    """A project. `resources` are by kind (as the API's paths name it) and path below `projects/`."""

    LAUNCH = "compute.instances.*nsert"
    KINDS = (*ON_BOOT, "capacity", "quota", "permission", "throttle", "credentials", "no_api")

    def __init__(self, folder: Path, image: Path) -> None:
        super().__init__(folder, image, [
            (METADATA_ADDRESS, 443, ADDRESS, API_PORT), (METADATA_ADDRESS, 80, ADDRESS, METADATA_PORT),
        ])  # fmt: skip
        with (folder / "vms.csv").open() as file:
            places = {(row["Region"], row["AvailabilityZone"]) for row in csv.DictReader(file)}
        self.zones = sorted(zone for _, zone in places)
        self.regions = sorted({region for region, _ in places})
        self.resources: dict[str, dict[str, Resource]] = {
            kind: {} for kind in ("instances", "disks", "operations", "networks", "subnetworks", "firewalls")
        }
        self.tokens: dict[str, str] = {}  # to the account that has it
        self.accounts: dict[str, Resource] = {}
        self.enabled = {"compute", "cloudresourcemanager", "iam", "serviceusage", "storage"}
        self.policy: Resource = {
            "version": 1, "etag": "1", "bindings": [{"role": "roles/owner", "members": [f"user:{ACCOUNT}"]}],
        }  # fmt: skip
        self.preempted: set[str] = set()
        self.lock = threading.RLock()
        self.numbers = itertools.count(int(time.time() * 1000) * 1000)
        self.default_network()

    # what the test sees

    def instances(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one["name"], "type": last(one["machineType"]), "region": last(one["zone"]).rpartition("-")[0],
                "zone": last(one["zone"]), "state": "stopped" if one["status"] == "TERMINATED" else one["status"].lower(),
                "tags": one["labels"], "spot": is_spot(one), "address": address(one),
            }
            for one in sorted(self.resources["instances"].values(), key=lambda one: int(one["id"]))
        ]  # fmt: skip

    def volumes(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one["name"], "zone": last(one["zone"]), "state": one["status"].lower(), "size": int(one["sizeGb"]),
                "tags": one.get("labels", {}), "instance": last(one["users"][0]) if one["users"] else None,
            }
            for one in list(self.resources["disks"].values())
        ]  # fmt: skip

    def firewalls(self) -> list[dict[str, Any]]:
        return [
            {"id": rule["name"], "name": rule["name"], "ports": open_ports([rule]), "tags": rule.get("targetTags", [])}
            for rule in list(self.resources["firewalls"].values())
        ]

    # resources

    def put(self, kind: str, path: str, **fields: Any) -> Resource:
        made = {
            "kind": f"compute#{kind.removesuffix('s')}", "id": str(next(self.numbers)), "name": last(path), "selfLink": BASE + path,
            "creationTimestamp": now(),
        }  # fmt: skip
        self.resources[kind][path] = made | fields
        return self.resources[kind][path]

    def operation(self, what: str, target: str, work: Callable[[], None] | None = None) -> Resource:
        """An operation that does some work in the background, where the resource that it changes belongs."""
        parts = target.split("/")
        scope = "/".join(parts[:3] if parts[2] == GLOBAL else parts[:4])
        number = next(self.numbers)
        found = self.put(
            "operations", f"{scope}/operations/operation-{number}", operationType=what, targetLink=BASE + target, status="RUNNING",
            progress=0, insertTime=now(), startTime=now(), **({} if parts[2] == GLOBAL else {parts[2].removesuffix("s"): BASE + scope}),
        )  # fmt: skip

        def run() -> None:
            try:
                if work:
                    work()
            except OperationFailed as failed:
                found["error"] = {"errors": failed.errors}
                self.journal.write("refused", operation=what, target=target, error=failed.errors[-1]["code"])
            except Exception as error:  # a bug of this file
                found["error"] = {"errors": [{"code": "INTERNAL_ERROR", "message": repr(error)}]}
                raise
            finally:
                found.update(status="DONE", progress=100, endTime=now())

        if work:
            threading.Thread(target=run, daemon=True).start()
        else:
            run()
        return dict(found)

    # networks: a region's addresses lie on loopback

    def make_network(self, name: str, automatic: bool, **fields: Any) -> None:
        self.put(
            "networks", f"{SCOPE}/global/networks/{name}", **fields | {"autoCreateSubnetworks": automatic, "subnetworks": []}
        )
        for number, region in enumerate(self.regions if automatic else []):
            self.make_subnetwork(region, name, f"127.{160 + number}.0.0/16", name)

    def make_subnetwork(self, region: str, name: str, addresses: str, network: str) -> None:
        owner = self.resources["networks"][f"{SCOPE}/global/networks/{network}"]
        made = self.put(
            "subnetworks", f"{SCOPE}/regions/{region}/subnetworks/{name}", ipCidrRange=addresses, network=owner["selfLink"],
            region=f"{BASE}{SCOPE}/regions/{region}",
        )  # fmt: skip
        owner["subnetworks"].append(made["selfLink"])

    def make_firewall(self, body: Resource) -> None:
        fields = body | {"network": BASE + path_of(body["network"]), "disabled": False}
        fields.pop("selfLink", None)
        self.put("firewalls", f"{SCOPE}/global/firewalls/{body['name']}", **fields)

    def default_network(self) -> None:
        self.make_network("default", automatic=True)
        every = [{"IPProtocol": "tcp", "ports": ["0-65535"]}, {"IPProtocol": "udp", "ports": ["0-65535"]}, {"IPProtocol": "icmp"}]
        for name, allowed, source in (
            ("internal", every, "10.128.0.0/9"), ("ssh", [{"IPProtocol": "tcp", "ports": ["22"]}], "0.0.0.0/0"),
            ("icmp", [{"IPProtocol": "icmp"}], "0.0.0.0/0"),
        ):  # fmt: skip
            self.make_firewall({
                "name": f"default-allow-{name}", "network": f"{SCOPE}/global/networks/default", "direction": "INGRESS",
                "priority": 65534, "sourceRanges": [source], "allowed": allowed,
            })  # fmt: skip

    def ports(self, instance: Resource) -> set[int]:
        networks = {one["network"] for one in instance["networkInterfaces"]}
        tags = set(instance["tags"].get("items", []))
        rules = [rule for rule in list(self.resources["firewalls"].values()) if rule["network"] in networks]
        return set(open_ports([rule for rule in rules if not rule.get("targetTags") or tags & set(rule["targetTags"])]))

    # quotas: unlike on the other clouds, they refuse what goes beyond them

    def quotas(self, region: str) -> list[Resource]:
        limits = GLOBAL_LIMITS if region == GLOBAL else REGION_LIMITS
        used = [
            needs(one) for path, one in list(self.resources["instances"].items())
            if one["status"] != "TERMINATED" and (region == GLOBAL or f"/zones/{region}-" in path)
        ]  # fmt: skip
        return [
            {
                "metric": name, "limit": float(self.limit(region, name, value)),
                "usage": float(sum(taken.get(name, 0) for taken in used)),
            }
            for name, value in limits.items()
        ]  # fmt: skip

    def admit(self, instance: Resource, zone: str, bulk: bool) -> None:
        """OperationFailed if a quota is used up or a fault says so."""
        region = zone.rpartition("-")[0]
        kind, spot = last(instance["machineType"]), is_spot(instance)
        where: dict[str, Any] = {"region": region, "zone": zone, "instance_type": kind, "spot": spot}
        wanted = needs(instance)
        for scope in (region, GLOBAL):
            for quota in self.quotas(scope):
                if quota["usage"] + wanted.get(quota["metric"], 0) > quota["limit"]:
                    raise exceeded(quota["metric"], quota["limit"], scope)
        found = self.faults.find(("capacity", "quota"), action="compute.instances.insert", **where)
        if found and found.kind == "quota":
            metric = next((name for name in wanted if name.endswith("GPUS")), next(iter(wanted)))
            raise exceeded(metric, 0.0, region)
        if found:
            many = [("VM_MIN_COUNT_NOT_REACHED", "Requested minimum count of 1 VMs could not be created.")] if bulk else []
            raise OperationFailed(*many, ("ZONE_RESOURCE_POOL_EXHAUSTED", (
                f"The zone '{SCOPE}/zones/{zone}' does not have enough resources available to fulfill the request.  Try a different "
                "zone, or try again later."
            )))  # fmt: skip

    # instances

    def create(self, zone: str, name: str, body: Resource, bulk: bool) -> None:
        """Makes an instance with its disks and boots it; OperationFailed if it is refused."""
        path, place = f"{SCOPE}/zones/{zone}/instances/{name}", f"{BASE}{SCOPE}/zones/{zone}"
        region = zone.rpartition("-")[0]
        with self.lock:
            subnetwork = self.subnetwork_for(body, region)
            address = self.free_address(subnetwork["ipCidrRange"])
            interface = {
                "name": "nic0", "network": subnetwork["network"], "subnetwork": subnetwork["selfLink"], "networkIP": address,
                "accessConfigs": [{"type": "ONE_TO_ONE_NAT", "name": "External NAT", "natIP": address}],
            }  # fmt: skip
            scheduling = {
                "onHostMaintenance": "MIGRATE",
                "automaticRestart": True,
                "preemptible": False,
                "provisioningModel": "STANDARD",
            }
            fields: Resource = {
                "zone": place, "machineType": f"{place}/machineTypes/{last(body['machineType'])}", "status": "PROVISIONING",
                "labels": body.get("labels", {}), "labelFingerprint": self.fingerprint(), "networkInterfaces": [interface],
                "tags": dict(body.get("tags") or {}) | {"fingerprint": self.fingerprint()}, "metadata": dict(body.get("metadata") or {}),
                "serviceAccounts": body.get("serviceAccounts", []), "scheduling": scheduling | body.get("scheduling", {}),
                "guestAccelerators": [
                    {"acceleratorType": f"{place}/acceleratorTypes/{last(one['acceleratorType'])}",
                     "acceleratorCount": int(one["acceleratorCount"])}
                    for one in body.get("guestAccelerators", [])
                ],
            }  # fmt: skip
            self.admit(fields, zone, bulk)
            disks = [self.make_disk(path, number, disk) for number, disk in enumerate(body.get("disks", []))]
            instance = self.put("instances", path, **fields, disks=disks)
        self.boot(instance)

    def image(self, instance: Resource) -> str | None:
        """The image of an instance's boot disk, as its metadata server names it: projects/PROJECT/global/images/IMAGE."""
        [boot] = [disk for disk in instance["disks"] if disk["boot"]]
        source = self.resources["disks"][boot["source"].removeprefix(BASE)]["sourceImage"]
        return str(source).partition("/compute/v1/")[2] or source

    def make_disk(self, instance: str, number: int, disk: Resource) -> Resource:
        zone, asked = instance.split("/")[3], disk.get("initializeParams", {})
        name = last(instance) if disk.get("boot") else f"{last(instance)}-{number}"
        made = self.put(
            "disks", f"{SCOPE}/zones/{zone}/disks/{name}", zone=f"{BASE}{SCOPE}/zones/{zone}", sizeGb=str(asked.get("diskSizeGb", 50)),
            status="READY", sourceImage=asked.get("sourceImage"), type=last(asked.get("diskType", "pd-standard")), users=[BASE + instance],
            labelFingerprint=self.fingerprint(),
            **({"labels": asked["labels"]} if asked.get("labels") else {}),
        )  # fmt: skip
        return {
            "source": made["selfLink"], "boot": bool(disk.get("boot")), "autoDelete": bool(disk.get("autoDelete")), "index": number,
            "deviceName": disk.get("deviceName", f"persistent-disk-{number}"), "diskSizeGb": made["sizeGb"],
        }  # fmt: skip

    def subnetwork_for(self, body: Resource, region: str) -> Resource:
        interface = (body.get("networkInterfaces") or [{"network": "global/networks/default"}])[0]
        name = last(interface.get("subnetwork") or interface["network"])
        found = self.resources["subnetworks"].get(f"{SCOPE}/regions/{region}/subnetworks/{name}")
        if found is None:
            raise OperationFailed(
                ("RESOURCE_NOT_FOUND", f"The resource '{SCOPE}/regions/{region}/subnetworks/{name}' was not found")
            )
        return found

    def free_address(self, addresses: str) -> str:
        used = {address(one) for one in self.resources["instances"].values()}
        begin = ".".join(addresses.split(".")[:2])
        return next(one for one in (f"{begin}.{n // 250}.{n % 250 + 2}" for n in itertools.count()) if one not in used)

    def fingerprint(self) -> str:
        return f"{next(self.numbers):x}"

    def boot(self, instance: Resource) -> None:
        zone = last(instance["zone"])
        where = {
            "region": zone.rpartition("-")[0], "zone": zone, "instance_type": last(instance["machineType"]), "spot": is_spot(instance),
        }  # fmt: skip
        users: dict[str, str] = {}
        for line in (metadata(instance, "ssh-keys") or "").splitlines():
            user, _, key = line.strip().partition(":")
            users[user] = f"{users.get(user, '')}{key}\n"
        gpus = [name for one in instance["guestAccelerators"] for name in [gpu_name(one)] * one["acceleratorCount"]]
        hosts = dict.fromkeys((*NAMES, "metadata.google.internal", "metadata"), METADATA_ADDRESS)
        machine = Machine(
            instance["name"], str(address(instance)), instance["name"], str(self.nodes.image), str(self.nodes.path(instance["name"])),
            users, hosts=hosts, authority=str(self.folder.parent / "tls" / tls.AUTHORITY),
            gpus=tuple(gpus), cloud="gcp", asked=self.image(instance) or "",
        )  # fmt: skip
        self.power_on(machine, lambda: self.ports(instance), where)
        instance.update(status="RUNNING", lastStartTimestamp=now())

    def stop(self, instance: Resource) -> None:
        self.nodes.halt(instance["name"])
        instance["status"] = "TERMINATED"
        self.journal.write("stop", id=instance["name"])

    def start(self, instance: Resource) -> None:
        with self.lock:
            self.admit(instance, last(instance["zone"]), bulk=False)
        self.boot(instance)

    def delete(self, instance: Resource) -> None:
        instance["status"] = "STOPPING"
        self.nodes.halt(instance["name"], wipe=True)
        with self.lock:
            for disk in instance["disks"]:
                path = path_of(disk["source"])
                if disk["autoDelete"]:
                    self.resources["disks"].pop(path, None)
                elif path in self.resources["disks"]:
                    self.resources["disks"][path]["users"] = []
            self.resources["instances"].pop(path_of(instance["selfLink"]), None)
        self.journal.write("delete", id=instance["name"])

    def find(self, id: str) -> Resource:
        return next(one for one in list(self.resources["instances"].values()) if one["name"] == id)

    def ended(self, id: str, status: int) -> None:
        """Google lists an instance that powers itself off as TERMINATED, which is its word for stopped."""
        self.journal.write("ended", id=id, status=status)
        if status == 0:
            self.find(id)["status"] = "TERMINATED"

    def preempt(self, id: str) -> None:
        instance = self.find(id)
        if instance["status"] != "RUNNING":
            raise ValueError(f"{id} does not run: {instance['status']}")
        self.preempted.add(id)
        self.journal.write("preempt", id=id)
        if instance["scheduling"].get("instanceTerminationAction") == "DELETE":
            self.delete(instance)
        else:
            self.stop(instance)

    def age(self, id: str, minutes: float) -> None:
        """An instance, a disk and a rule of this name were made so many minutes earlier."""
        for kind in ("instances", "disks", "firewalls"):
            for one in self.resources[kind].values():
                if one["name"] == id:
                    made = datetime.fromisoformat(one["creationTimestamp"]) - timedelta(minutes=minutes)
                    one["creationTimestamp"] = made.isoformat(timespec="milliseconds")

    # who may do what

    def sign_in(self, account: str) -> Resource:
        """A token for an account, as Google's token endpoints give it."""
        token = f"ya29.{len(self.tokens)}-{self.fingerprint()}"
        self.tokens[token] = account
        return {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}

    def may(self, account: str, service: str) -> bool:
        """Whether an account has a role for a service: the laptop is the project's owner, a node's has what it was given."""
        roles = {one["role"] for one in self.policy["bindings"] if f"serviceAccount:{account}" in one["members"]}
        return account == ACCOUNT or any(role.startswith(f"roles/{service}.") for role in roles)

    def make_account(self, name: str, title: str | None) -> Resource:
        email, number = f"{name}@{PROJECT}.iam.gserviceaccount.com", str(next(self.numbers))
        self.accounts[email] = {
            "name": f"{SCOPE}/serviceAccounts/{email}", "projectId": PROJECT, "uniqueId": number, "email": email, "displayName": title,
        }  # fmt: skip
        return self.accounts[email]

    def fault(self, kind: str, action: str | None, **where: Any) -> None:
        super().fault(kind, "compute.*" if kind == "no_api" and action is None else action, **where)

    def switched_off(self, service: str) -> Fault | None:
        """The fault by which a service's API is not enabled in this project, if one is set."""
        return self.faults.find(("no_api",), action=f"{service}.*")


def exceeded(metric: str, limit: float, scope: str) -> OperationFailed:
    where = "globally" if scope == GLOBAL else f"in region {scope}"
    return OperationFailed(("QUOTA_EXCEEDED", f"Quota '{metric}' exceeded.  Limit: {limit} {where}."))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def address(instance: Resource) -> str | None:
    found = instance["networkInterfaces"][0]["networkIP"]
    return str(found) if found else None


def metadata(instance: Resource, name: str) -> str | None:
    items = instance["metadata"].get("items", [])
    return next((item["value"] for item in items if item["key"] == name), None)


def serve(folder: Path, image: Path) -> None:
    """The API and the metadata service, each on its port, and the back door."""
    from simcloud.clouds import gcp_api

    google = Google(folder, image)
    google.listen(age=google.age)
    gcp_api.serve(google, folder.parent / "tls" / tls.SERVER)
