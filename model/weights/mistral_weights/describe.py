"""What a set of weights is, by its listing, its small files and the headers of its tensors: read before a byte of it is pulled."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mistral_contract.safetensors import LARGEST_HEADER
from mistral_contract.untrusted import MOST_BYTES

from . import names
from .address import parse
from .errors import Kind, WeightsError
from .events import Report, silent
from .patience import Patience
from .secrets import Secrets
from .source import beginning, look
from .stores import Opening, StoredFile, open_store

BEGINNING = 4096  # of a document that is larger: tekken.json has its version there
FIRST_READ = 256 * 1024
GGUF_HEADER = 1 << 20
DOCUMENTS = (
    "config.json", "params.json", "adapter_config.json", "tokenizer_config.json", "tekken.json", "quantize_config.json", "quant_config.json",
    "hf_quant_config.json", "model.safetensors.index.json",
)  # fmt: skip


@dataclass(frozen=True)
class Describe:
    """Where to look, and for how many seconds at most."""

    uri: str
    revision: str = ""
    secrets: Secrets = field(default_factory=Secrets)
    form: str = "auto"
    patience: Patience = field(default_factory=Patience)
    seconds: float = 60.0


@dataclass(frozen=True)
class Described:
    """A set in a store. `files` is what a pull brings, by name and size.

    `documents` are its small files by name (of a large one only the beginning), `headers` the beginnings of its safetensors and GGUF
    files: of safetensors with the whole header, if the file is one. `digest` is that of its manifest, empty without one.
    """

    uri: str
    source: str
    revision: str
    license: str
    form: str
    files: Mapping[str, int]
    documents: Mapping[str, bytes]
    headers: Mapping[str, bytes]
    digest: str = ""

    @property
    def bytes(self) -> int:
        """What a pull brings."""
        return sum(self.files.values())


def describe(request: Describe, report: Report = silent) -> Described:
    """Looks at a set; WeightsError where it is incomplete or a form that nothing can serve."""
    address = parse(request.uri, request.revision)
    ends = time.monotonic() + request.seconds
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), request.patience, request.seconds))
        source = look(store, address, request.form, request.patience, report)
        files = {one.file.name: one.file for one in source.wanted}

        def read(file: StoredFile, size: int) -> bytes:
            if time.monotonic() > ends:
                raise WeightsError(Kind.UNREACHABLE, f"{address} could not be read in {request.seconds:g} s; check the network")
            return beginning(store, file, size, request.patience, report)

        small = [files[name] for name in DOCUMENTS if name in files]
        tensors = [file for name, file in files.items() if name.endswith((".safetensors", ".gguf"))]
        with ThreadPoolExecutor(max_workers=8) as workers:
            documents = list(workers.map(lambda file: read(file, MOST_BYTES if file.size <= MOST_BYTES else BEGINNING), small))
            headers = list(workers.map(lambda file: _header(file, read), tensors))
    manifest = source.manifest
    return Described(
        uri=str(address),
        source=manifest.source if manifest else source.contents.source,
        revision=manifest.revision if manifest else source.contents.revision,
        license=manifest.license if manifest else source.contents.license,
        form=next((kind for kind in map(names.kind_of, files) if kind in names.FORMATS), ""),
        files={name: file.size for name, file in files.items()},
        documents={file.name: data for file, data in zip(small, documents, strict=True)},
        headers={file.name: data for file, data in zip(tensors, headers, strict=True)},
        digest=manifest.digest if manifest else "",
    )


def _header(file: StoredFile, read: Callable[[StoredFile, int], bytes]) -> bytes:
    """The beginning of a file of tensors: of safetensors as far as its header goes."""
    if file.name.endswith(".gguf"):
        return read(file, GGUF_HEADER)
    data = read(file, FIRST_READ)
    end = 8 + int.from_bytes(data[:8], "little")
    return read(file, end) if len(data) < end <= min(LARGEST_HEADER, file.size) else data
