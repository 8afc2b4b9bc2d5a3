"""What a set of weights is, by its listing, its small files and the headers of its tensors: judged before a byte of it is pulled."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import names
from .address import parse
from .errors import Kind, WeightsError
from .events import Report, silent
from .patience import Patience
from .secrets import Secrets
from .source import beginning, look
from .stores import Opening, StoredFile, open_store

LARGEST_DOCUMENT = 4 * 2**20
BEGINNING = 4096  # of a document that is larger: tekken.json has its version there
FIRST_READ = 256 * 1024
LARGEST_HEADER = 100 * 10**6  # the format's own limit
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
DOCUMENTS = (
    "config.json", "params.json", "adapter_config.json", "tokenizer_config.json", "tekken.json", "quantize_config.json", "quant_config.json",
    "hf_quant_config.json",
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

    `documents` are its small files by name (of a large one only the beginning). `floats` counts the numbers of all tensors of 16, 32 or
    64 bits, `fixed` the bytes of the others; both are 0 for GGUF.
    """

    uri: str
    source: str
    revision: str
    license: str
    form: str
    files: Mapping[str, int]
    documents: Mapping[str, bytes]
    floats: int
    fixed: int

    @property
    def bytes(self) -> int:
        """What a pull brings."""
        return sum(self.files.values())


def describe(request: Describe, report: Report = silent) -> Described:
    """Looks at a set; WeightsError where it is damaged, incomplete or a form that nothing can serve."""
    address = parse(request.uri, request.revision)
    ends = time.monotonic() + request.seconds
    with tempfile.TemporaryDirectory(prefix="mistral-weights-") as scratch:
        store = open_store(address, Opening(request.secrets, Path(scratch), request.patience))
        source = look(store, address, request.form, request.patience, report)
        files = {one.file.name: one.file for one in source.wanted}

        def read(file: StoredFile, size: int) -> bytes:
            if time.monotonic() > ends:
                raise WeightsError(Kind.UNREACHABLE, f"{address} could not be read in {request.seconds:g} s; check the network")
            return beginning(store, file, size, request.patience, report)

        small = [files[name] for name in DOCUMENTS if name in files]
        tensors = [file for name, file in files.items() if name.endswith(".safetensors")]
        with ThreadPoolExecutor(max_workers=8) as workers:
            documents = list(
                workers.map(lambda file: read(file, LARGEST_DOCUMENT if file.size <= LARGEST_DOCUMENT else BEGINNING), small)
            )
            counts = list(workers.map(lambda file: _tensors(str(address), file, read), tensors))
    manifest = source.manifest
    return Described(
        uri=str(address),
        source=manifest.source if manifest else source.contents.source,
        revision=manifest.revision if manifest else source.contents.revision,
        license=manifest.license if manifest else source.contents.license,
        form=next((kind for kind in map(names.kind_of, files) if kind in names.FORMATS), ""),
        files={name: file.size for name, file in files.items()},
        documents={file.name: data for file, data in zip(small, documents, strict=True)},
        floats=sum(count[0] for count in counts),
        fixed=sum(count[1] for count in counts),
    )


def _tensors(where: str, file: StoredFile, read: Callable[[StoredFile, int], bytes]) -> tuple[int, int]:
    """(numbers of floats, bytes of all other tensors) by the header of a safetensors file; WeightsError if the file is not whole."""

    def damaged(why: str) -> WeightsError:
        return WeightsError(Kind.DAMAGED, f"{file.name} at {where} {why}; take a whole copy")

    data = read(file, FIRST_READ)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > LARGEST_HEADER or 8 + length > file.size:
        raise damaged(f"is cut short, or no safetensors file: it has {file.size} bytes")
    if 8 + length > len(data):
        data = read(file, 8 + length)
    floats = fixed = end = 0
    try:
        header = json.loads(data[8 : 8 + length])
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, stop = map(int, tensor["data_offsets"])
            if not 0 <= start <= stop:
                raise ValueError
            width = FLOATS.get(tensor["dtype"])
            floats, fixed = (floats + (stop - start) // width, fixed) if width else (floats, fixed + stop - start)
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged("has a header that cannot be read") from None
    if 8 + length + end != file.size:
        raise damaged(f"has {file.size} bytes, and by its header {8 + length + end}")
    return floats, fixed
