"""Why clouds refused a machine: read from SkyPilot's exception and, where that does not say, from its log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mistralctl import tables
from mistralctl.errors import Exit, UserError, figure

Kind = Literal["capacity", "quota", "permission", "registration", "credentials", "other"]

# The clouds' own codes. AWS: API reference of EC2, error codes; GCP: Compute Engine, error messages; Azure: Resource Manager, common
# deployment errors.
CODES: dict[str, Kind] = {
    "InsufficientInstanceCapacity": "capacity",
    "InsufficientHostCapacity": "capacity",
    "SpotMaxPriceTooLow": "capacity",
    "Unsupported": "capacity",
    "ZONE_RESOURCE_POOL_EXHAUSTED": "capacity",
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS": "capacity",
    "UNSUPPORTED_OPERATION": "capacity",
    "insufficientCapacity": "capacity",
    "SkuNotAvailable": "capacity",
    "ZonalAllocationFailed": "capacity",
    "AllocationFailed": "capacity",
    "OverconstrainedAllocationRequest": "capacity",
    "VcpuLimitExceeded": "quota",
    "MaxSpotInstanceCountExceeded": "quota",
    "InstanceLimitExceeded": "quota",
    "QUOTA_EXCEEDED": "quota",
    "quotaExceeded": "quota",
    "QuotaExceeded": "quota",
    "OperationNotAllowed": "quota",
    "UnauthorizedOperation": "permission",
    "AccessDenied": "permission",
    "AuthFailure": "credentials",
    "InvalidClientTokenId": "credentials",
    "SignatureDoesNotMatch": "credentials",
    "ExpiredToken": "credentials",
    "ExpiredTokenException": "credentials",
    "RequestExpired": "credentials",
    "AuthorizationFailed": "permission",
    "InvalidAuthenticationToken": "credentials",
    "ExpiredAuthenticationToken": "credentials",
    "ReadOnlyDisabledSubscription": "permission",
    "MissingSubscriptionRegistration": "registration",
    "TooManyRequests": "other",
    "PERMISSION_DENIED": "permission",
    "forbidden": "permission",
    "accessNotConfigured": "permission",
    "invalid_grant": "credentials",
    "rateLimitExceeded": "other",
}
# Entra, where Azure's users sign in, numbers its refusals.
_CODE = re.compile(r"\b(AADSTS\d+|" + "|".join(sorted(CODES, key=len, reverse=True)) + r")\b")
_ZONE = re.compile(r"\b([a-z]{2}(?:-gov)?-[a-z]+-\d[a-z]|[a-z]+-[a-z]+\d+-[a-f])\b")
_REGION = re.compile(r"\b([a-z]{2}(?:-gov)?-[a-z]+-\d|[a-z]+-[a-z]+\d+)\b")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|<rich_[^>]*>|</rich_[^>]*>")
_PRICE_LIMIT = re.compile(
    r"Max hourly cost limit\s+\(\$([\d.e+-]+)/hr\)"
)  # SkyPilot's hint where its catalog has nothing for the price
_QUOTA = re.compile(r"[Qq]uota '([A-Za-z0-9_-]+)'|'([A-Z0-9_]+_CPUS|[A-Z0-9_]*GPUS[A-Z0-9_-]*)'|approved ([\w ]+?) Cores quota")
# What SkyPilot says where a quota is 0, without an attempt.
_NO_QUOTA = re.compile(r"Found no quota for (\S+) (spot|on-demand) instances in region (\S+) in \w+")
# Azure's words, and those of its libraries, which try to register a resource provider that is missing and say how that went.
_PROVIDER = re.compile(r"(?:not registered to use namespace|Resource provider) '([\w.]+)'")
_REGISTERED = "Registration succeeded."
TOLD = 8  # regions and reasons in one line
ADVICE: dict[Kind, str] = {
    "capacity": "try again later, or allow more: --cloud, another --region, --accelerators, --no-spot",
    "quota": "ask the cloud for a larger quota, or use another --region",
    "permission": "give the identity the right that is named",
    "registration": "register the resource provider that is named",
    "credentials": "sign in again (mistralctl doctor --cloud CLOUD says how)",
    "other": "see the log",
}


@dataclass(frozen=True)
class Refusal:
    """One refusal: where, of what kind, by which code of the cloud, in whose words."""

    place: str
    kind: Kind
    code: str
    detail: str


def registering(texts: Iterable[str]) -> str:
    """What to run where Azure's words name resource providers that the subscription has not registered; empty if they name none."""
    named = dict.fromkeys(provider for text in texts for provider in _PROVIDER.findall(text))
    return f"run {', '.join(f'az provider register -n {space} --wait' for space in named)}" if named else ""


