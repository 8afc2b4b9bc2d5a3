"""Buckets that another server than the cloud's answers for: what a node is told, and what the plan says about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from mistralctl import package_dir
from mistralctl.clouds import buckets, names
from mistralctl.errors import UserError
from mistralctl.rights import right
from mistralctl.stores import endpoints

Run = Callable[..., CompletedProcess[str]]
S3 = ["s3://bucket/v03"]
CONFIG = """
[default]
endpoint_url = https://of.default
[profile lab]
region = eu-west-1
services = lab
endpoint_url = https://of.profile
[profile plain]
endpoint_url = https://of.plain
[profile none]
region = eu-west-1
[services lab]
ec2 =
  endpoint_url = https://of.ec2
s3 =
  addressing_style = path
  endpoint_url = https://of.services
"""


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"AWS_ENDPOINT_URL_S3": "https://a", "AWS_ENDPOINT_URL": "https://b", "AWS_PROFILE": "lab"}, "https://a"),
        ({"AWS_ENDPOINT_URL": "https://b", "AWS_PROFILE": "lab"}, "https://b"),
        ({"AWS_PROFILE": "lab"}, "https://of.services"),
        ({"AWS_PROFILE": "plain"}, "https://of.plain"),
        ({"AWS_DEFAULT_PROFILE": "plain"}, "https://of.plain"),
        ({}, "https://of.default"),
        ({"AWS_PROFILE": "none"}, None),
        ({"AWS_PROFILE": "not-there"}, None),
        ({"AWS_ENDPOINT_URL_S3": "https://a", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, None),
    ],
)
def test_the_endpoint_of_s3_is_the_one_that_awss_own_tools_use(
    environ: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import botocore.session  # type: ignore[import-untyped,unused-ignore]

    (tmp_path / "config").write_text(CONFIG)
    environ |= {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    assert endpoints(S3, environ) == ({"AWS_ENDPOINT_URL_S3": expected} if expected else {})
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if environ.get("AWS_PROFILE") != "not-there":  # of that one they say that it is not there
        client = botocore.session.Session().create_client("s3", "us-east-1")
        assert client.meta.endpoint_url == (expected or "https://s3.amazonaws.com")


def test_only_what_is_read_from_it_makes_an_endpoint_count(tmp_path: Path) -> None:
    every = {
        "AWS_ENDPOINT_URL": "https://s3.lab", "STORAGE_EMULATOR_HOST": "https://gs.lab",
        "AZURE_STORAGE_SERVICE_ENDPOINT": "https://az.lab", "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }  # fmt: skip
    assert endpoints(["hf://a/b", "pypi://a@1/b", "file:///a"], every) == {}
    assert endpoints(["s3://a/b", "s3://c/d", "gs://a/b", "az://a/c/d"], every) == {
        "AWS_ENDPOINT_URL_S3": "https://s3.lab", "STORAGE_EMULATOR_HOST": "https://gs.lab",
        "AZURE_STORAGE_SERVICE_ENDPOINT": "https://az.lab",
    }  # fmt: skip


def test_broken_settings_of_aws_are_awss_to_complain_about(tmp_path: Path) -> None:
    for broken in (b"no section\n", b"\xff\xfe", b"[default]\nservices = a\n[services a]\ns3 = 5\n"):
        (tmp_path / "config").write_bytes(broken)
        assert endpoints(S3, {"AWS_CONFIG_FILE": str(tmp_path / "config")}) == {}


def test_a_password_in_an_address_does_not_travel() -> None:
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL_S3: the address of a store may hold no password") as caught:
        endpoints(S3, {"AWS_ENDPOINT_URL_S3": "https://me:secret@s3.lab"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", buckets())
def test_what_a_nodes_identity_is_worth_there(scheme: str) -> None:
    bucket = buckets()[scheme]
    uri, name = f"{scheme}://account/container/v03", bucket.variables[0]

    def has(endpoint: str, cloud: str = bucket.cloud) -> str:
        found = right(uri, cloud, endpoints={name: endpoint})
        assert found is not None
        return found.has

    own = right(uri, bucket.cloud)
    assert own is not None
    assert {has(f"https://account{domain}") for domain in bucket.domains} == {own.has}
    assert {has(url) for url in ("http://127.0.0.1:9000", "http://localhost", "http://[::1]:1", "localhost:4443")} == {"no"}
    assert has("https://minio.lab:9000") == "grant"
    assert {has("https://minio.lab", cloud) for cloud in names() if cloud != bucket.cloud} == {"no"}
    assert has("http://127.0.0.1:9000", "local") == "yes"


def test_the_task_takes_it_to_the_node_and_the_plan_says_what_it_means(mistralctl: Run) -> None:
    arguments = ("--cloud", "aws", "--weights", S3[0])
    plain = mistralctl("up", *arguments, "--dry-run")
    foreign = mistralctl("up", *arguments, "--dry-run", AWS_ENDPOINT_URL="https://minio.lab")
    loopback = mistralctl("up", *arguments, "--dry-run", AWS_ENDPOINT_URL_S3="http://127.0.0.1:9000")
    vpc = mistralctl("up", *arguments, "--dry-run", AWS_ENDPOINT_URL_S3="https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com")
    before, after = (yaml.safe_load(done.stdout)["envs"] for done in (plain, foreign))
    assert "AWS_ENDPOINT_URL_S3" not in before
    assert after["AWS_ENDPOINT_URL_S3"] == "https://minio.lab"
    assert {name for name in before if before[name] != after[name]} == {"MISTRALCTL_WEIGHTS_ID", "MISTRALCTL_SERVING_ID"}
    assert (plain.stderr, vpc.stderr) == ("", "")
    needs = "note: s3://bucket/v03 from aws: needs s3:GetObject and s3:ListBucket on the bucket bucket; "
    assert foreign.stderr == (
        f"{needs}MUST BE GIVEN IT: https://minio.lab (AWS_ENDPOINT_URL_S3) is not AWS's own and must know the keys of the "
        "node's role; set it up so, or mirror the weights into a bucket of AWS\n"
    )
    assert loopback.stderr == (
        f"{needs}CANNOT HAVE IT: http://127.0.0.1:9000 (AWS_ENDPOINT_URL_S3) is this machine's own address, and a node looks "
        "for it on itself; name the store by an address that a node reaches\n"
    )
    hub = mistralctl("up", "--cloud", "aws", "--dry-run", AWS_ENDPOINT_URL="https://minio.lab")
    assert "AWS_ENDPOINT_URL_S3" not in yaml.safe_load(hub.stdout)["envs"]
    assert json.loads(mistralctl("plan", *arguments, "-o", "json", AWS_ENDPOINT_URL="https://minio.lab").stdout)["endpoints"] == {
        "AWS_ENDPOINT_URL_S3": "https://minio.lab"
    }


def test_a_mirror_takes_it_along(mistralctl: Run) -> None:
    arguments = ("weights", "mirror", "hf://a/b", "s3://bucket/v03", "--dry-run")
    plain = yaml.safe_load(mistralctl(*arguments).stdout)
    foreign = mistralctl(*arguments, AWS_ENDPOINT_URL="https://minio.lab")
    task = yaml.safe_load(foreign.stdout)
    assert task["envs"]["AWS_ENDPOINT_URL_S3"] == "https://minio.lab"
    assert task["name"] != plain["name"]
    assert "s3://bucket/v03 from aws: needs s3:PutObject" in foreign.stderr
    assert "https://minio.lab (AWS_ENDPOINT_URL_S3) is not AWS's own" in foreign.stderr


def test_the_contract_names_the_variables() -> None:
    page = (package_dir("model").parent / "docs" / "contract.md").read_text("utf-8")
    assert all(f"`{bucket.variables[0]}`" in page for bucket in buckets().values())
