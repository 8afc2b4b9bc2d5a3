from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from mistralctl.clouds import buckets, names
from mistralctl.rights import right, rights

Run = Callable[..., CompletedProcess[str]]
URIS = {"s3": "s3://bucket/v03", "gs": "gs://bucket/v03", "az": "az://account/container/v03"}
READ = {
    "s3": "s3:GetObject and s3:ListBucket on the bucket bucket",
    "gs": "storage.objects.get and storage.objects.list (roles/storage.objectViewer) on the bucket bucket",
    "az": "the role Storage Blob Data Reader on the container account/container",
}


@pytest.mark.parametrize(("cloud", "scheme"), list(itertools.product(names(), buckets())))
def test_every_cloud_and_every_bucket(cloud: str, scheme: str) -> None:
    got = right(URIS[scheme], cloud)
    assert got is not None
    assert (got.uri, got.cloud, got.needs) == (URIS[scheme], cloud, READ[scheme])
    if buckets()[scheme].cloud != cloud:
        assert got.has == "no"
        own = next(bucket.form for bucket in buckets().values() if bucket.cloud == cloud)
        assert got.mend == f"mistralctl weights mirror {URIS[scheme]} {own} --here"
    else:
        assert got.has == ("grant" if cloud == "azure" else "yes")


def test_who_has_it_and_who_does_not_in_words() -> None:
    words = {(r.cloud, r.uri[:2]): r.why for r in rights(URIS.values(), names())}
    assert words["gcp", "s3"] == "a GCP node has no AWS identity"
    assert words["aws", "gs"] == "an AWS node has no Google identity"
    assert words["aws", "az"] == "an AWS node has no Azure identity"
    assert words["aws", "s3"] == "SkyPilot's role skypilot-v1 has AmazonS3FullAccess: every bucket of this account"
    assert (
        words["azure", "az"]
        == "the identity that SkyPilot makes for each machine is Contributor of its resource group, which does not open blobs"
    )


def test_azures_default_identity_must_be_given_the_role() -> None:
    read, write = right(URIS["az"], "azure"), right(URIS["az"], "azure", write=True)
    assert read is not None
    assert write is not None
    mend = "name one of your own in ~/.sky/config.yaml (azure: remote_identity: ID) that is {} of the container and Contributor of the subscription"
    assert read.mend == mend.format("Storage Blob Data Reader")
    assert write.mend == mend.format("Storage Blob Data Contributor")


def test_this_machine_uses_its_own_credentials_and_other_places_need_no_right() -> None:
    local = right("s3://bucket/x", "local")
    assert local is not None
    assert (local.has, local.needs) == ("yes", READ["s3"])
    assert list(rights(["hf://a/b", "pypi://a@1/b", "file:///a"], [*names(), "local"])) == []


def test_plan_says_it_for_each_cloud_of_the_options(mistralctl: Run) -> None:
    arguments = ("--cloud", "aws", "--cloud", "gcp", "--weights", "s3://bucket/v03", "--lora", "sql=gs://bucket/v03")
    plan = json.loads(mistralctl("plan", *arguments, "-o", "json").stdout)
    assert [(r["uri"], r["cloud"], r["has"]) for r in plan["rights"]] == [
        ("s3://bucket/v03", "gcp", "no"), ("s3://bucket/v03", "aws", "yes"),
        ("gs://bucket/v03", "gcp", "yes"), ("gs://bucket/v03", "aws", "no"),
    ]  # fmt: skip
    text = mistralctl("plan", *arguments).stdout
    assert f"\n  s3://bucket/v03 from gcp: needs {READ['s3']}; CANNOT HAVE IT: a GCP node has no AWS identity; " in text


def test_a_dry_run_notes_what_is_missing_beside_the_task(mistralctl: Run) -> None:
    done = mistralctl("up", "--cloud", "azure", "--weights", "az://account/container/v03", "--dry-run")
    assert done.stderr.startswith(f"note: az://account/container/v03 from azure: needs {READ['az']}; MUST BE GIVEN IT: ")
    assert done.stderr.count("\n") == 1
    assert "note:" not in done.stdout
    assert mistralctl("up", "--cloud", "aws", "--weights", "s3://bucket/v03", "--dry-run").stderr == ""
