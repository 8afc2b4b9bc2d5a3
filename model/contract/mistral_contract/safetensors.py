"""The header of a safetensors file: which tensors it holds, and whether the file is whole. Read by its first bytes, without a tensor."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass

LARGEST_HEADER = 100_000_000  # the format's own limit
LENGTH = 8  # bytes that say how long the header is
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


class Damaged(ValueError):
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
    if size < LENGTH or not 0 < length <= min(LARGEST_HEADER, size - LENGTH):
        raise Damaged(f"is cut short, or no safetensors file: it has {size} bytes")
    return LENGTH + length


def read(size: int, beginning: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file of `size` bytes by its beginning, which holds the header; Damaged if the file is not whole."""
    end = header_end(size, beginning)
    found = {}
    try:
        data = json.loads(beginning[LENGTH:end].decode("utf-8"))
        data.pop("__metadata__", None)
        for name, facts in data.items():
            start, stop = (end + operator.index(offset) for offset in facts["data_offsets"])
            shape = tuple(map(operator.index, facts["shape"]))
            if start > stop or any(count < 0 for count in shape):
                raise ValueError(f"{name} has the shape {list(shape)} and {stop - start} bytes")
            found[name] = Tensor(str(facts["dtype"]), shape, start, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"has a header that cannot be read ({error!r})") from None
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        width = (FLOATS | OTHERS).get(tensor.dtype)
        if tensor.start != end or (width and tensor.stop - tensor.start != width * math.prod(tensor.shape)):
            raise Damaged(f"has a header that does not fit the tensor {name}")
        end = tensor.stop
    if end != size:
        raise Damaged(f"has {size} bytes, and by its header {end}")
    return found
