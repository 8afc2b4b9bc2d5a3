"""Which server answers for a bucket, where this machine's own settings name another one than the cloud's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from mistralctl.clouds import bucket_files
from mistralctl.errors import UserError


def endpoints(uris: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The clouds' own variables that a node needs to read these as this machine does, by name; empty for the clouds themselves."""
    found, known = {}, {one.BUCKET.scheme: one for one in bucket_files()}
    for scheme in dict.fromkeys(uri.partition("://")[0] for uri in uris):
        if scheme in known and (url := known[scheme].endpoint(environ)):
            name = known[scheme].BUCKET.variables[0]
            if urlsplit(url).password:
                raise UserError(f"{name}: the address of a store may hold no password, as a node would get it; take it out")
            found[name] = url
    return found
