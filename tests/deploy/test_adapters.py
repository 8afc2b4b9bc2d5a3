"""Adapters on the laptop: folders travel, and what cannot be served is refused before anything is rented."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from mistralctl import adapters
from mistralctl.errors import Exit, UserError

AWS = ("up", "--cloud", "aws", "--dry-run")


def adapter(
    folder: Path, *, hidden: int = 4096, layer: int = 31, prefix: str = "base_model.model.", rank: int = 8, **config: Any
) -> Path:
    """An adapter of zeros for q_proj of one layer of Mistral 7B, in PEFT's format."""
    folder.mkdir(parents=True)
    name = f"{prefix}model.layers.{layer}.self_attn.q_proj.lora_"
    header, at = {}, 0
    for side, shape in (("A", [rank, hidden]), ("B", [hidden, rank])):
        size = 2 * rank * hidden
        header[f"{name}{side}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * at)
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def task(run: Run, *arguments: str) -> dict[str, Any]:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def test_folders_travel_with_the_task_under_the_adapters_name(mistralctl: Run, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "lr=1e-4,r=8"), adapter(tmp_path / "cwd" / "b")
    got = task(mistralctl, *AWS, "--lora", f"a=file://{first}", "--lora", "b=./b", "--lora", "c=s3://bucket/c")
    run_dir = "~/.mistralctl/run/mistral-7b-instruct-v0-1"
    assert json.loads(got["envs"]["MISTRALCTL_LORA"]) == {
        "a": f"file://{run_dir}/adapters/a", "b": f"file://{run_dir}/adapters/b", "c": "s3://bucket/c",
    }  # fmt: skip
    assert got["file_mounts"][f"{run_dir}/adapters/a"] == str(first)
    assert got["file_mounts"][f"{run_dir}/adapters/b"] == str(second)
    assert len(got["file_mounts"]) == 3


def test_a_folder_below_the_home_folder(mistralctl: Run, home: Path) -> None:
    folder = adapter(home / "b")
    assert str(folder) in task(mistralctl, *AWS, "--lora", "b=~/b")["file_mounts"].values()


def test_on_this_machine_folders_stay_where_they_are(mistralctl: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a@b", hidden=576, layer=29)
    got = task(mistralctl, "up", "smollm2-135m-instruct", "--cloud", "local", "--dry-run", "--lora", f"a={folder}")
    assert json.loads(got["envs"]["MISTRALCTL_LORA"]) == {"a": f"file://{tmp_path}/a%40b"}
    assert len(got["file_mounts"]) == 1


def test_a_retrained_adapter_in_the_same_folder_is_another_deployment(mistralctl: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    before = task(mistralctl, *AWS, "--lora", f"a={folder}")["envs"]
    assert task(mistralctl, *AWS, "--lora", f"a={folder}")["envs"] == before
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-1] + b"\1")
    after = task(mistralctl, *AWS, "--lora", f"a={folder}")["envs"]
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"MISTRALCTL_LORA_VERSIONS", "MISTRALCTL_SERVING_ID"}


def test_what_a_store_holds_is_as_the_last_up_saw_it_until_another_uri_is_given() -> None:
    before = {"MISTRALCTL_LORA": '{"a": "s3://b/a", "b": "s3://b/b"}', "MISTRALCTL_LORA_VERSIONS": '{"a": "1", "b": "2"}'}
    assert adapters.versions({"a": "s3://b/a", "b": "s3://b/other", "c": "s3://b/c"}, before) == {"a": "1", "b": "", "c": ""}
    assert adapters.versions({"a": "s3://b/a"}, {}) == {"a": ""}


REFUSED = [
    ({"peft_type": "IA3"}, "its peft_type is IA3 and vLLM serves LORA only"),
    ({"r": 1024}, "its rank is 1024 and vLLM takes at most 512"),
    ({"rank_pattern": {"v_proj": 1024}}, "its rank is 1024"),
    ({"use_dora": True}, "it uses DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
    (
        {"hidden": 3584},
        "q_proj takes 4096 and gives 4096 in this model, 3584 and 3584 in the adapter; it is another model's adapter",
    ),
    ({"layer": 32}, "it adapts layer 32 and the model has 32 layers"),
    ({"prefix": "base_model.model.language_model."}, "fit no module of the model"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=[says for _, says in REFUSED])
@pytest.mark.parametrize("cloud", ["aws", "local"])
def test_an_adapter_that_cannot_be_served_is_refused_here(
    change: dict[str, Any], says: str, cloud: str, mistralctl: Run, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a", **change)
    done = mistralctl("plan", "mistral-7b-instruct-v0.1", "--cloud", cloud, "--lora", f"a={folder}")
    assert done.returncode == Exit.WEIGHTS
    assert done.stderr.startswith(f"mistralctl: --lora a: {folder}: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", ["file:///nowhere", "./nowhere", "~/nowhere"])
def test_a_missing_folder(given: str, mistralctl: Run) -> None:
    done = mistralctl(*AWS, "--lora", f"a={given}")
    assert done.returncode == Exit.NOT_FOUND
    assert "nowhere is not a folder; name a folder with adapter_config.json" in done.stderr


def test_an_adapter_may_not_have_the_models_own_name_in_the_api(mistralctl: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    done = mistralctl(*AWS, "--served-model-name", "m", "--lora", f"m={folder}")
    assert (done.returncode, "the model itself has this name" in done.stderr) == (Exit.USAGE, True)


def test_a_folder_is_judged_once_it_is_read(tmp_path: Path) -> None:
    from mistralctl import checkpoints
    from mistralctl.config import load

    (tmp_path / "empty").mkdir()
    sourced = load({"lora": {"a": str(tmp_path / "empty")}}, {}, None, tmp_path)
    with pytest.raises(UserError, match=r"it has no adapter_config.json"):
        adapters.resolve(sourced, checkpoints.resolve(sourced))


@pytest.mark.parametrize(
    ("base", "revision", "says"),
    [
        ("mistralai/Mistral-7B-v0.1", "", "it was trained on mistralai/Mistral-7B-v0.1, and this is mistralai/Mistral-7B-Instruct-v0.1; serve it "),
        ("smollm2-135m-instruct", "", "it was trained on smollm2-135m-instruct, and this is mistralai/Mistral-7B-Instruct-v0.1; serve it "),
        ("mistralai/Mistral-7B-Instruct-v0.1", "f" * 40, f"it was trained on commit {'f' * 40} of mistralai/Mistral-7B-Instruct-v0.1, and "),
        ("mistralai/mistral-7b-instruct-v0.1", "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca", ""),
        ("mistralai/Mistral-7B-Instruct-v0.1", None, ""),
        ("/home/me/models/base", "", ""),
        (None, None, ""),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_model_is_refused(
    mistralctl: Run, tmp_path: Path, base: str, revision: str, says: str
) -> None:
    folder = adapter(tmp_path / "a", base_model_name_or_path=base, revision=revision)
    done = mistralctl(*AWS, "--lora", f"a={folder}")
    assert (done.returncode, says in done.stderr) == (Exit.WEIGHTS if says else 0, True), done.stderr
