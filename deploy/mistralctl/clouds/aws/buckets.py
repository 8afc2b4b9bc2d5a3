"""Buckets of S3, and what the role that SkyPilot 0.14 gives a node may do with them."""

from __future__ import annotations

import configparser
import contextlib
from collections.abc import Mapping
from pathlib import Path

from mistralctl.clouds import Bucket

BUCKET = Bucket(
    cloud="aws",
    vendor="AWS",
    scheme="s3",
    form="s3://BUCKET/PREFIX",
    read="s3:GetObject and s3:ListBucket on the bucket {bucket}",
    write="s3:PutObject, s3:DeleteObject, s3:GetObject and s3:ListBucket on the bucket {bucket}",
    variables=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    domains=(".amazonaws.com", ".amazonaws.com.cn"),
    has="yes",
    why="SkyPilot's role skypilot-v1 has AmazonS3FullAccess: every bucket of this account",
    mend="another account's bucket must name that role in its policy",
)


def endpoint(environ: Mapping[str, str]) -> str:
    """The server that this machine's settings name instead of AWS's; empty if none."""
    if environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return ""
    return next((environ[name] for name in BUCKET.variables if environ.get(name)), "") or _of_profile(environ)


def _of_profile(environ: Mapping[str, str]) -> str:
    """S3's endpoint by AWS's configuration file: of the profile's `services` section, else the profile's own."""
    parser = configparser.RawConfigParser(strict=False, default_section="")
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):  # AWS's own tools say what is wrong there
        parser.read(Path(environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser(), "utf-8")
    name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    profile = next((parser[section] for section in (f"profile {name}", name) if section in parser), None)
    if profile is None:
        return ""
    services = parser.get(f"services {profile.get('services', '')}", "s3", fallback="")
    of_s3 = (line.partition("=") for line in services.splitlines())
    ours = next((value.strip() for key, _, value in of_s3 if key.strip() == "endpoint_url"), "")
    return ours or profile.get("endpoint_url", "")
