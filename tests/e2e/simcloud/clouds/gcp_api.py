"""Google's API as SkyPilot and mistralctl use it: sign-in, projects, accounts, Compute Engine, storage, the metadata server.

A route is a function below with its call's name as Google's permissions and audit logs spell it; faults and the journal know
calls by these names.
"""

from __future__ import annotations

import json
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from simcloud import gcs
from simcloud.clouds.gcp import (
    ACCOUNT,
    ADDRESS,
    API_PORT,
    BASE,
    CREDENTIALS,
    GLOBAL,
    METADATA_PORT,
    NUMBER,
    PROJECT,
    SCOPE,
    Google,
    Resource,
    address,
    last,
    metadata,
    now,
    path_of,
)  # fmt: skip

WAIT_SECONDS = 110
TITLES = {"compute": "Compute Engine API", "cloudresourcemanager": "Cloud Resource Manager API"}


class Refused(Exception):
    """An error in Google's form."""

    def __init__(self, status: int, reason: str, message: str, domain: str = "global") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason
        detail = {"message": message, "domain": domain, "reason": reason}
        self.body: Resource = {"error": {"code": status, "message": message, "errors": [detail]}}


class TokenRefused(Refused):
    """An error in the form of the sign-in service."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(400, reason, message)
        self.body = {"error": reason, "error_description": message}


def missing(path: str) -> Refused:
    return Refused(404, "notFound", f"The resource '{path}' was not found")


class Call:
    """One call: whose it is, its query, its body (of a form, its fields)."""

    def __init__(self, google: Google, account: str, query: dict[str, str], body: Resource) -> None:
        self.google, self.account, self.query, self.body = google, account, query, body

    def get(self, kind: str, path: str) -> Resource:
        found = self.google.resources[kind].get(path)
        if found is None:
            raise missing(path)
        return found


Handler = Callable[..., Resource]
ROUTES: list[tuple[str, str, str, re.Pattern[str], Handler]] = []


def route(name: str, method: str, pattern: str) -> Callable[[Handler], Handler]:
    """The function answers `name` (service first) for paths like the pattern, in which {words} are arguments."""
    service = name.partition(".")[0]
    if service == "compute":
        pattern = f"/compute/v1/{SCOPE}{pattern}"
    compiled = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/:]+)", pattern) + "$")

    def keep(function: Handler) -> Handler:
        ROUTES.append((name, method, service, compiled, function))
        return function

    return keep


# ---- filters: (labels.a = b) AND ((status = X) OR (status = Y)), name=x, labels.a:*, name:part, a != b


def matcher(text: str | None) -> Callable[[Resource], bool]:
    """Whether a resource passes a filter as Compute Engine's lists take it."""
    tokens: list[str] = re.findall(r'\(|\)|"[^"]*"|!=|=|:|[^\s()=:!"]+', text or "")

    def either() -> Callable[[Resource], bool]:
        found = [both()]
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            found.append(both())
        return lambda one: any(test(one) for test in found)

    def both() -> Callable[[Resource], bool]:
        found = [single()]
        while tokens and tokens[0] not in (")", "OR"):
            if tokens[0] == "AND":
                tokens.pop(0)
            found.append(single())
        return lambda one: all(test(one) for test in found)

    def single() -> Callable[[Resource], bool]:
        if tokens[0] == "(":
            tokens.pop(0)
            inner = either()
            tokens.pop(0)
            return inner
        field, operator, wanted = tokens.pop(0), tokens.pop(0), tokens.pop(0).strip('"')
        outer, _, key = field.partition(".")

        def test(one: Resource) -> bool:
            value = (one.get(outer) or {}).get(key) if key else one.get(outer)
            if operator == ":":
                return value is not None and bool(wanted == "*" or wanted in (value if isinstance(value, list) else str(value)))
            same = value is not None and (str(value) == wanted or last(str(value)) == wanted)
            return bool(same) != (operator == "!=")

        return test

    return either() if tokens else lambda one: True


