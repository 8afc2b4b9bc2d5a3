"""The header of a safetensors file: which tensors it holds, and whether the file is whole. Read by its first bytes, without a tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from mistral_contract import untrusted

LARGEST_HEADER = 32 << 20  # the format's own limit is 100 MB; 4096 layers, quantized, take 17
MOST_DIMENSIONS, LARGEST_DIMENSION = 8, 1 << 48
LENGTH = 8  # bytes that say how long the header is
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


class Damaged(untrusted.Refusal):
    """What is wrong with a file, to be said after its name."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file; `start` and `stop` are where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_end(size: int, beginning: bytes) -> int:
    """Return where the header ends in a file of `size` bytes that begins so; Damaged if it ends nowhere."""
    length = int.from_bytes(beginning[:LENGTH], "little")
    if min(LARGEST_HEADER, size) < length <= size - LENGTH:
        raise Damaged(f"has a header of {length} bytes, and at most {LARGEST_HEADER} are read")
    if size < LENGTH or not 0 < length <= min(LARGEST_HEADER, size - LENGTH):
        raise Damaged(f"is cut short, or no safetensors file: it has {size} bytes")
    return LENGTH + length


def read(size: int, beginning: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file of `size` bytes by its beginning, which holds the header; Damaged if the file is not whole."""
    end = header_end(size, beginning)
    try:
        data = untrusted.read(beginning[LENGTH:end], LARGEST_HEADER)
        data.pop("__metadata__", None)
        found = {name: _tensor(name, facts, end) for name, facts in data.items()}
    except untrusted.NotRead as error:
        raise Damaged(f"has a header that cannot be read: {error}") from None
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        width = (FLOATS | OTHERS).get(tensor.dtype)
        if tensor.start != end or (width and tensor.stop - tensor.start != width * math.prod(tensor.shape)):
            raise Damaged(f"has a header that does not fit the tensor {name}")
        end = tensor.stop
    if end != size:
        raise Damaged(f"has {size} bytes, and by its header {end}")
    return found


def _tensor(name: str, facts: Any, end: int) -> Tensor:
    """Return a tensor by its entry in a header that ends at `end`; Damaged if that describes none."""
    entry = facts if isinstance(facts, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or not re.fullmatch("[A-Z0-9_]{1,16}", dtype):
        raise Damaged(f"has a header that cannot be read: {name} has no dtype")
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Damaged(f"has a header that cannot be read: {name} is of {entry.get('shape')!r} at {entry.get('data_offsets')!r}")
    return Tensor(dtype, shape, end + offsets[0], end + offsets[1])


def _counts(value: Any) -> tuple[int, ...] | None:
    """Return a list of a header as dimensions or offsets; None if it is no list of them."""
    good = (
        isinstance(value, list)
        and len(value) <= MOST_DIMENSIONS
        and all(type(n) is int and 0 <= n <= LARGEST_DIMENSION for n in value)
    )
    return tuple(value) if good else None
