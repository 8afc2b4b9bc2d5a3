"""The clouds: each is a folder here, which holds all that is known of it. Its `CLOUD` is a row of the table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from mistralctl.errors import UserError

LOCAL = "local"


@dataclass(frozen=True)
class Cloud:
    """A row of the table.

    `regions` are those that offer GPUs, by each cloud's own list of regions in 2026; `zone` is the pattern of a zone's
    name with the region as `{region}`; None where SkyPilot takes no zones. `page` says how to get credentials.
    Clouds are named by `order`, then by name.
    """

    name: str
    regions: frozenset[str]
    zone: str | None
    sign_in: str
    page: str
    order: int = 100

    def has_zone(self, region: str, zone: str) -> bool:
        """Whether `zone` is spelt like one of that region's."""
        return self.zone is not None and re.fullmatch(self.zone.format(region=re.escape(region)), zone) is not None


@dataclass(frozen=True)
class Part:
    """Something in a cloud that bears our labels, by the cloud's own listing: a `machine`, or what is left without one, which is a
    `disk`, an `address`, an `interface`, a `rule` of a firewall or a `group` of resources. `created` is in seconds since the epoch, None
    where the cloud does not say it."""

    cloud: str
    kind: str
    id: str
    place: str
    state: str
    size: str
    created: float | None
    labels: dict[str, str]


class NotUsed(UserError):
    """This user has no SDK or no credentials for a cloud here: it is not asked, which is no failure of it."""


# How the clouds call a machine that is on its way out, and one that is stopped (GCP says TERMINATED), in small letters.
GOING = frozenset(("shutting-down", "deleting"))
STOPPED = frozenset(("stopping", "stopped", "suspending", "suspended", "terminated", "deallocating", "deallocated"))


class Listing(Protocol):
    """What the module of a cloud can be asked. Each raises NotUsed, or UserError when the cloud refuses."""

    def ours(self, owner: str | None, name: str | None = None, within: Iterable[str] | None = None) -> list[Part]:
        """Machines that are not gone, and disks, addresses and interfaces without one, with our labels; `owner` None: everybody's."""

    def machines(self, owner: str | None, within: Iterable[str]) -> list[Part]:
        """The machines of what `ours` lists, in fewer questions."""

    def identity(self) -> str:
        """Who the cloud says that this laptop is; UserError if it takes the credentials for nobody's."""

    def delete(self, parts: Sequence[Part]) -> None:
        """Asks the cloud to take these away; what is gone already is no error. `ours` says when they are gone."""

    def relabel(self, part: Part, labels: Mapping[str, str]) -> None:
        """Sets these labels of a machine and leaves its others as they are."""

    def narrow(self, owner: str, name: str, region: str, port: int, networks: Sequence[str]) -> None:
        """Lets a port of a deployment's machines be reached from these networks and from nowhere else."""


# The tier of the disk of a machine with a GPU, in SkyPilot's words, where its own (medium) makes a start wait: vLLM's environment and the
# weights, some 25 GB, are written and read once. SkyPilot 0.14.1 makes of high, with 90 GiB:
#   AWS: gp3 with 7000 IOPS and 437 MB/s instead of 3500 and 218 (sky/clouds/aws.py, _get_disk_specs);
#   GCP: pd-ssd, 283 MiB/s instead of pd-balanced's 165 (https://cloud.google.com/compute/docs/disks/performance).
# Not on Azure: there high is the performance tier P50, which is billed as a disk of 4 TiB (sky/clouds/azure.py, disk_performance_tier).
DISK_TIERS = {"aws": "high", "gcp": "high"}
# USD for a GiB of the disks that SkyPilot asks for, a month, without what a tier adds. AWS: EBS, gp3, us-east-1; GCP: balanced persistent
# disk, us-central1
# (https://cloud.google.com/compute/disks-image-pricing); Azure: premium SSD, East US, P10 (128 GiB at 19.71;
# https://azure.microsoft.com/pricing/details/managed-disks).
DISK_PRICES = {"aws": 0.08, "gcp": 0.10, "azure": 0.154}
# USD an hour for a public address that nothing uses. AWS: public IPv4, all regions, by its price list of EC2 and VPC.
ADDRESS_PRICES = {"aws": 0.005}


def listing(cloud: str) -> Listing:
    """The module that asks a cloud what of ours it has."""
    return cast(Listing, import_module(f"mistralctl.clouds.{cloud}.api"))


def _found() -> dict[str, Cloud]:
    """The facts of every folder beside this file, by name."""
    every = [import_module(f"{__name__}.{one.name}").CLOUD for one in iter_modules(__path__) if one.ispkg]
    return {cloud.name: cloud for cloud in sorted(every, key=lambda cloud: (cloud.order, cloud.name))}


CLOUDS = _found()
