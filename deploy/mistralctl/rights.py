"""The table of rights: what reading or writing a bucket needs, and whether a node's role on each cloud has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mistralctl.clouds import LOCAL

Has = Literal["yes", "grant", "no"]


@dataclass(frozen=True)
class Bucket:
    """A kind of bucket: the cloud whose identities it knows, and the rights that reading and mirroring to it need."""

    cloud: str
    vendor: str
    form: str
    read: str
    write: str


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


BUCKETS = {
    "s3": Bucket(
        "aws", "AWS", "s3://BUCKET/PREFIX",
        "s3:GetObject and s3:ListBucket on the bucket {bucket}",
        "s3:PutObject, s3:DeleteObject, s3:GetObject and s3:ListBucket on the bucket {bucket}",
    ),
    "gs": Bucket(
        "gcp", "Google", "gs://BUCKET/PREFIX",
        "storage.objects.get and storage.objects.list (roles/storage.objectViewer) on the bucket {bucket}",
        "storage.objects.create, delete, get and list (roles/storage.objectUser) on the bucket {bucket}",
    ),
    "az": Bucket(
        "azure", "Azure", "az://ACCOUNT/CONTAINER/PREFIX",
        "the role Storage Blob Data Reader on the container {bucket}",
        "the role Storage Blob Data Contributor on the container {bucket}",
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
        "the identity that SkyPilot makes is Contributor of its resource group, which does not open blobs",
        "az role assignment create --role '{role}' --assignee-object-id PRINCIPAL --scope CONTAINER",
    ),
}
NAMES = {"aws": "an AWS node", "gcp": "a GCP node", "azure": "an Azure node"}


def _bucket(scheme: str, rest: str) -> str:
    return "/".join(rest.split("/")[: 2 if scheme == "az" else 1])


def right(uri: str, cloud: str, *, write: bool = False) -> Right | None:
    """The right that a node on `cloud` needs for `uri`; None where no cloud's identity is asked (hub, wheel, folder)."""
    scheme, _, rest = uri.partition("://")
    bucket = BUCKETS.get(scheme)
    if bucket is None:
        return None
    needs = (bucket.write if write else bucket.read).format(bucket=_bucket(scheme, rest))
    if cloud == LOCAL:
        return Right(uri, cloud, "yes", needs, f"this machine's own {bucket.vendor} credentials are used", "")
    if cloud == bucket.cloud:
        has, why, mend = NODE_ROLES[cloud]
        role = "Storage Blob Data Contributor" if write else "Storage Blob Data Reader"
        return Right(uri, cloud, has, needs, why, mend.format(role=role))
    own = next(kind.form for kind in BUCKETS.values() if kind.cloud == cloud)
    mend = "choose the bucket's own cloud" if write else f"mistralctl weights mirror {uri} {own} --here"
    return Right(uri, cloud, "no", needs, f"{NAMES[cloud]} has no {bucket.vendor} identity", mend)


def rights(uris: Iterable[str], clouds: Iterable[str]) -> Iterator[Right]:
    """What nodes on these clouds need to read all of these; one entry for each pair."""
    places = tuple(dict.fromkeys(clouds))
    for uri in dict.fromkeys(uris):
        for cloud in places:
            found = right(uri, cloud)
            if found is not None:
                yield found
