"""Further options of `vllm serve` are judged without vLLM as vLLM's own parser judges them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm_options as written_from_vllm
from mistral_contract import vllm_options

DATA = Path(vllm_options.__file__).with_suffix(".json")
VALUES = (None, "", "x", "None", "auto", "0", "7", "-1", "1.5", "64k", "1.5K", "true", "True", "null", "{}", "[]", '{"x": 1}', '["x"]', "{x}",
          "fcfs", "nan")  # fmt: skip


@pytest.fixture(scope="module")
def takes() -> Callable[[str], bool]:
    """Whether vLLM's own parser takes an argument."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Quiet(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise argparse.ArgumentError(None, message)

    parser = make_arg_parser(Quiet(prog="vllm serve"))

    def ask(argument: str) -> bool:
        try:
            return parser.parse_args(["/model", argument]).model_tag == "/model"
        except (argparse.ArgumentError, ValueError, KeyError, IndexError):
            return False

    return ask


def passes(argument: str) -> bool:
    try:
        vllm_options.check([argument])
    except ValueError:
        return False
    return True


def test_the_data_are_what_vllms_parser_says_today() -> None:
    """After a change of vLLM: make vllm-options, then say of each new option whether it is open."""
    assert DATA.read_text("utf-8") == written_from_vllm.written(written_from_vllm.options())


def test_every_option_is_open_set_by_mistralctl_or_closed_for_a_reason() -> None:
    names = {
        next(name for name in option["names"] if name.startswith("--"))
        for option in json.loads(DATA.read_text("utf-8"))["options"]
    }
    disposed = [*vllm_options.SET, *vllm_options._reasons(), *(f"--{name}" for name in vllm_options.OPEN)]
    assert sorted(disposed) == sorted(names - {"--help"})
    assert not set(vllm_options.GONE) & names


@pytest.mark.parametrize("name", vllm_options.OPEN)
def test_a_value_passes_where_vllms_parser_takes_it(name: str, takes: Callable[[str], bool]) -> None:
    option = vllm_options._names()[f"--{name}"]
    values = [*VALUES, *option.get("choices", ())]
    arguments = [spelling if value is None else f"{spelling}={value}"
                 for spelling in option["names"] if spelling.startswith("--") for value in values]  # fmt: skip
    arguments += [f"--{name}.x=1", f"--{name.replace('-', '_')}=7", f"--{name.upper()}"]
    for key in set(option.get("keys", ())) - set(vllm_options.CLOSED_KEYS.get(f"--{name}", ())):
        arguments += [f"--{name}={json.dumps({key: value})}" for value in ("x", "3", 3, 1.5, True, "NONE")]
        arguments += [f"--{name}.{key}={value}" for value in ("x", "3", "true", "NONE")]
    differing = [argument for argument in arguments if passes(argument) and not takes(argument)]
    # Of keys that take more than a word, a number or a switch, vLLM alone judges the value.
    assert [
        item for item in differing if not any(f"{key}" in item for key, kind in option.get("keys", {}).items() if kind is None)
    ] == []
    refused = [argument for argument in arguments if takes(argument) and not passes(argument)]
    if f"--{name}" in vllm_options.BY_KEY:  # as a whole it is refused: vLLM would drop it beside mistralctl's key
        assert f"--{name}={{}}" in refused
        refused = [argument for argument in refused if not argument.startswith(f"--{name}=")]
    assert refused == []


def test_the_beginning_of_a_name_means_what_vllms_parser_means_by_it(takes: Callable[[str], bool]) -> None:
    switches = [option["names"][0] for option in vllm_options._data()["options"] if "kind" not in option]
    for name in (name for name in switches if name.removeprefix("--") in vllm_options.OPEN):
        for end in range(3, len(name) + 1):
            assert passes(name[:end]) <= takes(name[:end]), name[:end]
            own = [found for found in vllm_options._names() if found.startswith(name[:end])]
            assert passes(name[:end]) >= (takes(name[:end]) and own == [name]), name[:end]
