"""The manifest `mistral-weights.json`: every file of a set with its size and checksums."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from mistral_contract import sets, untrusted

from .digests import blake3_of
from .errors import Kind, WeightsError
from .names import LARGEST_INDEX, check, no_twins

SCHEMA = 1
RANGE_BYTES = 8 * 2**20
LEAST_RANGE_BYTES, MOST_RANGE_BYTES = 4096, 64 * 2**20
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ManifestFile:
    """One file: size in bytes, checksums of the whole, and the blake3 of each range of `Manifest.range_bytes`.

    `checked_by` says which promise of the first source the bytes were held against; `size` when it promised no more.
    """

    name: str
    size: int
    sha256: str
    blake3: str
    ranges: tuple[str, ...]
    checked_by: str


@dataclass(frozen=True)
class Manifest:
    """A whole set. `source` is where it was first taken from, `created_at` is UTC (ISO 8601)."""

    source: str
    revision: str
    license: str
    created_at: str
    range_bytes: int
    files: tuple[ManifestFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """`sha256:...` of the names, sizes and sha256 of all files: what pins a set, wherever it lies."""
        return sets.digest(sets.File(file.name, file.size, file.sha256) for file in self.files)

    def file(self, name: str) -> ManifestFile | None:
        return next((file for file in self.files if file.name == name), None)


def render(manifest: Manifest) -> bytes:
    """The manifest as JSON; its last field is the blake3 of all before it, so that a damaged manifest shows."""
    body: dict[str, Any] = {"schema": SCHEMA, **asdict(manifest)}
    body["blake3"] = blake3_of(_text(body))
    return _text(body)


def read(data: bytes, where: str) -> Manifest:
    """The manifest in `data`, every field checked; any flipped bit in it is an error."""

    def broken(why: str) -> WeightsError:
        return WeightsError(Kind.DAMAGED, f"the manifest of {where} {why}; pull or mirror the set again")

    try:
        body = untrusted.read(data, LARGEST_INDEX)
        schema = body.pop("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise WeightsError(
                Kind.REFUSED, f"the manifest of {where} has schema {schema}, newer than ours; update mistral-weights"
            )
        body.pop("blake3")
        files = tuple(ManifestFile(**{**file, "ranges": tuple(file["ranges"])}) for file in body.pop("files"))
        manifest = Manifest(**body, files=files)
    except untrusted.NotRead as error:
        raise broken(f"cannot be read ({error})") from None
    except (KeyError, TypeError, AttributeError):
        raise broken("cannot be read") from None
    if not all(isinstance(file.name, str) for file in manifest.files):
        raise broken("is damaged")
    for file in manifest.files:
        check(file.name)
    no_twins(file.name for file in manifest.files)
    if not _well_formed(manifest) or render(manifest) != data:
        raise broken("is damaged")
    return manifest


def range_count(size: int, range_bytes: int) -> int:
    """How many ranges a file of `size` bytes has (an empty file has none)."""
    return -(-size // range_bytes)


def require_digest(manifest: Manifest, wanted: str, where: str) -> None:
    """WeightsError unless a set is the one that is wanted; any is where nothing is."""
    if wanted and manifest.digest != wanted:
        raise WeightsError(
            Kind.REFUSED,
            f"{where} holds weights with the digest {manifest.digest}, and {wanted} is pinned; if the other weights are meant, "
            f"say --weights-digest {manifest.digest}",
        )


def _text(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()


def _well_formed(manifest: Manifest) -> bool:
    texts = [getattr(manifest, field.name) for field in fields(manifest) if field.name not in ("range_bytes", "files")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(manifest.range_bytes, int):
        return False
    if not LEAST_RANGE_BYTES <= manifest.range_bytes <= MOST_RANGE_BYTES or manifest.range_bytes % 4096:
        return False
    names = [file.name for file in manifest.files]
    return len(names) == len(set(names)) and all(
        isinstance(file.size, int)
        and file.size >= 0
        and all(isinstance(one, str) and _HEX64.fullmatch(one) for one in (file.sha256, file.blake3, *file.ranges))
        and len(file.ranges) == range_count(file.size, manifest.range_bytes)
        for file in manifest.files
    )
