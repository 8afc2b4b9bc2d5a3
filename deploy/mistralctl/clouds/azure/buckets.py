"""Containers of Azure Blob Storage, and what the identity that SkyPilot 0.14 makes for a node may do with them."""

from collections.abc import Mapping

from mistralctl.clouds import Bucket

BUCKET = Bucket(
    cloud="azure",
    vendor="Azure",
    scheme="az",
    form="az://ACCOUNT/CONTAINER/PREFIX",
    read="the role Storage Blob Data Reader on the container {bucket}",
    write="the role Storage Blob Data Contributor on the container {bucket}",
    variables=("AZURE_STORAGE_SERVICE_ENDPOINT",),
    domains=(".core.windows.net", ".core.chinacloudapi.cn", ".core.usgovcloudapi.net"),
    has="grant",
    why="the identity that SkyPilot makes for each machine is Contributor of its resource group, which does not open blobs",
    mend=(
        "name one of your own in ~/.sky/config.yaml (azure: remote_identity: ID) that is {role} of the container and Contributor of the "
        "subscription"
    ),
    parts=2,
    roles=("Storage Blob Data Reader", "Storage Blob Data Contributor"),
)


def endpoint(environ: Mapping[str, str]) -> str:
    """The server that this machine's settings name instead of Azure's; empty if none."""
    return environ.get(BUCKET.variables[0], "")
