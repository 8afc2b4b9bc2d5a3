"""What of ours a Google Cloud project has, by its own API: without SkyPilot's database.

SkyPilot labels instances alone. `label_others` labels their disks once they are there, and writes the same into the description of their firewall
rule, which can have no labels. What bears none is not ours, whatever it is called. What all machines share (the network skypilot-vpc and its rules,
the account skypilot-v1) is no part of this.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from mistralctl import state
from mistralctl.clouds import NotUsed, Part, Refused, ahead, part_by_part, understood
from mistralctl.errors import Exit, UserError

ENDPOINT = "https://compute.googleapis.com/compute/v1"
SCOPES = ("https://www.googleapis.com/auth/compute",)
SECONDS = 30
ATTEMPTS = 5
BUSY = {429, 500, 502, 503}
PROTECTED = "deletionProtection"  # in the words with which Google keeps a machine
AHEAD = "clockAhead"  # what `_call` adds to an answer
LABEL = re.compile(r"(?<![^ ])(mistralctl-(?:name|owner))=([a-z0-9_-]{1,63})(?![^ ])")
_SIGNING_IN = threading.Lock()


@cache
@state.secrets_hidden()  # from gcloud, which is asked for the project
def _signed_in() -> tuple[Any, str]:
    """A session with this user's credentials, and the project."""
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
        from google.auth.transport.requests import AuthorizedSession
    except ImportError as error:
        raise NotUsed("Google's SDK is not installed; pip install 'mistralctl[gcp]'", Exit.CLOUD) from error
    try:
        credentials, project = google.auth.default(scopes=SCOPES)
    except DefaultCredentialsError as error:
        raise NotUsed("there are no credentials for GCP here; run gcloud auth application-default login", Exit.CLOUD) from error
    if not project:
        raise NotUsed("no project of GCP is chosen; run gcloud config set project NAME", Exit.CLOUD)
    session: Any = AuthorizedSession
    return session(credentials), str(project)


def _refused(answer: Any, what: str, project: str) -> UserError:
    """Google's refusal as one line."""
    try:
        error = answer.json()["error"]
        reason, message = str(error["errors"][0]["reason"]), str(error["message"]).splitlines()[0]
    except (ValueError, KeyError, IndexError, TypeError):
        reason, message = str(answer.status_code), str(answer.reason)
    if reason == "accessNotConfigured":
        return UserError(
            f"GCP: the Compute Engine API is not enabled in {project}; run gcloud services enable compute.googleapis.com",
            Exit.CLOUD,
        )
    mend = "switch that off, then try again" if PROTECTED in message else "give this identity that right"
    return UserError(f"GCP refused {what} ({reason}: {message[:200]}); {mend}", Exit.CLOUD)


