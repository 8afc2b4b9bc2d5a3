"""Which server answers for a bucket, where this machine's own settings name another one than the cloud's."""

from __future__ import annotations

import configparser
import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from mistralctl.errors import UserError
from mistralctl.rights import BUCKETS


def endpoints(uris: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The clouds' own variables that a node needs to read these as this machine does, by name; empty for the clouds themselves."""
    found = {}
    for scheme in dict.fromkeys(uri.partition("://")[0] for uri in uris):
        names = BUCKETS[scheme].variables if scheme in BUCKETS else ()
        url = next((environ[name] for name in names if environ.get(name)), "")
        if scheme == "s3":
            url = "" if environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true" else url or _of_profile(environ)
        if url:
            if urlsplit(url).password:
                raise UserError(f"{names[0]}: the address of a store may hold no password, as a node would get it; take it out")
            found[names[0]] = url
    return found


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
