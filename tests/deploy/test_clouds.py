"""A cloud is one folder: made-up ones are planned on, and what they lack is said in one line."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mistralctl import clouds, package_dir
from mistralctl.clouds import CanFirewall, CanList, HasBuckets, HasChecks, HasErrors, HasIdentity, HasImages, HasQuotas
from mistralctl.clouds.aws import api as aws
from mistralctl.clouds.aws import buckets as aws_buckets
from mistralctl.clouds.aws import quotas as aws_quotas
from mistralctl.clouds.azure import api as azure
from mistralctl.clouds.azure import buckets as azure_buckets
from mistralctl.clouds.azure import quotas as azure_quotas
from mistralctl.clouds.gcp import api as gcp
from mistralctl.clouds.gcp import buckets as gcp_buckets
from mistralctl.clouds.gcp import quotas as gcp_quotas

Run = Callable[..., subprocess.CompletedProcess[str]]

# The type checker compares each module with the protocols.
LISTS: tuple[CanList, ...] = (aws, gcp, azure)
FIREWALLS: tuple[CanFirewall, ...] = (aws, gcp, azure)
IDENTITIES: tuple[HasIdentity, ...] = (aws, gcp, azure)
CHECKS: tuple[HasChecks, ...] = (azure,)
QUOTAS: tuple[HasQuotas, ...] = (aws_quotas, gcp_quotas, azure_quotas)
BUCKETS: tuple[HasBuckets, ...] = (aws_buckets, gcp_buckets, azure_buckets)
FILES = {
    "images": (HasImages,), "buckets": (HasBuckets,), "errors": (HasErrors,), "quotas": (HasQuotas,),
    "api": (CanList, CanFirewall, HasIdentity, HasChecks),
}  # fmt: skip

FACTS = """
from mistralctl.clouds import Cloud

CLOUD = Cloud(
    name="{name}",
    title="{title}",
    regions=frozenset(("north", "south")),
    zone=None,
    sign_in="{name} login",
    page="https://{name}.example/sign-in",
    package="skypilot[{name}]",
)
"""
PRICES = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,SpotPrice,Region
small,,,4,16,0.08,0.02,north
large,L4,1,8,32,0.55,0.21,north
large,L4,1,8,32,0.51,,south
"""
LISTING = """
from mistralctl.clouds import Part


def ours(owner, name=None, within=None):
    return [Part("listed", "disk", "d-1", "north", "unused", "64 GiB", 0.0, {"mistralctl-name": "one"})]


def machines(owner, within):
    return []


def delete(parts):
    pass


def relabel(part, labels):
    pass
"""
# What the program `mistralctl` does, with one more folder in which clouds are looked for.
PROGRAM = """
import sys
from mistralctl import clouds
clouds.__path__.append(sys.argv.pop(1))
from mistralctl.runtime import sky
sky.refusal_of = lambda cloud, log: ""
from mistralctl.cli import main
main()
"""


