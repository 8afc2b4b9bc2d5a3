"""Every byte of a set read and held against what was promised, in a folder or in a store."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import digests
from .address import parse
from .errors import Kind, WeightsError
from .events import Advanced, Begun, Report, silent
from .http_reader import readers
from .installed import Damage, damages, find
from .manifest import RANGE_BYTES, require_digest
from .patience import Patience
from .secrets import Secrets
from .source import look, renew
from .stores import Opening, open_store
from .transfer import Conditions, Transfer


@dataclass(frozen=True)
class Verify:
    """What to verify: a URI, or a folder of this machine; `digest` is what the set must have, if it is known."""

    where: str
    revision: str = ""
    secrets: Secrets = field(default_factory=Secrets)
    form: str = "auto"
    connections: int = 10
    digest: str = ""
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Verified:
    """`damages` is empty when nothing is wrong. `unproven` are files of which the store promises no more than the size.

    `digest` stands for names, sizes and sha256 of all files; empty where a store has no manifest.
    """

    where: str
    source: str
    files: tuple[str, ...]
    bytes: int
    damages: tuple[Damage, ...]
    unproven: tuple[str, ...]
    seconds: float
    digest: str = ""


def verify(request: Verify, report: Report = silent) -> Verified:
    """Reads everything. A manifest that is itself damaged is an error of its own."""
    begun = time.monotonic()
    if "://" not in request.where:
        return _folder(request, Path(request.where).expanduser().resolve(), begun, report)
    address = parse(request.where, request.revision)
    patience = request.patience
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), patience))
        source = look(store, address, request.form, patience, report)
        if source.manifest:
            require_digest(source.manifest, request.digest, str(address))
        elif request.digest:
            raise WeightsError(
                Kind.REFUSED, f"{address} has no manifest, so its digest is known only once it is pulled; verify the folder"
            )
        report(Begun("verify", len(source.wanted), source.size))
        conditions = Conditions(
            range_bytes=source.manifest.range_bytes if source.manifest else RANGE_BYTES,
            connections=request.connections,
            direct=False,
            patience=patience,
            new_reader=readers(store, patience, plain=False),
            renew=lambda wanted: renew(store, wanted, patience, report),
        )
        wrong = []
        for wanted in source.wanted:
            try:
                Transfer(conditions, report).run((wanted,))
            except WeightsError as error:
                if error.kind is not Kind.DAMAGED:
                    raise
                wrong.append(Damage(wanted.file.name, "content"))
    names = tuple(wanted.file.name for wanted in source.wanted)
    unproven = tuple(wanted.file.name for wanted in source.wanted if not digests.strongest(wanted.expected))
    origin = source.manifest.source if source.manifest else source.contents.source
    return Verified(
        str(address),
        origin,
        names,
        source.size,
        tuple(wrong),
        unproven,
        time.monotonic() - begun,
        source.manifest.digest if source.manifest else "",
    )


def _folder(request: Verify, folder: Path, begun: float, report: Report) -> Verified:
    installed = find(folder)
    if installed is None:
        raise WeightsError(Kind.NOT_FOUND, f"there is no set of weights in {folder}; check the path")
    manifest = installed.manifest
    require_digest(manifest, request.digest, str(folder))
    report(Begun("verify", len(manifest.files), manifest.size))
    wrong = damages(installed, full=True, advance=lambda size: report(Advanced(size)))
    names = tuple(file.name for file in manifest.files)
    return Verified(str(folder), manifest.source, names, manifest.size, wrong, (), time.monotonic() - begun, manifest.digest)
