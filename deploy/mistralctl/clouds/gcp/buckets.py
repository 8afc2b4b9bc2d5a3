"""Buckets of Google Cloud Storage, and what the service account that SkyPilot 0.14 gives a node may do with them."""

from collections.abc import Mapping

from mistralctl.clouds import Bucket

BUCKET = Bucket(
    cloud="gcp",
    vendor="Google",
    scheme="gs",
    form="gs://BUCKET/PREFIX",
    read="storage.objects.get and storage.objects.list (roles/storage.objectViewer) on the bucket {bucket}",
    write="storage.objects.create, delete, get and list (roles/storage.objectUser) on the bucket {bucket}",
    variables=("STORAGE_EMULATOR_HOST",),
    domains=(".googleapis.com",),
    has="yes",
    why="SkyPilot's service account skypilot-v1 has roles/storage.admin: every bucket of this project",
    mend="another project's bucket must grant it to that account",
)


def endpoint(environ: Mapping[str, str]) -> str:
    """The server that this machine's settings name instead of Google's; empty if none."""
    return environ.get(BUCKET.variables[0], "")