def write(folder: Path, files: dict[str, str]) -> list[Path]:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return sorted(folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `mistralctl ARGUMENT...` with the clouds of tmp_path/more besides its own."""
    home = tmp_path / "home"
    home.mkdir()

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "MISTRALCTL_OWNER": "tests", "COLUMNS": "200"}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "more"), *arguments]
        return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=600, check=False)

    return program


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture
def madeup(tmp_path: Path) -> list[Path]:
    """The files that a cloud needs which has facts and prices alone."""
    return write(tmp_path / "more" / "madeup", {"__init__.py": FACTS.format(name="madeup", title="Madeup"), "vms.csv": PRICES})


def test_a_cloud_is_one_folder_and_is_planned_on(madeup: list[Path], run: Run) -> None:
    assert [file.name for file in madeup] == ["__init__.py", "vms.csv"]
    assert len({file.parent for file in madeup}) == 1
    plan = json.loads(run("plan", "--cloud", "madeup", "-o", "json").stdout)
    [option] = plan["options"]
    assert (option["cloud"], option["instance_type"], option["region"], option["price"]) == ("madeup", "large", "south", 0.51)
    anywhere = json.loads(run("plan", "-o", "json").stdout)["options"]
    assert anywhere[0]["cloud"] == "madeup"
    assert {option["cloud"] for option in anywhere} > {"madeup", "gcp"}
    assert [row["cloud"] for row in json.loads(run("gpus", "-o", "json").stdout)["rows"]].count("madeup") == 1


def test_its_tasks_are_rendered(madeup: list[Path], run: Run) -> None:
    wanted = yaml.safe_load(run("up", "--cloud", "madeup", "--region", "north", "--dry-run").stdout)["resources"]
    assert {key: wanted.get(key) for key in ("infra", "accelerators", "image_id", "disk_tier")} == {
        "infra": "madeup/north", "accelerators": "L4:1", "image_id": None, "disk_tier": None,
    }  # fmt: skip
    small = yaml.safe_load(run("up", "smollm2-135m-instruct", "--cloud", "madeup", "--dry-run").stdout)["resources"]
    assert (small["infra"], small["cpus"], small["memory"]) == ("madeup", "2+", "8+")


def test_what_it_lacks_is_said_in_one_line(madeup: list[Path], run: Run) -> None:
    on = ("--cloud", "madeup")
    cannot_list = "mistralctl cannot list what runs on madeup; look in its console"
    assert one_line(run("reap", *on, "--dry-run")).endswith(f"madeup: {cannot_list}")
    public = run("plan", *on, "--public", "--allow", "203.0.113.0/24")
    assert one_line(public) == "mistralctl: --allow: mistralctl cannot set the firewall of madeup; leave out one of the two"
    assert one_line(run("plan", "--image", "madeup=x")).startswith(
        "mistralctl: --image: 'madeup' is not one of aws, gcp, azure; "
    )
    assert (
        one_line(run("plan", *on, "--region", "west")) == "mistralctl: --region: madeup has no region 'west'; one of north, south"
    )
    assert one_line(run("plan", *on, "--region", "north", "--zone", "a-1")).endswith("SkyPilot takes no zones on madeup")
    # What is unknown stops nothing.
    quotas = run("plan", *on, "--quota")
    assert quotas.returncode == 0
    assert "unknown: mistralctl knows no quotas there" in quotas.stdout
    weights = run("up", *on, "--weights", "s3://bucket/v01", "--dry-run")
    assert weights.returncode == 0
    assert "a Madeup node has no AWS identity; choose the bucket's own cloud" in one_line_of_notes(weights)
    doctor = {check["name"]: check for check in json.loads(run("doctor", *on, "-o", "json").stdout)["checks"]}
    assert doctor["identity on madeup"]["found"] == "mistralctl cannot ask madeup for an identity"
    assert doctor["machines on madeup"]["found"] == "enabled"
    assert doctor["credentials for madeup"]["mend"] == "madeup login"
    assert doctor["skypilot for madeup"]["mend"] == "pip install 'skypilot[madeup]'"


def one_line_of_notes(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_where_no_cloud_is_named_allow_leaves_out_those_without_a_firewall(madeup: list[Path], run: Run) -> None:
    plan = json.loads(run("plan", "--public", "--allow", "203.0.113.0/24", "-o", "json").stdout)
    assert "madeup" not in {option["cloud"] for option in plan["options"]}


def test_a_cloud_that_can_only_be_listed_is_reaped(tmp_path: Path, run: Run) -> None:
    files = {"__init__.py": FACTS.format(name="listed", title="Listed"), "api.py": LISTING}
    assert len({file.parent for file in write(tmp_path / "more" / "listed", files)}) == 1
    found = run("reap", "--cloud", "listed", "--dry-run", "-o", "json")
    assert found.returncode == 0, found.stderr
    reaped = json.loads(found.stdout)
    assert [(one["cloud"], one["state"]) for one in reaped["clouds"]] == [("listed", "asked")]
    [disk] = reaped["parts"]
    assert (disk["id"], disk["due"], disk["per_day"]) == ("d-1", "its machine is gone", None)
    assert "firewall of listed" in one_line(run("plan", "--cloud", "listed", "--public", "--allow", "203.0.113.0/24"))
    assert "listed sells no machine with 1 GPUs in the snapshot" in one_line(run("plan", "--cloud", "listed"))


@pytest.mark.parametrize("cloud", clouds.names())
def test_what_each_cloud_can(cloud: str) -> None:
    can = {kind.__name__ for file, kinds in FILES.items() for kind in kinds if clouds._implementing(cloud, file, kind)}
    every = {kind.__name__ for kinds in FILES.values() for kind in kinds}
    assert can == (every if cloud == "azure" else every - {"HasChecks"})
    folder = Path(clouds.__file__).parent / cloud
    assert {file.name for file in folder.iterdir() if file.is_file()} == {
        "__init__.py",
        "vms.csv",
        *(f"{file}.py" for file in FILES),
    }


def test_nobody_else_names_a_cloud() -> None:
    package = Path(clouds.__file__).parent.parent
    for path in package.rglob("*.py"):
        if path.parent.name in clouds.names():
            continue
        named = [node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)]
        assert not set(clouds.names()) & {value for value in named if isinstance(value, str)}, path


def test_the_folder_of_a_cloud_names_its_roles() -> None:
    roles = package_dir("model").parent / "docs" / "roles"
    assert sorted(name for cloud in clouds.every() for name in cloud.roles) == sorted(file.name for file in roles.iterdir())
