"""Prices per hour, from the dated snapshot `vms.csv` of each cloud's folder: for planning, never today's price."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from mistralctl.clouds import facts

SNAPSHOT_DATE = "2026-11-23"
SNAPSHOT_SOURCE = "skypilot-org/skypilot-catalog (a hand-kept subset; see mistralctl/clouds/SOURCE.md)"


@dataclass(frozen=True)
class Offer:
    """A machine of a cloud in a region: cores, GiB of memory, USD per hour on demand and (if known) as spot.

    `accelerator` is SkyPilot's name, None for a machine without a GPU. The spot price is that of the cheapest zone. A machine that is
    `spot_only` is not sold on demand, whatever its price is.
    """

    cloud: str
    region: str
    instance_type: str
    accelerator: str | None
    count: int
    vcpus: float
    memory_gib: float
    price: float
    spot_price: float | None
    spot_only: bool = False


def _rows(cloud: str) -> list[dict[str, str]]:
    file = resources.files(f"mistralctl.clouds.{cloud}") / "vms.csv"
    return list(csv.DictReader(file.read_text("utf-8").splitlines())) if file.is_file() else []


def _lower(old: float | None, new: str) -> float | None:
    if not new:
        return old
    return float(new) if old is None else min(old, float(new))


def _cheapest_zone(cloud: str) -> dict[tuple[str, str, str, int], tuple[float, float, float | None, float | None]]:
    """(region, instance type, accelerator, count) to (cores, GiB, price, spot price), each price the lowest zone's."""
    found: dict[tuple[str, str, str, int], tuple[float, float, float | None, float | None]] = {}
    for row in _rows(cloud):
        key = (row["Region"], row["InstanceType"], row["AcceleratorName"], int(float(row["AcceleratorCount"] or 0)))
        old = found.get(key, (0.0, 0.0, None, None))
        found[key] = (
            float(row["vCPUs"] or 0),
            float(row["MemoryGiB"] or 0),
            _lower(old[2], row["Price"]),
            _lower(old[3], row["SpotPrice"]),
        )
    return found


@cache
def offers(cloud: str) -> tuple[Offer, ...]:
    """Every machine of the snapshot for one cloud, cheapest on-demand price first."""
    rows, known = _cheapest_zone(cloud), facts(cloud)
    result = []
    for (region, instance_type, accelerator, count), (vcpus, memory, price, spot) in rows.items():
        if not instance_type:  # a GPU that is sold apart: add the machine below it
            instance_type = known.hosts[accelerator, count]
            host = rows.get((region, instance_type, "", 0))
            if host is None:
                continue
            vcpus, memory = host[0], host[1]
            price = None if price is None or host[2] is None else round(price + host[2], 6)
            spot = None if spot is None or host[3] is None else round(spot + host[3], 6)
        elif not accelerator and instance_type.startswith(known.sold_with_gpu):
            continue
        if price is not None:
            kind = accelerator or None, count, vcpus, memory
            result.append(Offer(cloud, region, instance_type, *kind, price, spot, instance_type in known.spot_only))
    return tuple(sorted(result, key=lambda offer: (offer.price, offer.region, offer.instance_type)))