def listed(call: Call, kind: str, under: str) -> Resource:
    """A page of the resources right below a path."""
    passes, size, start = (
        matcher(call.query.get("filter")),
        int(call.query.get("maxResults", 500)),
        int(call.query.get("pageToken") or 0),
    )
    rows = [
        one for path, one in sorted(call.google.resources[kind].items())
        if path.startswith(under) and "/" not in path[len(under):] and passes(one)
    ]  # fmt: skip
    found: Resource = {"id": under, "selfLink": BASE + under}
    if rows[start : start + size]:
        found["items"] = rows[start : start + size]
    if rows[start + size :]:
        found["nextPageToken"] = str(start + size)
    return found


# ---- projects, accounts, services, sign-in


@route("oauth2.token", "POST", "/token")
def _(call: Call) -> Resource:
    wanted = {"refresh_token": CREDENTIALS["gcp_refresh_token"], "client_secret": CREDENTIALS["gcp_client_secret"]}
    if any(call.body.get(name) != value for name, value in wanted.items()):
        raise TokenRefused("invalid_grant", "Bad Request")
    return call.google.sign_in(ACCOUNT) | {"scope": "https://www.googleapis.com/auth/cloud-platform"}


@route("cloudresourcemanager.projects.get", "GET", "/v1/projects/{project}")
def _(call: Call, project: str) -> Resource:
    return {"projectNumber": NUMBER, "projectId": PROJECT, "lifecycleState": "ACTIVE", "name": PROJECT, "createTime": now()}


@route("cloudresourcemanager.projects.testIamPermissions", "POST", "/v1/projects/{project}:testIamPermissions")
def _(call: Call, project: str) -> Resource:
    refused = [name for name in call.body["permissions"] if call.google.faults.find(("permission",), action=name)]
    return {"permissions": [name for name in call.body["permissions"] if name not in refused]}


@route("cloudresourcemanager.projects.getIamPolicy", "POST", "/v1/projects/{project}:getIamPolicy")
def _(call: Call, project: str) -> Resource:
    return call.google.policy


@route("cloudresourcemanager.projects.setIamPolicy", "POST", "/v1/projects/{project}:setIamPolicy")
def _(call: Call, project: str) -> Resource:
    call.google.policy = call.body["policy"] | {"etag": call.google.fingerprint()}
    return call.google.policy


@route("iam.serviceAccounts.get", "GET", "/v1/projects/{project}/serviceAccounts/{account}")
def _(call: Call, project: str, account: str) -> Resource:
    if account not in call.google.accounts:
        raise Refused(404, "notFound", f"Unknown service account: {account}")
    return call.google.accounts[account]


@route("iam.serviceAccounts.create", "POST", "/v1/projects/{project}/serviceAccounts")
def _(call: Call, project: str) -> Resource:
    return call.google.make_account(call.body["accountId"], call.body.get("serviceAccount", {}).get("displayName"))


@route("serviceusage.services.list", "GET", "/v1/projects/{project}/services")
def _(call: Call, project: str) -> Resource:
    enabled = [name for name in sorted(call.google.enabled) if not call.google.switched_off(name)]
    return {
        "services": [
            {"name": f"projects/{NUMBER}/services/{name}.googleapis.com", "config": {"name": f"{name}.googleapis.com"}, "state": "ENABLED"}
            for name in enabled
        ]
    }  # fmt: skip


@route("serviceusage.services.enable", "POST", "/v1/projects/{project}/services/{service}:enable")
def _(call: Call, project: str, service: str) -> Resource:
    name = service.partition(".")[0]
    if call.google.switched_off(name):
        raise Refused(403, "forbidden", f"Permission denied to enable service [{service}]")
    call.google.enabled.add(name)
    return {"done": True}


# ---- Compute Engine


