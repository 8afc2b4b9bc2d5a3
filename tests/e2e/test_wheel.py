"""The wheel, installed in a clean environment away from the checkout, does the main job too."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mistralctl import package_dir
from running import LITTLE, MODEL, Cli, down, share_node

UV = Path(sys.executable).parent / "uv"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    checkout = package_dir("model").parent
    subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", folder, checkout], check=True, timeout=300)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    folder = tmp_path_factory.mktemp("clean")
    python = folder / "venv" / "bin" / "python"
    constraints = package_dir("model").parent / "constraints.txt"
    subprocess.run([UV, "venv", "--quiet", folder / "venv"], check=True, timeout=600)
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, "-c", constraints, wheel], check=True, timeout=600)
    cli = Cli(share_node(folder / "home"), [str(python.parent / "mistralctl")])
    yield cli
    down(cli)


def test_it_carries_what_a_node_needs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "docs/roles/aws.json", "task_templates/serve.yaml", "task_templates/mirror.yaml", "model/node/setup.sh", "model/node/mirror.sh",
        "model/plugin/vllm_mistral/model.py", "model/node/mistral_node/serve.py", "clouds/aws/vms.csv",
        "model/weights/mistral_weights/pull.py", "model/chats/mistral_chats/chats.py",
        "model/node/vllm-cpu/shim/pyproject.toml", "mistralctl.schema.json",
    ):  # fmt: skip
        assert f"mistralctl/{needed}" in names
    assert not [name for name in names if "__pycache__" in name or "/.venv" in name or "tests/" in name]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mistralctl"}


def test_it_renders_the_same_task_as_the_checkout(installed: Cli) -> None:
    installed.env["MISTRALCTL_OWNER"] = "tests"
    own = Cli(installed.home, [sys.executable, "-m", "mistralctl"], MISTRALCTL_OWNER="tests")
    for cloud in ("aws", "gcp", "azure"):
        ours, theirs = (yaml.safe_load(cli("up", "--cloud", cloud, "--dry-run").stdout) for cli in (own, installed))
        [mount] = theirs["file_mounts"].values()
        assert Path(mount).is_dir()
        assert "site-packages" in mount
        theirs["file_mounts"] = ours["file_mounts"]
        assert theirs == ours


def test_its_weights_tool_is_the_one_that_it_carries(installed: Cli, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"x" * 5000)
    (source / "config.json").write_text("{}")
    installed("weights", "mirror", f"file://{source}", f"file://{tmp_path}/target", "--here")
    proven, digest = installed("weights", "verify", f"{tmp_path}/target").stdout.splitlines()
    assert proven.endswith(": 2 of 2 files proven, 5,002 bytes read")
    assert digest.startswith("digest sha256:")
    error = installed("weights", "ls", "s3://bucket/x", code=6).stderr
    assert error == "mistralctl: s3:// needs the package botocore; pip install 'mistralctl[aws]'\n"


def test_its_reader_of_chats_is_the_one_that_it_carries_and_tokens_need_an_extra(installed: Cli, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"instruction": "Why?", "output": "So."}')
    code = (
        "import sys; from mistralctl import chats; found = chats.read_chats(sys.argv[1])\n"
        "print(found.format_name, sys.modules['mistral_chats'].__file__)\n"
        "try: chats.counted(found, sys.argv[2], 'mistral')\n"
        "except chats.UserError as error: print(error)\n"
    )
    python = Path(installed.command[0]).parent / "python"
    done = subprocess.run([python, "-c", code, file, tmp_path], capture_output=True, text=True, check=True, timeout=600)
    found, refused = done.stdout.splitlines()
    assert found.startswith(f"Alpaca {python.parents[1]}/lib/")
    assert found.endswith("/site-packages/mistralctl/model/chats/mistral_chats/__init__.py")
    assert refused == "counting tokens needs the package mistral_common; pip install 'mistralctl[finetune]'"


def test_it_serves_on_this_machine(installed: Cli) -> None:
    result = installed.json("up", MODEL, *LITTLE, "--cloud", "local", "--name", "wheel")
    assert "Paris" in result["answer"]
    [status] = installed.json("status", "wheel")
    assert status["launcher"]["engine"]["class"] == "vllm_mistral.model.MistralSWAForCausalLM"
    installed("down", "wheel")
    assert installed.processes() == []
