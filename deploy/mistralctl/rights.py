"""The table of rights: what reading or writing a bucket needs, and whether a node's role on each cloud has it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from mistralctl.clouds import LOCAL

Has = Literal["yes", "grant", "no"]


@dataclass(frozen=True)
class Bucket:
    """A kind of bucket: the cloud whose identities it knows, and the rights that reading and mirroring to it need.

    `variables` name another server than the cloud's in this machine's environment, the one that counts first; `domains` are the cloud's.
    """

    cloud: str
    vendor: str
    form: str
    read: str
    write: str
    variables: tuple[str, ...]
    domains: tuple[str, ...]


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


BUCKETS = {
    "s3": Bucket(
        "aws", "AWS", "s3://BUCKET/PREFIX",
        "s3:GetObject and s3:ListBucket on the bucket {bucket}",
        "s3:PutObject, s3:DeleteObject, s3:GetObject and s3:ListBucket on the bucket {bucket}",
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), (".amazonaws.com", ".amazonaws.com.cn"),
    ),
    "gs": Bucket(
        "gcp", "Google", "gs://BUCKET/PREFIX",
        "storage.objects.get and storage.objects.list (roles/storage.objectViewer) on the bucket {bucket}",
        "storage.objects.create, delete, get and list (roles/storage.objectUser) on the bucket {bucket}",
        ("STORAGE_EMULATOR_HOST",), (".googleapis.com",),
    ),
    "az": Bucket(
        "azure", "Azure", "az://ACCOUNT/CONTAINER/PREFIX",
        "the role Storage Blob Data Reader on the container {bucket}",
        "the role Storage Blob Data Contributor on the container {bucket}",
        ("AZURE_STORAGE_SERVICE_ENDPOINT",), (".core.windows.net", ".core.chinacloudapi.cn", ".core.usgovcloudapi.net"),
    ),
}  # fmt: skip

# What the identity that SkyPilot 0.14 gives a node may do with buckets of its own cloud.
NODE_ROLES: dict[str, tuple[Has, str, str]] = {
    "aws": (
        "yes",
        "SkyPilot's role skypilot-v1 has AmazonS3FullAccess: every bucket of this account",
        "another account's bucket must name that role in its policy",
    ),
    "gcp": (
        "yes",
        "SkyPilot's service account skypilot-v1 has roles/storage.admin: every bucket of this project",
        "another project's bucket must grant it to that account",
    ),
    "azure": (
        "grant",
        "the identity that SkyPilot makes for each machine is Contributor of its resource group, which does not open blobs",
        "name one of your own in ~/.sky/config.yaml (azure: remote_identity: ID) that is {role} of the container and Contributor of the "
        "subscription",
    ),
}
NAMES = {"aws": "an AWS node", "gcp": "a GCP node", "azure": "an Azure node"}


def _bucket(scheme: str, rest: str) -> str:
    return "/".join(rest.split("/")[: 2 if scheme == "az" else 1])


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
    bucket = BUCKETS.get(scheme)
    if bucket is None:
        return None
    needs = (bucket.write if write else bucket.read).format(bucket=_bucket(scheme, rest))
    if cloud == LOCAL:
        return Right(uri, cloud, "yes", needs, f"this machine's own {bucket.vendor} credentials are used", "")
    if cloud == bucket.cloud:
        endpoint = (endpoints or {}).get(bucket.variables[0], "")
        has, why, mend = (endpoint and _foreign(endpoint, bucket)) or NODE_ROLES[cloud]
        role = "Storage Blob Data Contributor" if write else "Storage Blob Data Reader"
        return Right(uri, cloud, has, needs, why, mend.format(role=role))
    own = next(kind.form for kind in BUCKETS.values() if kind.cloud == cloud)
    mend = "choose the bucket's own cloud" if write else f"mistralctl weights mirror {uri} {own} --here"
    return Right(uri, cloud, "no", needs, f"{NAMES[cloud]} has no {bucket.vendor} identity", mend)


def rights(uris: Iterable[str], clouds: Iterable[str], endpoints: Mapping[str, str] | None = None) -> Iterator[Right]:
    """What nodes on these clouds need to read all of these; one entry for each pair."""
    places = tuple(dict.fromkeys(clouds))
    for uri in dict.fromkeys(uris):
        for cloud in places:
            found = right(uri, cloud, endpoints=endpoints)
            if found is not None:
                yield found