@route("compute.projects.get", "GET", "")
def _(call: Call) -> Resource:
    return {
        "id": NUMBER, "name": PROJECT, "selfLink": BASE + SCOPE, "quotas": call.google.quotas(GLOBAL),
        "commonInstanceMetadata": {"fingerprint": "0", "items": []},
    }  # fmt: skip


def region_of(call: Call, region: str) -> Resource:
    if region not in call.google.regions:
        raise missing(f"{SCOPE}/regions/{region}")
    zones = [f"{BASE}{SCOPE}/zones/{zone}" for zone in call.google.zones if zone.rpartition("-")[0] == region]
    return {"name": region, "status": "UP", "zones": zones, "quotas": call.google.quotas(region)}


@route("compute.regions.list", "GET", "/regions")
def _(call: Call) -> Resource:
    return {"items": [region_of(call, region) for region in call.google.regions]}


@route("compute.regions.get", "GET", "/regions/{region}")
def _(call: Call, region: str) -> Resource:
    return region_of(call, region)


@route("compute.instances.list", "GET", "/zones/{zone}/instances")
def _(call: Call, zone: str) -> Resource:
    known(call, zone)
    return listed(call, "instances", f"{SCOPE}/zones/{zone}/instances/")


@route("compute.instances.get", "GET", "/zones/{zone}/instances/{name}")
def _(call: Call, zone: str, name: str) -> Resource:
    return call.get("instances", f"{SCOPE}/zones/{zone}/instances/{name}")


def aggregated(call: Call, kind: str) -> Resource:
    passes = matcher(call.query.get("filter"))
    items: Resource = {}
    for zone in call.google.zones:
        begin = f"{SCOPE}/zones/{zone}/"
        rows = [one for path, one in sorted(call.google.resources[kind].items()) if path.startswith(begin) and passes(one)]
        empty = {
            "warning": {"code": "NO_RESULTS_ON_PAGE", "message": f"There are no results for scope 'zones/{zone}' on this page."}
        }
        items[f"zones/{zone}"] = {kind: rows} if rows else empty
    return {"items": items}


@route("compute.instances.aggregatedList", "GET", "/aggregated/instances")
def _(call: Call) -> Resource:
    return aggregated(call, "instances")


@route("compute.disks.aggregatedList", "GET", "/aggregated/disks")
def _(call: Call) -> Resource:
    return aggregated(call, "disks")


@route("compute.disks.insert", "POST", "/zones/{zone}/disks")
def _(call: Call, zone: str) -> Resource:
    path = f"{SCOPE}/zones/{zone}/disks/{call.body['name']}"
    fields = {"sizeGb": str(call.body["sizeGb"]), "labels": call.body.get("labels", {}), "status": "READY", "users": []}
    call.google.put("disks", path, zone=f"{BASE}{SCOPE}/zones/{zone}", **fields)
    return call.google.operation("insert", path)


@route("compute.disks.delete", "DELETE", "/zones/{zone}/disks/{name}")
def _(call: Call, zone: str, name: str) -> Resource:
    path = f"{SCOPE}/zones/{zone}/disks/{name}"
    if users := call.get("disks", path)["users"]:
        used = f"The disk resource '{path}' is already being used by '{path_of(users[0])}'"
        raise Refused(400, "resourceInUseByAnotherResource", used)
    return call.google.operation("delete", path, lambda: dropped(call.google, "disks", path))


def dropped(google: Google, kind: str, path: str) -> None:
    google.resources[kind].pop(path, None)


def known(call: Call, zone: str) -> None:
    if zone not in call.google.zones:
        raise Refused(400, "invalid", f"Invalid value for field 'zone': '{zone}'. Unknown zone.")


def launch(call: Call, zone: str, bodies: dict[str, Resource], bulk: bool) -> Resource:
    known(call, zone)
    for body in bodies.values():
        for one in body.get("serviceAccounts", []):
            if one["email"] not in call.google.accounts:
                raise Refused(400, "invalid", (
                    f"Invalid value for field 'resource.serviceAccounts[0].email': '{one['email']}'. The user does not have access to "
                    "service account or it does not exist."
                ))  # fmt: skip

    def work() -> None:
        for name, body in bodies.items():
            call.google.create(zone, name, body, bulk)

    target = f"{SCOPE}/zones/{zone}/instances/{next(iter(bodies))}"
    return call.google.operation("bulkInsert" if bulk else "insert", target, work)


