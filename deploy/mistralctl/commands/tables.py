"""`mistralctl models` and `mistralctl gpus`: the tables of facts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mistralctl import prices
from mistralctl.clouds import names
from mistralctl.gpus import GPUS
from mistralctl.models import MODELS, Model


@dataclass(frozen=True)
class GpuRow:
    """A GPU on a cloud, one of it: memory in GiB, and the cheapest region's prices of the snapshot in USD per hour; None: not sold so."""

    accelerator: str
    memory_gib: float
    bfloat16: bool
    cloud: str
    count: int
    instance_type: str
    region: str
    price: float | None
    spot_price: float | None


@dataclass(frozen=True)
class GpuTable:
    """All rows, with the date and the source of their prices."""

    date: str
    source: str
    rows: tuple[GpuRow, ...]


def models() -> list[Model]:
    """Every row of the table of models."""
    return list(MODELS.values())


def gpus() -> GpuTable:
    """Every GPU of every cloud in the snapshot, cheapest first."""
    best: dict[tuple[str, str, int], GpuRow] = {}
    for cloud in names():
        for offer in prices.offers(cloud):
            key = (cloud, offer.accelerator or "", offer.count)
            if offer.accelerator is None or key in best:
                continue
            gpu = GPUS[offer.accelerator]
            best[key] = GpuRow(
                gpu.name, gpu.memory_gib, gpu.bfloat16, cloud, offer.count, offer.instance_type, offer.region,
                None if offer.spot_only else offer.price, offer.spot_price,
            )  # fmt: skip
    rows = tuple(sorted(best.values(), key=lambda row: (math.inf if row.price is None else row.price, row.cloud)))
    return GpuTable(prices.SNAPSHOT_DATE, prices.SNAPSHOT_SOURCE, rows)
