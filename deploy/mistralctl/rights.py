"""Rights: what reading or writing a bucket needs, and whether a node's role on each cloud has it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from mistralctl.clouds import LOCAL, Bucket, Has, buckets, facts


@dataclass(frozen=True)
class Right:
    """What a node on `cloud` needs to use `uri`: it has it (`yes`), must be given it (`grant`) or cannot have it (`no`).

    `why` says whose right it is, `mend` what to do where it is missing.
    """

    uri: str
    cloud: str
    has: Has
    needs: str
    why: str
    mend: str

    @property
    def line(self) -> str:
        """All of it, for a person."""
        verb = {"yes": "has it", "grant": "MUST BE GIVEN IT", "no": "CANNOT HAVE IT"}[self.has]
        mend = (f" ({self.mend})" if self.has == "yes" else f"; {self.mend}") if self.mend else ""
        return f"{self.uri} from {self.cloud}: needs {self.needs}; {verb}: {self.why}{mend}"


def _foreign(endpoint: str, bucket: Bucket) -> tuple[Has, str, str] | None:
    """What a node's identity is worth at a server of these settings; None if it is the cloud's own."""
    host = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}").hostname or ""
    if host.endswith(bucket.domains):
        return None
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback:
        why = f"{endpoint} ({bucket.variables[0]}) is this machine's own address, and a node looks for it on itself"
        return "no", why, "name the store by an address that a node reaches"
    why = f"{endpoint} ({bucket.variables[0]}) is not {bucket.vendor}'s own and must know the keys of the node's role"
    return "grant", why, f"set it up so, or mirror the weights into a bucket of {bucket.vendor}"


def right(uri: str, cloud: str, *, write: bool = False, endpoints: Mapping[str, str] | None = None) -> Right | None:
    """The right that a node on `cloud` needs for `uri`; None where no cloud's identity is asked (hub, wheel, folder).

    `endpoints` are the clouds' variables that name another server than the cloud's.
    """
    scheme, _, rest = uri.partition("://")
    bucket = buckets().get(scheme)
    if bucket is None:
        return None
    needs = (bucket.write if write else bucket.read).format(bucket="/".join(rest.split("/")[: bucket.parts]))
    if cloud == LOCAL:
        return Right(uri, cloud, "yes", needs, f"this machine's own {bucket.vendor} credentials are used", "")
    if cloud == bucket.cloud:
        endpoint = (endpoints or {}).get(bucket.variables[0], "")
        has, why, mend = (endpoint and _foreign(endpoint, bucket)) or (bucket.has, bucket.why, bucket.mend)
        return Right(uri, cloud, has, needs, why, mend.format(role=bucket.roles[write]))
    own = next((kind.form for kind in buckets().values() if kind.cloud == cloud), None)
    mend = f"mistralctl weights mirror {uri} {own} --here" if own and not write else "choose the bucket's own cloud"
    return Right(uri, cloud, "no", needs, f"{facts(cloud).node} has no {bucket.vendor} identity", mend)


def rights(uris: Iterable[str], clouds: Iterable[str], endpoints: Mapping[str, str] | None = None) -> Iterator[Right]:
    """What nodes on these clouds need to read all of these; one entry for each pair."""
    places = tuple(dict.fromkeys(clouds))
    for uri in dict.fromkeys(uris):
        for cloud in places:
            found = right(uri, cloud, endpoints=endpoints)
            if found is not None:
                yield found
