"""Write what vLLM's own parser says of the options of `vllm serve`: python vllm_options.py FILE (make vllm-options)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

# vLLM's converters of values, by name, and what mistral_contract.vllm_options calls them.
KINDS = {
    "str": "text", "int": "a whole number", "float": "a number", "loads": "JSON", "human_readable_int": "a size like 64k",
    "human_readable_int_or_auto": "a size like 64k, or auto", "union_dict_and_str": "a JSON object or text",
    "<lambda>": "text",
}  # fmt: skip


def inside(converter: Callable[[str], Any]) -> Any:
    """The converter that vLLM's `optional_type` or `parse_type` wraps."""
    return next(cell.cell_contents for cell in converter.__closure__ or () if callable(cell.cell_contents))


def key(hint: Any) -> list[Any] | str | None:
    """What a key of a configuration may have: a list of words, or a kind of value; None where it is neither."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):  # vLLM takes the names in any case, too
        return [*hint.__members__, *(item.value for item in hint if isinstance(item.value, int))]
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint)


def described(action: argparse.Action) -> dict[str, Any]:
    """One option: its names, the kind of its value, its choices; without a value where it is a switch."""
    found: dict[str, Any] = {"names": list(action.option_strings)}
    if action.nargs == 0:
        return found
    converter: Any = action.type or str
    if converter.__qualname__.startswith("optional_type."):
        found["optional"] = True
        converter = inside(converter)
    if converter.__qualname__.startswith("parse_type."):
        converter = inside(converter)
    if "parse_dataclass" in converter.__qualname__:
        [config] = converter.__defaults__
        found["kind"] = "a JSON object"
        found["keys"] = {item.name: key(item.type) for item in dataclasses.fields(config) if item.init}
    else:
        found["kind"] = KINDS[converter.__name__]
    if action.choices is not None:
        found["choices"] = [choice for choice in action.choices if choice is not None]
    if action.nargs == "?":
        found["bare"] = True
    return found


def options() -> dict[str, Any]:
    """Every option of `vllm serve` by vLLM's own parser, with vLLM's version."""
    import vllm
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    found = [described(action) for action in parser._actions if action.option_strings]
    return {"vllm": vllm.__version__.split("+")[0], "options": sorted(found, key=lambda option: option["names"])}


def written(found: dict[str, Any]) -> str:
    """As the file has it: an option a line."""
    lines = ",\n".join(json.dumps(option) for option in found["options"])
    return f'{{"vllm": {json.dumps(found["vllm"])}, "options": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(written(options()), "utf-8")