def _call(
    method: str, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """The answer to a call of Compute Engine about this project, None if what it is about is not there; AHEAD is how far Google's clock is."""
    with _SIGNING_IN:
        session, project = _signed_in()  # NotUsed where the SDK is not installed
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    url = f"{ENDPOINT}/projects/{project}/{path}".rstrip("/")
    try:
        for attempt in range(ATTEMPTS):
            answer = session.request(method, url, params=query, json=body, timeout=SECONDS)
            if answer.status_code not in BUSY or attempt == ATTEMPTS - 1:
                break
            time.sleep(2**attempt)
    except GoogleAuthError as error:
        why = str(error.args[0] if error.args else error)[:200]
        raise UserError(
            f"GCP does not accept these credentials ({why}); run gcloud auth application-default login", Exit.CLOUD
        ) from error
    except RequestException as error:
        raise UserError(f"GCP cannot be asked: {type(error).__name__}", Exit.CLOUD) from error
    if answer.status_code == 404:
        return None
    if answer.status_code >= 400:
        raise _refused(answer, f"{method} {path.split('?')[0]}", project)
    try:
        found: dict[str, Any] = answer.json()
    except ValueError as error:
        raise UserError(f"GCP answered {method} {path.split('?')[0]} with what is no JSON; try again", Exit.CLOUD) from error
    return found | {AHEAD: ahead(answer.headers.get("Date"))}


def _pages(path: str, **query: str) -> Iterator[dict[str, Any]]:
    while True:
        page = _call("GET", path, query=query) or {}
        yield page
        if "nextPageToken" not in page:
            return
        query["pageToken"] = page["nextPageToken"]


def _everywhere(kind: str, refused: Refused | None, **query: str) -> Iterator[dict[str, Any]]:
    """Resources of a kind in all zones, each with AHEAD; a zone that does not answer is among what was refused."""
    for page in _pages(f"aggregated/{kind}", returnPartialSuccess="true", **query):
        for name in page.get("unreachables", ()):
            with part_by_part(refused, _last(name)):
                raise UserError(f"GCP does not say which {kind} are there; try again later", Exit.CLOUD)
        for scope in page.get("items", {}).values():
            yield from (one | {AHEAD: page.get(AHEAD, 0.0)} for one in scope.get(kind, []))


def identity() -> str:
    """The project that these credentials are for; UserError if Google does not take them (expired, wrong) for it."""
    found = _call("GET", "") or {}
    return f"project {found.get('name', '?')}"


def account() -> str:
    """The project of these credentials; NotUsed without any."""
    with _SIGNING_IN:
        return _signed_in()[1]


def _last(link: str) -> str:
    return link.rsplit("/", 1)[-1]


def _created(one: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(one["creationTimestamp"]).timestamp()


def _rule_labels(rule: Mapping[str, Any]) -> dict[str, str]:
    """What `label_others` wrote into a rule's description, because Google's rules have no labels."""
    return dict(LABEL.findall(rule.get("description", "")))


def _left_behind(kind: str, one: Mapping[str, Any], labels: Mapping[str, str], living: set[tuple[str, str]]) -> Part | None:
    """A disk or rule with our labels whose deployment has no machine any more."""
    if "mistralctl-name" not in labels or (labels.get("mistralctl-owner", ""), labels["mistralctl-name"]) in living:
        return None
    place = _last(one["zone"]) if "zone" in one else "global"
    size = f"{one['sizeGb']} GiB" if "sizeGb" in one else ""
    return Part("gcp", kind, one["name"], place, "unused", size, _created(one), dict(labels), one.get(AHEAD, 0.0))


def _machines(refused: Refused | None = None) -> Iterator[Part]:
    """Everybody's machines."""

    def machine(one: dict[str, Any]) -> Part:
        state = "stopped" if one["status"] == "TERMINATED" else one["status"].lower()
        kind, place = _last(one["machineType"]), _last(one["zone"])
        sizes = [disk.get("diskSizeGb") for disk in one.get("disks", ())]
        gib = sum(map(float, sizes)) if sizes and all(sizes) else None
        return Part("gcp", "machine", one["name"], place, state, kind, _created(one), dict(one["labels"]), one[AHEAD], gib)

    yield from understood(refused, "machine", _everywhere("instances", refused, filter="labels.mistralctl-name:*"), machine)


def _is_ours(labels: Mapping[str, str], owner: str | None, name: str | None) -> bool:
    return owner in (None, labels.get("mistralctl-owner")) and name in (None, labels["mistralctl-name"])


def _within(parts: Iterable[Part], regions: Iterable[str] | None) -> list[Part]:
    """Those in these regions or in none."""
    places = None if regions is None else tuple(f"{region}-" for region in regions)
    return [part for part in parts if places is None or part.place == "global" or part.place.startswith(places)]


def machines(owner: str | None, within: Iterable[str]) -> list[Part]:
    """The machines of what `ours` lists, in one question; NotUsed without credentials, UserError if Google refuses."""
    return _within((part for part in _machines() if _is_ours(part.labels, owner, None)), within)


def ours(owner: str | None, name: str | None = None, within: Iterable[str] | None = None) -> list[Part]:
    """What `listed` lists; UserError if anything of it is refused."""
    return listed(owner, name, within, None)


def listed(owner: str | None, name: str | None, within: Iterable[str] | None, refused: Refused | None) -> list[Part]:
    """Machines that are not gone with our labels, disks and firewall rules that outlived one; `owner` None: everybody's.

    NotUsed without credentials, UserError if Google refuses; with `refused` that is added there. Where not all machines are known, nobody can
    say what has outlived one.
    """
    before = len(refused or ())
    machines: list[Part] = []
    with part_by_part(refused):
        machines += _machines(refused)
    living = {(part.labels.get("mistralctl-owner", ""), part.labels["mistralctl-name"]) for part in machines}
    left: list[Part] = []
    if len(refused or ()) == before:
        with part_by_part(refused):  # a disk that is attached goes with its machine
            disks = [one for one in _everywhere("disks", refused) if not one.get("users")]
            left += understood(refused, "disk", disks, lambda one: _left_behind("disk", one, one.get("labels", {}), living))
        with part_by_part(refused):
            rules = [one | {AHEAD: page.get(AHEAD, 0.0)} for page in _pages("global/firewalls") for one in page.get("items", [])]
            left += understood(refused, "rule", rules, lambda one: _left_behind("rule", one, _rule_labels(one), living))
    return _within((part for part in [*machines, *left] if _is_ours(part.labels, owner, name)), within)


def _path(part: Part) -> str:
    if part.kind == "rule":
        return f"global/firewalls/{part.id}"
    return f"zones/{part.place}/{'instances' if part.kind == 'machine' else 'disks'}/{part.id}"


def relabel(part: Part, labels: Mapping[str, str]) -> None:
    """Sets these labels of a machine and leaves its others as they are; UserError if Google refuses."""
    one = _call("GET", _path(part))
    if one is None:
        raise UserError(f"GCP has no machine {part.id} in {part.place} any more", Exit.NOT_FOUND)
    body = {"labels": {**one.get("labels", {}), **labels}, "labelFingerprint": one["labelFingerprint"]}
    _call("POST", f"{_path(part)}/setLabels", body)


def delete(parts: Sequence[Part]) -> None:
    """Asks Google to delete machines, with their disks, and what is left without one; what is gone is no error."""
    for part in parts:
        _call("DELETE", _path(part))


def label_others(owner: str, name: str, region: str) -> int:
    """Labels the disks that go with a deployment's machines, and marks their rule for open ports, where they bear no owner; the number of its
    machines."""
    labels = {"mistralctl-name": name, "mistralctl-owner": owner}
    machines = [part for part in ours(owner, name, [region]) if part.kind == "machine"]
    for machine in machines:
        for disk in (_call("GET", _path(machine)) or {}).get("disks", []):
            path = f"zones/{machine.place}/disks/{_last(disk['source'])}"
            there = _call("GET", path) if disk.get("autoDelete") else None
            if there is not None and "mistralctl-owner" not in there.get("labels", {}):
                body = {"labels": {**there.get("labels", {}), **labels}, "labelFingerprint": there["labelFingerprint"]}
                _call("POST", f"{path}/setLabels", body)
        cluster = machine.labels.get("ray-cluster-name", "")
        rule = _call("GET", f"global/firewalls/sky-ports-{cluster}") if cluster else None
        if rule is not None and rule.get("targetTags") == [cluster] and "mistralctl-owner" not in _rule_labels(rule):
            description = " ".join(f"{key}={value}" for key, value in labels.items())
            _call("PATCH", f"global/firewalls/{rule['name']}", {"description": description})
    return len(machines)


def narrow(owner: str, name: str, region: str, port: int, networks: Sequence[str]) -> int:
    """Lets a port of a deployment's machines be reached from these networks alone, by the rule that SkyPilot made for the machine; the
    number of rules for it.

    Its machines have no address of version 6; networks of that version say nothing here.
    """
    four = [network for network in networks if ":" not in network]
    body: dict[str, Any] = {"sourceRanges": four, "disabled": False} if four else {"disabled": True}
    held = 0
    for machine in ours(owner, name, [region]):
        if machine.kind == "machine":
            path = f"global/firewalls/sky-ports-{machine.labels['ray-cluster-name']}"
            rule = _call("GET", path)
            if rule is not None and any(str(port) in one.get("ports", []) for one in rule["allowed"]):
                _call("PATCH", path, body)
                held += 1
    return held
