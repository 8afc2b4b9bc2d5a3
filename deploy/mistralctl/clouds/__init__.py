"""The clouds: each is a folder here that holds all that is known of it, found by being there.

Its `__init__.py` has the facts (`CLOUD`), its `vms.csv` the prices. What else mistralctl can do on a cloud is said by which of these
protocols the folder's other files implement; each file and each protocol may be left out:

    images.py   HasImages                           which image and driver a machine gets
    buckets.py  HasBuckets                          its buckets, and what a node's identity may do with them
    errors.py   HasErrors                           its error codes and how it words them
    quotas.py   HasQuotas                           what a machine counts against, and asking for it
    api.py      CanList, CanListPartly, CanLabel, CanFirewall, HasIdentity, HasAccount, HasChecks

No SDK is imported before a function is called.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Literal, Protocol, runtime_checkable

from mistralctl.errors import Exit, UserError
from mistralctl.quotas import Found, Need, Wanted

LOCAL = "local"


MONTH_DAYS = 30.4  # on average


@dataclass(frozen=True)
class Cloud:
    """The facts of a cloud. `name` is SkyPilot's; clouds are listed by `order`, then by name.

    `regions` are those that offer GPUs, by the cloud's own list of regions in 2026; `zone` is the pattern of a zone's
    name with the region as `{region}`; None where SkyPilot takes no zones. `page` says how to get credentials, `variables` and `files` (below
    the user's home) where they lie; `package` brings SkyPilot and the SDKs; `roles` are the role files under docs/roles.

    `disk_tier` is the tier of the disk of a machine with a GPU, in SkyPilot's words, where its own (medium) makes a start wait.
    `disk_price` is in USD for a GiB of the disks that SkyPilot asks for, a month, without what a tier adds; `address_price` in USD an hour for
    a public address that nothing uses; None where unknown.
    `hosts` are the machines below GPUs that are sold apart, by GPU and count; `sold_with_gpu` begin the types that are sold with their GPUs
    alone. `spot_only` are types that are not sold on demand.
    """

    name: str
    title: str
    regions: frozenset[str]
    zone: str | None
    sign_in: str
    page: str
    package: str
    order: int = 100
    variables: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    disk_tier: str | None = None
    disk_price: float | None = None
    address_price: float | None = None
    hosts: Mapping[tuple[str, int], str] = field(default_factory=dict)
    sold_with_gpu: tuple[str, ...] = ()
    spot_only: frozenset[str] = frozenset()

    def has_zone(self, region: str, zone: str) -> bool:
        """Whether `zone` is spelt like one of that region's."""
        return self.zone is not None and re.fullmatch(self.zone.format(region=re.escape(region)), zone) is not None

    def disk_per_day(self, gib: float | None) -> float | None:
        """Return what a disk costs a day, USD; None where its size or its price is not known."""
        return None if gib is None or self.disk_price is None else round(gib * self.disk_price / MONTH_DAYS, 2)

    @property
    def node(self) -> str:
        """A node there, in words: `an AWS node`."""
        return f"{'an' if self.title[0] in 'AEIO' else 'a'} {self.title} node"

    @property
    def install(self) -> str:
        """The command that installs SkyPilot and the SDKs for it."""
        return f"pip install '{self.package}'"


@dataclass(frozen=True)
class Image:
    """An image of a machine. `id` is what SkyPilot takes as `image_id`; `ids` are other names of the same image.

    `driver` is empty where the image has none. `grid`: the driver is for a vGPU, which works with no other, and no other GPU works with it.
    A row with `since` is a release of a series: `id` ends with `:`, the version follows, and the row holds from that one on.
    """

    cloud: str
    id: str
    driver: str
    cuda: str
    source: str
    date: str
    ids: tuple[str, ...] = ()
    grid: bool = False
    since: str = ""


@dataclass(frozen=True)
class Images:
    """The images of a cloud, and how one is spelt: the pattern `form`, an `example`, and `regional`, the pattern of those of one region.

    `skypilots` is what SkyPilot takes where nothing is asked for, by GPU ("" is none, "*" any other); `instead` is what mistralctl asks for
    where that one is too old; `vgpu` are GPUs that are vGPUs, which work with a GRID driver alone.
    """

    rows: tuple[Image, ...]
    skypilots: Mapping[str, str]
    form: str
    example: str
    instead: Mapping[str, str] = field(default_factory=dict)
    vgpu: frozenset[str] = frozenset()
    regional: str | None = None


Has = Literal["yes", "grant", "no"]


@dataclass(frozen=True)
class Bucket:
    """A cloud's kind of bucket: its scheme and form, the rights that reading and mirroring to it need, the roles that have them.

    `variables` name another server than the cloud's in this machine's environment, the one that counts first; `domains` are the cloud's;
    `parts` of a path name the bucket. `has`, `why` and `mend` say what the identity that SkyPilot gives a node may do with it.
    """

    cloud: str
    vendor: str
    scheme: str
    form: str
    read: str
    write: str
    variables: tuple[str, ...]
    domains: tuple[str, ...]
    has: Has
    why: str
    mend: str
    parts: int = 1
    roles: tuple[str, str] = ("", "")


Kind = Literal["capacity", "quota", "permission", "registration", "credentials", "other"]


@dataclass(frozen=True)
class Errors:
    """How a cloud refuses: its codes, each of a kind, and patterns of its words.

    `numbered` is the pattern of codes of its sign-in; `zone` and `region` are those of its places' names. Each of `quotas` and `operations` has
    one group: the quota that is too small, the right that is missing. `unregistered` is the code for a resource provider that is not
    registered, which `provider` finds in its words; `register` is the command that registers one, `registered` what is said when that went well.
    """

    codes: Mapping[str, Kind]
    numbered: str | None = None
    zone: str | None = None
    region: str | None = None
    quotas: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    provider: str | None = None
    unregistered: str = ""
    register: str = ""
    registered: str | None = None


@dataclass(frozen=True)
class Part:
    """Something in a cloud that bears our labels, by the cloud's own listing: a `machine`, or what is left without one, which is a
    `disk`, an `address`, an `interface`, a `rule` of a firewall or a `group` of resources. `created` is in seconds since the epoch, None
    where the cloud does not say it, by the cloud's clock, which was `ahead` of this machine's by so many seconds. `disk_gib` is what a
    machine's disks hold; None where that is not known.
    """

    cloud: str
    kind: str
    id: str
    place: str
    state: str
    size: str
    created: float | None
    labels: dict[str, str]
    ahead: float = 0.0
    disk_gib: float | None = None

    @property
    def since(self) -> float | None:
        """Return `created` by this machine's clock."""
        return None if self.created is None else self.created - self.ahead


def ahead(date: str | None) -> float:
    """Return by how many seconds a cloud's clock is ahead of this machine's, by the Date of an answer that just came; 0.0 if it has none.

    >>> ahead(None)
    0.0
    """
    try:
        return parsedate_to_datetime(date or "").timestamp() - time.time()
    except ValueError:
        return 0.0


Refused = list[UserError]  # what a cloud would not list, each with its place


@contextmanager
def part_by_part(refused: Refused | None, place: str = "") -> Iterator[None]:
    """Add a cloud's refusal to what was refused, with its place, so that the rest is asked; raise it where nobody asks for the rest."""
    try:
        yield
    except NotUsed:
        raise
    except UserError as error:
        if refused is None:
            raise
        refused.append(UserError(f"{place}: {error}" if place else str(error), error.code))


def understood(refused: Refused | None, kind: str, listed: Iterable[Any], part: Callable[[Any], Part | None]) -> Iterator[Part]:
    """Yield the part of each resource that a cloud lists. One that says of itself what nobody understands is among what was refused, and hides no
    other."""
    for one in listed:
        found = None
        with part_by_part(refused):
            try:
                found = part(one)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                raise UserError(
                    f"a {kind} is listed that cannot be understood ({type(error).__name__}: {str(error)[:100]}); look at it in the cloud's console",
                    Exit.CLOUD,
                ) from error
        if found is not None:
            yield found


@dataclass(frozen=True)
class Finding:
    """What one more check of an account found, and the command that mends it."""

    name: str
    ok: bool
    found: str
    mend: str


class NotUsed(UserError):
    """This user has no SDK or no credentials for a cloud here: it is not asked, which is no failure of it."""


class Lacking(UserError):
    """mistralctl cannot do this on that cloud."""


# How the clouds call a machine that is on its way out, and one that is stopped (GCP says TERMINATED), in small letters.
GOING = frozenset(("shutting-down", "deleting"))
STOPPED = frozenset(("stopping", "stopped", "suspending", "suspended", "terminated", "deallocating", "deallocated"))


@runtime_checkable
class HasImages(Protocol):
    """The images of a cloud are known."""

    IMAGES: Images


@runtime_checkable
class HasBuckets(Protocol):
    """A cloud has buckets for weights."""

    BUCKET: Bucket

    def endpoint(self, environ: Mapping[str, str]) -> str:
        """The server that this machine's settings name instead of the cloud's; empty if none."""


@runtime_checkable
class HasErrors(Protocol):
    """The errors of a cloud are known."""

    ERRORS: Errors


@runtime_checkable
class HasQuotas(Protocol):
    """A cloud can be asked for its quotas."""

    def needs(self, wanted: Wanted) -> Sequence[Need]:
        """What the machine counts against; empty if the table does not know it."""

    def ask(self, region: str, needs: Sequence[Need]) -> Found:
        """Limit and use of these quotas in a region, by code; `Unknown` if the cloud does not say."""

    def regions(self) -> Sequence[str]:
        """Every region in which this account could run a machine; `Unknown` if the cloud does not say."""

    def page(self, region: str, code: str) -> str:
        """Where to ask for more."""


@runtime_checkable
class CanList(Protocol):
    """What bears our labels on a cloud can be listed, labelled and deleted. Each raises NotUsed, or UserError when the cloud refuses."""

    def ours(self, owner: str | None, name: str | None = None, within: Iterable[str] | None = None) -> list[Part]:
        """Machines that are not gone, and disks, addresses and interfaces without one, with our labels; `owner` None: everybody's."""

    def machines(self, owner: str | None, within: Iterable[str]) -> list[Part]:
        """The machines of what `ours` lists, in fewer questions."""

    def delete(self, parts: Sequence[Part]) -> None:
        """Asks the cloud to take these away; what is gone already is no error. `ours` says when they are gone."""

    def relabel(self, part: Part, labels: Mapping[str, str]) -> None:
        """Sets these labels of a machine and leaves its others as they are."""


@runtime_checkable
class CanLabel(Protocol):
    """What SkyPilot makes beside a machine and leaves without our labels can be labelled, so that it is known for the deployment's."""

    def label_others(self, owner: str, name: str, region: str) -> int:
        """Labels what belongs to a deployment's machines and bears no owner; the number of machines that bear owner and name."""


@runtime_checkable
class CanListPartly(Protocol):
    """What a cloud refuses to list does not hide the rest."""

    def listed(self, owner: str | None, name: str | None, within: Iterable[str] | None, refused: Refused | None) -> list[Part]:
        """What `ours` lists; what the cloud refuses is added to `refused`. NotUsed without credentials."""


@runtime_checkable
class CanFirewall(Protocol):
    """A cloud's firewall can be set."""

    def narrow(self, owner: str, name: str, region: str, port: int, networks: Sequence[str]) -> int:
        """Lets a port of a deployment's machines be reached from these networks and from nowhere else; the number of rules that say so."""


@runtime_checkable
class HasIdentity(Protocol):
    """A cloud says whose credentials it sees."""

    def identity(self) -> str:
        """Who the cloud says that this laptop is; UserError if it takes the credentials for nobody's."""


@runtime_checkable
class HasAccount(Protocol):
    """A cloud says in which account these credentials see machines."""

    def account(self) -> str:
        """The account's number, project or subscription; NotUsed without credentials, UserError if the cloud refuses."""


@runtime_checkable
class HasChecks(Protocol):
    """There is more of an account that `doctor` looks at."""

    def checks(self) -> Sequence[Finding]:
        """What it found, also where the cloud refuses to say."""


@cache
def every() -> tuple[Cloud, ...]:
    """The facts of every cloud, in their order."""
    found: list[Cloud] = [import_module(f"{__name__}.{one.name}").CLOUD for one in iter_modules(__path__) if one.ispkg]
    return tuple(sorted(found, key=lambda cloud: (cloud.order, cloud.name)))


@cache
def names() -> tuple[str, ...]:
    """The names of all clouds, in their order."""
    return tuple(cloud.name for cloud in every())


def facts(cloud: str) -> Cloud:
    """The facts of a cloud."""
    return next(one for one in every() if one.name == cloud)


@cache
def _implementing(cloud: str, file: str, protocol: Any) -> Any:
    """The module of that name in a cloud's folder if it implements the protocol, else None."""
    if cloud not in names() or find_spec(f"{__name__}.{cloud}.{file}") is None:
        return None
    module = import_module(f"{__name__}.{cloud}.{file}")
    return module if isinstance(module, protocol) else None


def images(cloud: str) -> Images | None:
    """The images of a cloud; None where they are not known."""
    found: HasImages | None = _implementing(cloud, "images", HasImages)
    return found.IMAGES if found else None


def bucket_files() -> list[HasBuckets]:
    """What is known of the buckets of every cloud that has some."""
    return [found for cloud in names() if (found := _implementing(cloud, "buckets", HasBuckets))]


@cache
def buckets() -> Mapping[str, Bucket]:
    """The buckets of all clouds, by scheme."""
    return {one.BUCKET.scheme: one.BUCKET for one in bucket_files()}


@cache
def errors() -> tuple[Errors, ...]:
    """How each cloud refuses whose errors are known."""
    return tuple(found.ERRORS for cloud in names() if (found := _implementing(cloud, "errors", HasErrors)))


def quotas(cloud: str) -> HasQuotas | None:
    """What asks a cloud for its quotas; None where nothing does."""
    found: HasQuotas | None = _implementing(cloud, "quotas", HasQuotas)
    return found


def listing(cloud: str) -> CanList:
    """What lists what of ours a cloud has; Lacking where nothing does."""
    found: CanList | None = _implementing(cloud, "api", CanList)
    if found is None:
        raise Lacking(f"mistralctl cannot list what runs on {cloud}; look in its console", Exit.CLOUD)
    return found


def labelling(cloud: str) -> CanLabel | None:
    """What labels that which belongs to a cloud's machines; None where nothing does."""
    found: CanLabel | None = _implementing(cloud, "api", CanLabel)
    return found


def listed_partly(cloud: str, owner: str | None, name: str | None, refused: Refused) -> list[Part]:
    """Return what of ours a cloud has; what it refuses to list is added to `refused`, where it can be asked part by part."""
    found: CanListPartly | None = _implementing(cloud, "api", CanListPartly)
    return listing(cloud).ours(owner, name) if found is None else found.listed(owner, name, None, refused)


def firewall(cloud: str) -> CanFirewall | None:
    """What sets a cloud's firewall; None where nothing does."""
    found: CanFirewall | None = _implementing(cloud, "api", CanFirewall)
    return found


def identity(cloud: str) -> str:
    """Who a cloud says that this laptop is; Lacking where it cannot be asked."""
    found: HasIdentity | None = _implementing(cloud, "api", HasIdentity)
    if found is None:
        raise Lacking(f"mistralctl cannot ask {cloud} for an identity", Exit.CLOUD)
    return found.identity()


def account(cloud: str) -> str:
    """In which account of a cloud these credentials see machines; empty where it cannot be asked."""
    found: HasAccount | None = _implementing(cloud, "api", HasAccount)
    return found.account() if found else ""


def checks(cloud: str) -> Sequence[Finding]:
    """What more there is to look at in an account on a cloud."""
    found: HasChecks | None = _implementing(cloud, "api", HasChecks)
    return found.checks() if found else ()