@route("compute.instances.insert", "POST", "/zones/{zone}/instances")
def _(call: Call, zone: str) -> Resource:
    return launch(call, zone, {call.body["name"]: call.body}, bulk=False)


@route("compute.instances.bulkInsert", "POST", "/zones/{zone}/instances/bulkInsert")
def _(call: Call, zone: str) -> Resource:
    shared, each = call.body["instanceProperties"], call.body["perInstanceProperties"]
    return launch(call, zone, {name: shared | own for name, own in each.items()}, bulk=True)


def changes(action: str, method: str, suffix: str, status: str, work: Callable[[Google, Resource], None]) -> None:
    @route(f"compute.instances.{action}", method, "/zones/{zone}/instances/{name}" + suffix)
    def _(call: Call, zone: str, name: str) -> Resource:
        path = f"{SCOPE}/zones/{zone}/instances/{name}"
        instance = call.get("instances", path)
        instance["status"] = status
        return call.google.operation(action, path, lambda: work(call.google, instance))


changes("delete", "DELETE", "", "STOPPING", Google.delete)
changes("stop", "POST", "/stop", "STOPPING", Google.stop)
changes("start", "POST", "/start", "STAGING", Google.start)


@route("compute.instances.setLabels", "POST", "/zones/{zone}/instances/{name}/setLabels")
def _(call: Call, zone: str, name: str) -> Resource:
    path = f"{SCOPE}/zones/{zone}/instances/{name}"
    instance = call.get("instances", path)
    if call.body.get("labelFingerprint") != instance["labelFingerprint"]:
        raise Refused(412, "conditionNotMet", "Labels fingerprint either invalid or resource labels have changed")
    instance.update(labels=call.body["labels"], labelFingerprint=call.google.fingerprint())
    return call.google.operation("setLabels", path)


@route("compute.disks.get", "GET", "/zones/{zone}/disks/{name}")
def _(call: Call, zone: str, name: str) -> Resource:
    return call.get("disks", f"{SCOPE}/zones/{zone}/disks/{name}")


@route("compute.disks.setLabels", "POST", "/zones/{zone}/disks/{name}/setLabels")
def _(call: Call, zone: str, name: str) -> Resource:
    path = f"{SCOPE}/zones/{zone}/disks/{name}"
    disk = call.get("disks", path)
    if call.body.get("labelFingerprint") != disk["labelFingerprint"]:
        raise Refused(412, "conditionNotMet", "Labels fingerprint either invalid or resource labels have changed")
    disk.update(labels=call.body["labels"], labelFingerprint=call.google.fingerprint())
    return call.google.operation("setLabels", path)


@route("compute.instances.setTags", "POST", "/zones/{zone}/instances/{name}/setTags")
def _(call: Call, zone: str, name: str) -> Resource:
    path = f"{SCOPE}/zones/{zone}/instances/{name}"
    instance = call.get("instances", path)
    if call.body.get("fingerprint") != instance["tags"]["fingerprint"]:
        raise Refused(412, "conditionNotMet", "Supplied fingerprint does not match current tags fingerprint.")
    instance["tags"] = call.body | {"fingerprint": call.google.fingerprint()}
    return call.google.operation("setTags", path)


@route("compute.images.get", "GET", "/global/images/{image}")
def _(call: Call, image: str) -> Resource:
    return {"name": image, "status": "READY", "diskSizeGb": "50", "architecture": "X86_64"}


