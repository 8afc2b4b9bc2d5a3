"""A real S3 server (seaweedfs) for weights; it knows the laptop and the role that nodes have, and nobody else."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

SCHEME = "s3"
PORT = 8333
ENDPOINT = f"http://127.0.0.1:{PORT}"
LAPTOP = {"accessKey": "laptop-key", "secretKey": "laptop-secret"}
SESSION = ""  # a real role has a session token; seaweedfs would look it up with its own STS, which did not make it
ROLE = {"accessKey": "role-key", "secretKey": "role-secret"}
# The laptop may do anything; a node's role reads and lists, and writes what it is told to mirror.
IDENTITIES = {
    "identities": [
        {"name": "laptop", "credentials": [LAPTOP], "actions": ["Admin", "Read", "List", "Tagging", "Write"]},
        {"name": "role", "credentials": [ROLE], "actions": ["Read", "List", "Write"]},
    ]
}


def command(folder: Path) -> list[str]:
    """The server's command line; its data lie in `folder`."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "identities.json"
    config.write_text(json.dumps(IDENTITIES))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    return [
        weed, "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.port={PORT}",
        f"-s3.config={config}", "-master.volumeSizeLimitMB=1024", "-volume.max=16", "-master.port=9333", "-volume.port=9340",
        "-filer.port=9350", "-master.telemetry=false", "-volume.index=memory", "-s3.port.iceberg=0",
    ]  # fmt: skip


def put(folder: Path, url: str) -> int:
    """Uploads every file below a folder, making the bucket first; says how many."""
    import boto3

    where = urlsplit(url)
    client = boto3.client(
        "s3", endpoint_url=ENDPOINT, region_name="us-east-1",
        aws_access_key_id=LAPTOP["accessKey"], aws_secret_access_key=LAPTOP["secretKey"],
    )  # fmt: skip
    if where.netloc not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=where.netloc)
    count = 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = "/".join(part for part in (where.path.strip("/"), path.relative_to(folder).as_posix()) if part)
            client.upload_file(str(path), where.netloc, key)
            count += 1
    return count
