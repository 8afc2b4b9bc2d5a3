"""Why clouds refused a machine: read from SkyPilot's exception and, where that does not say, from its log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mistralctl import clouds, tables
from mistralctl.clouds import Errors, Kind
from mistralctl.errors import Exit, UserError, figure

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|<rich_[^>]*>|</rich_[^>]*>")
_PRICE_LIMIT = re.compile(
    r"Max hourly cost limit\s+\(\$([\d.e+-]+)/hr\)"
)  # SkyPilot's hint where its catalog has nothing for the price
# What SkyPilot says where a quota is 0, without an attempt.
_NO_QUOTA = re.compile(r"Found no quota for (\S+) (spot|on-demand) instances in region (\S+) in \w+")
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


@cache
def _kinds() -> dict[str, Kind]:
    """The clouds' own codes, with what they mean."""
    return {code: kind for errors in clouds.errors() for code, kind in errors.codes.items()}


def _any(patterns: Iterable[str | None]) -> re.Pattern[str]:
    """What any of these patterns matches; nothing if there are none."""
    return re.compile("|".join(filter(None, patterns)) or r"(?!)")


@cache
def _codes() -> re.Pattern[str]:
    known = [*(errors.numbered for errors in clouds.errors()), *sorted(_kinds(), key=len, reverse=True)]
    return re.compile(rf"\b(?:{_any(known).pattern})\b")


@cache
def _places() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The names of zones, and of regions."""
    of_zones, of_regions = (_any(getattr(errors, kind) for errors in clouds.errors()) for kind in ("zone", "region"))
    return re.compile(rf"\b(?:{of_zones.pattern})\b"), re.compile(rf"\b(?:{of_regions.pattern})\b")


def _named(patterns: Iterable[str], text: str) -> str:
    """What the first match of these patterns names; empty without one."""
    found = _any(patterns).search(text)
    return next(filter(None, found.groups()), "") if found else ""


def _provider(text: str) -> tuple[Errors, str] | None:
    """The resource provider that a cloud says is not registered."""
    for errors in clouds.errors():
        if errors.provider and (found := re.search(errors.provider, text)):
            return errors, found[1]
    return None


def registering(texts: Iterable[str]) -> str:
    """What to run where a cloud's words name resource providers that are not registered; empty if they name none."""
    known = [errors for errors in clouds.errors() if errors.provider]
    found = ((errors, name) for text in texts for errors in known for name in re.findall(str(errors.provider), text))
    return _run(errors.register.format(provider=name) for errors, name in found)


def _run(commands: Iterable[str]) -> str:
    every = list(dict.fromkeys(commands))
    return f"run {', '.join(every)}" if every else ""


def plain(text: str) -> str:
    """Text without a terminal's colours."""
    return _COLOURS.sub("", text)


def _of(text: str) -> Refusal | None:
    none = _NO_QUOTA.search(text)
    if none:
        return Refusal(none[3], "quota", "no quota", f"{none[1]} {none[2]}")
    if missing := _provider(text):
        return Refusal("", "registration", missing[0].unregistered, missing[1])
    code = _codes().search(text)
    if code is None:
        return None
    place = next(filter(None, (names.search(text) for names in _places())), None)
    kind, named = _kinds().get(code[0], "credentials"), ""
    if kind == "quota":
        named = _named((pattern for errors in clouds.errors() for pattern in errors.quotas), text)
    elif kind == "permission":
        named = _named((pattern for errors in clouds.errors() for pattern in errors.operations), text)
    return Refusal(place[0] if place else "", kind, code[0], named)


def read(texts: Iterable[str]) -> list[Refusal]:
    """What was refused, each place and code once with the first detail, in the order in which it was said."""
    found: dict[tuple[str, str, str], Refusal] = {}  # each resource provider that is not registered is one of its own
    near = ""  # SkyPilot names the zone that it tries in a line of its own
    for text in texts:
        for line in plain(text).splitlines():
            tried = re.search(r"Launching on .*?\(([^)]+)\)|Launching on \S+ (\S+?)[.(]", line)
            if tried:
                near = (tried[1] or tried[2] or "").split(",")[0]
            if any(errors.registered and errors.registered in line for errors in clouds.errors()):
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
        region, zone = (
            (row.place[:-1].rstrip("-"), row.place[-1]) if _places()[0].fullmatch(row.place) else (row.place or "?", "")
        )
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
    unregistered = [(errors, row) for row in rows for errors in clouds.errors() if row.code == errors.unregistered]
    commands = _run(errors.register.format(provider=row.detail) for errors, row in unregistered)
    advice = "; ".join(f"{kind}: {commands if kind == 'registration' and commands else ADVICE[kind]}" for kind in kinds)
    cells = [[f"  {row.place or '?'}", row.kind, f"{row.code}{': ' + row.detail if row.detail else ''}"] for row in rows]
    details = "\n".join(tables.lines(cells))
    return UserError(f"no cloud gave a machine, {len(rows)} refused; {advice} (log: {log})", Exit.CLOUD, details=details)