def operations(kind: str, scope: str) -> None:
    @route(f"compute.{kind}.get", "GET", f"/{scope}/operations/{{name}}")
    def _(call: Call, name: str, place: str = "") -> Resource:
        return dict(call.get("operations", f"{SCOPE}/{scope.replace('{place}', place)}/operations/{name}"))

    @route(f"compute.{kind}.wait", "POST", f"/{scope}/operations/{{name}}/wait")
    def _(call: Call, name: str, place: str = "") -> Resource:
        found = call.get("operations", f"{SCOPE}/{scope.replace('{place}', place)}/operations/{name}")
        deadline = time.monotonic() + WAIT_SECONDS
        while found["status"] != "DONE" and time.monotonic() < deadline:
            time.sleep(0.05)
        return dict(found)


operations("zoneOperations", "zones/{place}")
operations("regionOperations", "regions/{place}")
operations("globalOperations", "global")


def collections(kind: str) -> None:
    begin = f"{SCOPE}/global/{kind}/"

    @route(f"compute.{kind}.list", "GET", f"/global/{kind}")
    def _(call: Call) -> Resource:
        return listed(call, kind, begin)

    @route(f"compute.{kind}.get", "GET", f"/global/{kind}/{{name}}")
    def _(call: Call, name: str) -> Resource:
        return call.get(kind, begin + name)

    @route(f"compute.{kind}.delete", "DELETE", f"/global/{kind}/{{name}}")
    def _(call: Call, name: str) -> Resource:
        found = call.get(kind, begin + name)
        if kind == "networks":
            users = [*call.google.resources["firewalls"].values(), *call.google.resources["instances"].values()]
            for one in users:
                if found["selfLink"] in [one.get("network"), *(used["network"] for used in one.get("networkInterfaces", []))]:
                    used = f"The network resource '{begin}{name}' is already being used by '{path_of(one['selfLink'])}'"
                    raise Refused(400, "resourceInUseByAnotherResource", used)
            for link in found["subnetworks"]:
                dropped(call.google, "subnetworks", path_of(link))
        return call.google.operation("delete", begin + name, lambda: dropped(call.google, kind, begin + name))


collections("networks")
collections("firewalls")


@route("compute.networks.insert", "POST", "/global/networks")
def _(call: Call) -> Resource:
    absent(call, "networks")
    kept = {name: call.body[name] for name in ("mtu", "routingConfig") if name in call.body}
    call.google.make_network(call.body["name"], call.body.get("autoCreateSubnetworks", False), **kept)
    return call.google.operation("insert", f"{SCOPE}/global/networks/{call.body['name']}")


@route("compute.firewalls.insert", "POST", "/global/firewalls")
def _(call: Call) -> Resource:
    absent(call, "firewalls")
    call.get("networks", path_of(call.body["network"]))
    call.google.make_firewall(call.body)
    return call.google.operation("insert", f"{SCOPE}/global/firewalls/{call.body['name']}")


def absent(call: Call, kind: str) -> None:
    path = f"{SCOPE}/global/{kind}/{call.body['name']}"
    if path in call.google.resources[kind]:
        raise Refused(409, "alreadyExists", f"The resource '{path}' already exists")


@route("compute.firewalls.update", "PUT", "/global/firewalls/{name}")
@route("compute.firewalls.patch", "PATCH", "/global/firewalls/{name}")
def _(call: Call, name: str) -> Resource:
    path = f"{SCOPE}/global/firewalls/{name}"
    kept = ("allowed", "description", "disabled", "sourceRanges")
    call.get("firewalls", path).update({field: call.body[field] for field in kept if field in call.body})
    return call.google.operation("update", path)


@route("compute.networks.getEffectiveFirewalls", "GET", "/global/networks/{name}/getEffectiveFirewalls")
def _(call: Call, name: str) -> Resource:
    network = call.get("networks", f"{SCOPE}/global/networks/{name}")["selfLink"]
    return {"firewalls": [rule for rule in call.google.resources["firewalls"].values() if rule["network"] == network]}


@route("compute.subnetworks.list", "GET", "/regions/{region}/subnetworks")
def _(call: Call, region: str) -> Resource:
    return listed(call, "subnetworks", f"{SCOPE}/regions/{region}/subnetworks/")