def plain(text: str) -> str:
    """Text without a terminal's colours."""
    return _COLOURS.sub("", text)


def _of(text: str) -> Refusal | None:
    none = _NO_QUOTA.search(text)
    if none:
        return Refusal(none[3], "quota", "no quota", f"{none[1]} {none[2]}")
    if provider := _PROVIDER.search(text):
        return Refusal("", "registration", "MissingSubscriptionRegistration", provider[1])
    code = _CODE.search(text)
    if code is None:
        return None
    zone, region = _ZONE.search(text), _REGION.search(text)
    quota = _QUOTA.search(text)
    place = zone or region
    kind = CODES.get(code[1], "credentials")
    named = next((group for group in quota.groups() if group), "") if quota and kind == "quota" else ""
    operation = re.search(
        r"calling the (\w+) operation|perform(?: action)?[:\s]+'?([\w:./]+)|Required '([\w.]+)' permission", text
    )
    if kind == "permission" and operation:
        named = operation[1] or operation[2] or operation[3]
    return Refusal(place[1] if place else "", kind, code[1], named)


def read(texts: Iterable[str]) -> list[Refusal]:
    """What was refused, each place and code once with the first detail, in the order in which it was said."""
    found: dict[tuple[str, str, str], Refusal] = {}  # each resource provider that is not registered is one of its own
    near = ""  # SkyPilot names the zone that it tries in a line of its own
    for text in texts:
        for line in plain(text).splitlines():
            tried = re.search(r"Launching on .*?\(([^)]+)\)|Launching on \S+ (\S+?)[.(]", line)
            if tried:
                near = (tried[1] or tried[2] or "").split(",")[0]
            if _REGISTERED in line:
                found = {key: row for key, row in found.items() if row.kind != "registration"}
            refusal = _of(line)
            if refusal is not None:
                place = refusal.place or near
                key = place, refusal.code, refusal.detail if refusal.kind == "registration" else ""
                before = found.get(key)
                if before is None or (refusal.detail and not before.detail):
                    found[key] = Refusal(place, refusal.kind, refusal.code, refusal.detail)
    placed = {refusal.code for refusal in found.values() if refusal.place}
    return [refusal for refusal in found.values() if refusal.place or refusal.code not in placed]


def on_the_way(log: Path) -> str:
    """One line on what refused before a machine was found; empty if nothing did."""
    rows = read([log.read_text("utf-8", "replace")]) if log.exists() else []
    if not rows:
        return ""
    zones: dict[tuple[str, str], list[str]] = {}  # of one region that refused alike
    for row in rows:
        region, zone = (row.place[:-1].rstrip("-"), row.place[-1]) if _ZONE.fullmatch(row.place) else (row.place or "?", "")
        why = f"{row.kind}, {row.code}{': ' + row.detail if row.detail else ''}"
        zones.setdefault((region, why), []).append(zone)
    alike = [f"{' '.join([region, *filter(None, of)])} ({why})" for (region, why), of in zones.items()]
    more = [f"and {len(alike) - TOLD} more (log: {log})"] if len(alike) > TOLD else []
    return f"refused on the way: {', '.join([*alike[:TOLD], *more])}"


def refused(message: str, history: Sequence[BaseException], log: Path) -> UserError:
    """The error that says it: one line, and a table of what each place refused."""
    try:
        logged = log.read_text("utf-8", "replace")
    except OSError:
        logged = ""
    rows = read([*(str(error) for error in history), logged])
    limit = _PRICE_LIMIT.search(plain(logged))
    if not rows and limit:
        what = "by today's catalog of SkyPilot no such machine costs so little; raise --max-price, or allow more places"
        return UserError(f"--max-price {figure(float(limit[1]))} USD an hour: {what} (log: {log})", Exit.CLOUD)
    if not rows:
        first = next((line.strip() for line in plain(message).splitlines() if line.strip()), "no reason was given")
        return UserError(f"no cloud gave a machine: {first[:300]} (log: {log})", Exit.CLOUD)
    kinds = [kind for kind in ADVICE if any(row.kind == kind for row in rows)]
    commands = registering(f"Resource provider '{row.detail}'" for row in rows if row.kind == "registration")
    advice = "; ".join(f"{kind}: {commands if kind == 'registration' and commands else ADVICE[kind]}" for kind in kinds)
    cells = [[f"  {row.place or '?'}", row.kind, f"{row.code}{': ' + row.detail if row.detail else ''}"] for row in rows]
    details = "\n".join(tables.lines(cells))
    return UserError(f"no cloud gave a machine, {len(rows)} refused; {advice} (log: {log})", Exit.CLOUD, details=details)
