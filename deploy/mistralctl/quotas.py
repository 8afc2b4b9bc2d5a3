"""Quotas: how much of a kind of machine a cloud lets an account run, and whether that is enough for a plan.

What a machine counts against, and how a cloud is asked, is in its `clouds/CLOUD/quotas.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mistralctl import tables
from mistralctl.errors import figure


@dataclass(frozen=True)
class Wanted:
    """One machine that a task may get: its type, its GPUs, and how many vCPUs it has at least."""

    cloud: str
    instance_type: str
    accelerator: str | None
    count: int
    vcpus: float
    spot: bool


@dataclass(frozen=True)
class Need:
    """What a machine takes of a quota: the quota's `code` (what the API calls it), its name in the console, how much."""

    code: str
    name: str
    amount: float
    unit: str


@dataclass(frozen=True)
class Quota:
    """A quota in a region, for a machine that is to run there.

    `limit` and `used` are None where the cloud did not say; `why` says why. `page` is where to ask for more. `enough` is None where
    it is not known whether one more machine may run.
    """

    cloud: str
    region: str
    machine: str
    code: str
    name: str
    needs: float
    unit: str
    limit: float | None
    used: float | None
    page: str
    why: str = ""
    enough: bool | None = field(init=False)

    def __post_init__(self) -> None:
        enough: bool | None = None
        if self.limit is not None and (self.limit < self.needs or self.used is not None):
            enough = self.limit - (self.used or 0) >= self.needs
        object.__setattr__(self, "enough", enough)


class Unknown(Exception):
    """A cloud did not say; the message is why."""


Found = Mapping[str, tuple[float, float | None]]


def _places(quotas: Iterable[Quota]) -> dict[tuple[str, str, str], list[bool | None]]:
    found: dict[tuple[str, str, str], list[bool | None]] = {}
    for quota in quotas:
        found.setdefault((quota.cloud, quota.machine, quota.region), []).append(quota.enough)
    return found


def too_small_everywhere(quotas: Iterable[Quota]) -> bool:
    """Whether no place of these can give a machine: in each, one quota is known to be too small."""
    places = _places(quotas)
    return bool(places) and all(False in enough for enough in places.values())


def _figure(value: float | None) -> str:
    return "?" if value is None else figure(value)


def table(quotas: Iterable[Quota]) -> list[str]:
    """Lines: the same quota of several regions, with the same figures, is one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    cells: list[tuple[str, ...]] = [("CLOUD", "MACHINE", "QUOTA", "NEEDS", "LIMIT", "USED", "", "REGIONS")]
    for quota in quotas:
        verdict = {True: "enough", False: "TOO SMALL", None: f"unknown: {quota.why}" if quota.why else "unknown"}[quota.enough]
        key = (
            quota.cloud, quota.machine, f"{quota.code} {quota.name}".strip(), f"{figure(quota.needs)} {quota.unit}".strip(),
            _figure(quota.limit), _figure(quota.used), verdict,
        )  # fmt: skip
        rows.setdefault(key, []).append(quota.region)
    for same, regions in rows.items():
        more = f" and {len(regions) - 3} more" if len(regions) > 3 else ""
        cells.append((*same, ", ".join(regions[:3]) + more))
    return tables.lines(cells)