# ---- the servers


def refuse(google: Google, name: str, where: Resource) -> None:
    """Refused if a fault says so, or the API is not enabled."""
    service = name.partition(".")[0]
    if google.faults.find(("credentials",), action=name):
        if service == "oauth2":
            raise TokenRefused("invalid_grant", "Token has been expired or revoked.")
        raise Refused(401, "authError", "Request had invalid authentication credentials. Expected OAuth 2 access token.")
    if google.switched_off(service):
        raise Refused(403, "accessNotConfigured", (
            f"{TITLES.get(service, service)} has not been used in project {NUMBER} before or it is disabled. Enable it by visiting "
            f"https://console.developers.google.com/apis/api/{service}.googleapis.com/overview?project={NUMBER} then retry. If you "
            "enabled this API recently, wait a few minutes for the action to propagate to our systems and retry."
        ), "usageLimits")  # fmt: skip
    found = google.faults.find(("permission", "throttle"), action=name, **where)
    if found and found.kind == "throttle":
        raise Refused(403, "rateLimitExceeded", "Rate Limit Exceeded", "usageLimits")
    if found:
        right = re.sub(r"aggregatedList$", "list", re.sub(r"bulkInsert$|insert$", "create", name))
        raise Refused(403, "forbidden", f"Required '{right}' permission for '{SCOPE}/zones/{where.get('zone', '-')}'")


