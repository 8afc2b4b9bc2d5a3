"""The mirror as a task: against golden files, as tests of `up` do it (`--golden` writes them anew)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from mistralctl import package_dir, tasks
from mistralctl.errors import Exit, UserError
from mistralctl.tasks import mirror

Run = Callable[..., CompletedProcess[str]]
GOLDEN = Path(__file__).parent / "golden"
HUB = "hf://mistralai/Mistral-7B-Instruct-v0.1"
CASES: dict[str, tuple[Any, ...]] = {
    "mirror-aws": ("mistral-7b-instruct-v0.1", "s3://bucket/v01", "", "us-east-1"),
    "mirror-gcp": (HUB, "gs://bucket/v01", "main"),
    "mirror-azure": ("s3://bucket/v01", "az://account/container/v01"),
    "mirror-canary": ("mistral-7b-instruct-v0.1", "s3://bucket/v01"),
}


def rendered(name: str) -> tasks.Task:
    return mirror.render(
        mirror.checked(replace(mirror.MirrorSpec(*CASES[name]), canary=name == "mirror-canary")), owner="0123456789ab"
    )


@pytest.mark.parametrize("name", CASES)
def test_rendered_mirror(name: str, request: pytest.FixtureRequest) -> None:
    text = tasks.dump(rendered(name)).replace(str(package_dir("model").parent), "PACKAGE")
    text = text.replace(tasks.environment_id("cpu", tasks.NODE_PYTHON), "cpu-HASH-OF-REQUIREMENTS")
    file = GOLDEN / f"{name}.yaml"
    if request.config.getoption("--golden"):
        file.write_text(text, "utf-8")
    assert text == file.read_text("utf-8")
    assert yaml.safe_load(tasks.dump(rendered(name))) == rendered(name)


def test_only_data_is_set_on_the_template() -> None:
    template = yaml.safe_load((package_dir("task_templates") / "mirror.yaml").read_text("utf-8"))
    got = rendered("mirror-aws")
    assert got.keys() == template.keys()
    assert (got["setup"], got["run"]) == (template["setup"], template["run"])
    assert got["envs"].keys() == template["envs"].keys()


def test_the_canarys_figures_take_a_larger_machine_with_torch() -> None:
    plain, canary = rendered("mirror-aws"), rendered("mirror-canary")
    assert (plain["resources"]["cpus"], plain["resources"]["memory"], plain["envs"]["MISTRALCTL_ENV_ID"]) == ("2+", "8+", "")
    assert (canary["resources"]["cpus"], canary["resources"]["memory"]) == ("8+", "16+")
    assert canary["envs"]["MISTRALCTL_ENV_ID"] == tasks.environment_id("cpu", tasks.NODE_PYTHON)
    assert canary["name"] != plain["name"]


def test_the_canary_here_wants_torch_before_anything_is_pulled(mistralctl: Run, home: Path) -> None:
    done = mistralctl("weights", "mirror", f"file://{home}/nowhere", f"file://{home}/target", "--here", "--canary")
    assert done.returncode == Exit.MACHINE
    assert done.stderr.startswith("mistralctl: --canary: torch is not here yet (")
    assert done.stderr.endswith(" is missing); make node, or any mistralctl up --cloud local, installs it\n")


def test_a_row_of_the_table_is_pinned_and_another_revision_wins() -> None:
    assert mirror.checked(mirror.MirrorSpec("mistral-7b-v0.1", "s3://b/x")) == mirror.MirrorSpec(
        "hf://mistralai/Mistral-7B-v0.1", "s3://b/x", "27d67f1b5f57dc0953326b2601d68371d40ea8da"
    )
    assert mirror.checked(mirror.MirrorSpec("mistral-7b-v0.1", "s3://b/x", "main")).revision == "main"


ERRORS: list[tuple[tuple[Any, ...], str]] = [
    (
        ("nowhere", "s3://b/x"),
        "SOURCE: 'nowhere' is not a URI; write for example hf://mistralai/Mistral-7B-v0.3 or s3://bucket/prefix",
    ),
    ((HUB, "s3://"), "TARGET: 's3://' is incomplete; it should be s3://bucket/prefix"),
    ((HUB, "hf://a/b"), "TARGET: weights cannot be written to hf://; name a bucket or a folder"),
    (("s3://b/x", "gs://b/x", "main"), "--revision: s3://b/x has no revisions; leave it out"),
    ((HUB, "file:///x", "", "us-east-1"), "--region: a folder is in no region; leave it out"),
]


@pytest.mark.parametrize(("arguments", "line"), ERRORS, ids=[line[:24] for _, line in ERRORS])
def test_what_cannot_be_mirrored(arguments: tuple[Any, ...], line: str) -> None:
    with pytest.raises(UserError) as error:
        mirror.checked(mirror.MirrorSpec(*arguments))
    assert (str(error.value), error.value.code) == (line, Exit.USAGE)


def test_a_region_of_another_cloud_is_named() -> None:
    with pytest.raises(UserError, match="--region: gcp has no region 'us-east-1'; one of "):
        mirror.checked(mirror.MirrorSpec(HUB, "gs://b/x", "", "us-east-1"))


def test_a_folder_of_this_machine_is_mirrored_here_only() -> None:
    for source, target in ((HUB, "file:///x"), ("file:///x", "s3://b/x")):
        with pytest.raises(UserError, match="is a folder of this machine; add --here"):
            mirror.render(mirror.checked(mirror.MirrorSpec(source, target)), owner="x")


def test_dry_run_prints_the_task_alone_and_the_same_bytes_every_time(mistralctl: Run, home: Path) -> None:
    command = ("weights", "mirror", HUB, "s3://bucket/v01", "--dry-run")
    first, second = (mistralctl(*command, HF_TOKEN="hf_marked", AWS_SECRET_ACCESS_KEY="marked") for _ in range(2))  # noqa: S106
    assert first.stdout == second.stdout
    assert (first.returncode, first.stderr) == (0, "")
    assert "marked" not in first.stdout
    assert yaml.safe_load(first.stdout)["resources"]["infra"] == "aws"
    assert not list(home.iterdir())


def test_terms_of_a_licence_are_noted(mistralctl: Run) -> None:
    done = mistralctl("weights", "mirror", "codestral-22b-v0.1", "s3://bucket/c", "--dry-run")
    assert done.stderr.startswith("note: terms of codestral-22b-v0.1: Mistral AI Non-Production License: ")
    assert mirror.MirrorSpec("hf://mistralai/Mistral-7B-v0.1", "s3://b/x").terms == ""


def test_a_right_that_the_machine_lacks_is_noted(mistralctl: Run) -> None:
    done = mistralctl("weights", "mirror", "s3://bucket/v01", "az://account/container/v01", "--dry-run")
    lines = done.stderr.splitlines()
    assert [line.split(":", 3)[2].split(" from ")[0] for line in lines] == ["//account/container/v01", "//bucket/v01"]
    assert "needs the role Storage Blob Data Contributor on the container account/container; MUST BE GIVEN IT" in lines[0]
    assert lines[1].endswith("an Azure node has no AWS identity; add --here: this machine's own credentials are used")