class Base(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    google: Google

    def answer(self, status: int, body: bytes, kind: str = "application/json; charset=UTF-8", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Api(Base):
    """Everything below googleapis.com."""

    def account(self, service: str) -> str:
        """Whose token it is; Refused if it is nobody's, or its account may not use the service."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        account = self.google.tokens.get(token) if kind == "Bearer" else None
        if account is None:
            said = "Request had invalid authentication credentials. Expected OAuth 2 access token."
            raise Refused(401, "authError", said)
        if not self.google.may(account, service):
            raise Refused(403, "forbidden", f"{account} does not have {service} access to the project {PROJECT}.")
        return account

    def one(self) -> None:
        parts = urlsplit(self.path)
        service = self.headers.get("Host", "").split(".")[0]
        service = "compute" if service == "www" and parts.path.startswith("/compute/") else service
        if service == "storage":
            self.storage()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name, where, said = f"{service} {self.command} {parts.path}", dict[str, Any](), dict[str, Any]()
        status, result = 200, dict[str, Any]()
        try:
            name, handler, arguments = self.find(service, unquote(parts.path))
            given = (
                {key: values[0] for key, values in parse_qs(body.decode()).items()}
                if service == "oauth2"
                else json.loads(body or b"{}")
            )
            where = located(arguments, given)
            refuse(self.google, name, where)
            said["by"] = account = "" if service == "oauth2" else self.account(service)
            call = Call(self.google, account, {key: values[0] for key, values in parse_qs(parts.query).items()}, given)
            if name.endswith(".wait"):
                result = handler(call, **arguments)
            else:
                with self.google.lock:
                    result = handler(call, **arguments)
        except Refused as refused:
            status, result, said["error"] = refused.status, refused.body, refused.reason
        self.google.journal.write("call", action=name, **where, **said)
        self.answer(status, json.dumps(result).encode())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = one  # noqa: N815 - so http.server calls them

    def find(self, service: str, path: str) -> tuple[str, Handler, dict[str, str]]:
        if service == "compute" and "/global/images/" in path:  # images are other projects'
            path = re.sub(r"/projects/[^/]+/", f"/{SCOPE}/", path)
        for name, method, own, pattern, handler in ROUTES:
            if method == self.command and own == service and (found := pattern.match(path)):
                return name, handler, found.groupdict()
        raise Refused(501, "notImplemented", f"{service} {self.command} {path} is not simulated")

    def storage(self) -> None:
        where = {"bucket": (re.search(r"/b/([^/?]+)", self.path) or [None, ""])[1]}
        try:
            refuse(self.google, "storage.objects.access", {})
            by = self.account("storage")
        except Refused as refused:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.google.journal.write("call", action="storage.objects.access", error=refused.reason, **where)
            self.answer(refused.status, json.dumps(refused.body).encode())
            return
        status = gcs.front(self)
        self.google.journal.write("call", action=f"storage {self.command}", by=by, status=status, **where)


def located(arguments: dict[str, str], body: Resource) -> Resource:
    """Where a call is about: region, zone, and of a launch type and spot."""
    zone = arguments.get("zone", "")
    found: Resource = {"zone": zone, "region": zone.rpartition("-")[0]} if zone else {}
    shared = body.get("instanceProperties", body)
    if isinstance(shared, dict) and "machineType" in shared:
        found |= {"instance_type": last(shared["machineType"]), "spot": bool(shared.get("scheduling", {}).get("preemptible"))}
    return found


class Metadata(Base):
    """metadata.google.internal. Who asks is known by the address."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/":
            self.answer(200, b"computeMetadata/\n", "application/text", Metadata_Flavor="Google")
            return
        instances = list(self.google.resources["instances"].values())
        instance = next((one for one in instances if address(one) == self.client_address[0]), None)
        if instance is None or self.headers.get("Metadata-Flavor") != "Google":
            self.answer(403, b"Missing Metadata-Flavor:Google header.", "text/html")
            return
        found = self.table(instance, parts.path.removeprefix("/computeMetadata/v1/").rstrip("/"))
        kind = "application/json" if isinstance(found, dict) else "application/text"
        text = json.dumps(found) if isinstance(found, dict) else found or ""
        self.answer(404 if found is None else 200, text.encode(), kind, Metadata_Flavor="Google")

    def table(self, instance: Resource, key: str) -> str | Resource | None:
        if key.startswith("instance/attributes/"):
            return metadata(instance, key.removeprefix("instance/attributes/"))
        account = next(iter(instance["serviceAccounts"]), None)
        zone = f"projects/{NUMBER}/zones/{last(instance['zone'])}"
        found: dict[str, str | Resource | None] = {
            "project/project-id": PROJECT, "project/numeric-project-id": NUMBER, "instance/name": instance["name"],
            "instance/id": instance["id"], "instance/zone": zone, "instance/image": self.google.image(instance),
            "universe/universe-domain": "googleapis.com",
            "instance/machine-type": f"projects/{NUMBER}/machineTypes/{last(instance['machineType'])}",
            "instance/preempted": "TRUE" if instance["name"] in self.google.preempted else "FALSE",
        }  # fmt: skip
        if account:
            email, scopes = account["email"], account["scopes"]
            key = key.replace(f"service-accounts/{email}", "service-accounts/default")
            found |= {
                "instance/service-accounts": f"default/\n{email}/\n", "instance/service-accounts/default/email": email,
                "instance/service-accounts/default": {"aliases": ["default"], "email": email, "scopes": scopes},
                "instance/service-accounts/default/scopes": "\n".join(scopes),
            }  # fmt: skip
            if key == "instance/service-accounts/default/token":
                return self.google.sign_in(email)
        return found.get(key)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, handler: type[Base], certificate: Path | None = None) -> None:
        super().__init__((ADDRESS, port), handler)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
        if self.context and certificate:
            self.context.load_cert_chain(certificate)

    def get_request(self) -> tuple[Any, Any]:
        connection, client = super().get_request()
        if self.context:  # the handshake is made by the thread that reads
            connection = self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, client

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, ssl.SSLError, TimeoutError)):
            super().handle_error(request, client_address)


def serve(google: Google, certificate: Path) -> None:
    """Answers for ever."""
    Base.google = google
    threading.Thread(target=Server(METADATA_PORT, Metadata).serve_forever, daemon=True).start()
    Server(API_PORT, Api, certificate).serve_forever()
