"""Quotas by each cloud's own protocol, from servers of this test, and what follows from them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mistralctl import checkpoints
from mistralctl import plan as planning
from mistralctl.clouds import HasQuotas, names
from mistralctl.clouds import quotas as of_cloud
from mistralctl.clouds.aws import quotas as aws
from mistralctl.clouds.azure import quotas as azure
from mistralctl.clouds.gcp import quotas as gcp
from mistralctl.commands import preflight
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.output import plan_text
from mistralctl.plan import Plan
from mistralctl.prices import offers
from mistralctl.quotas import Need, Unknown, Wanted

G, G_NAME = "L-DB2E81BA", "Running On-Demand G and VT instances"
MODEL = "mistral-7b-instruct-v0.1"


def wanted(cloud: str, instance_type: str, *, spot: bool = False) -> Wanted:
    [offer, *_] = [offer for offer in offers(cloud) if offer.instance_type == instance_type]
    return Wanted(cloud, instance_type, offer.accelerator, offer.count, offer.vcpus, spot)


def asking(cloud: str) -> HasQuotas:
    found = of_cloud(cloud)
    assert found is not None
    return found


def make(**flags: Any) -> Plan:
    sourced = load({"model": MODEL} | flags, {}, None)
    return planning.make(sourced, checkpoints.resolve(sourced), None)


# ---- the tables


@pytest.mark.parametrize(
    ("cloud", "instance_type", "spot", "expected"),
    [
        ("aws", "g6.xlarge", False, [(G, 4, "vCPUs")]),
        ("aws", "g4dn.xlarge", True, [("L-3819A6DF", 4, "vCPUs")]),
        ("aws", "p4d.24xlarge", False, [("L-417A185B", 96, "vCPUs")]),
        ("aws", "p4d.24xlarge", True, [("L-7212CCBC", 96, "vCPUs")]),
        ("aws", "p5.4xlarge", True, [("L-C4BD4855", 16, "vCPUs")]),
        ("aws", "m6i.large", False, [("L-1216C47A", 2, "vCPUs")]),
        ("aws", "c6i.4xlarge", True, [("L-34B43A08", 16, "vCPUs")]),
        ("gcp", "g2-standard-4", False, [("NVIDIA_L4_GPUS", 1, "GPUs"), ("GPUS_ALL_REGIONS", 1, "GPUs"), ("CPUS_ALL_REGIONS", 4, "vCPUs")]),
        ("gcp", "g2-standard-4", True, [("PREEMPTIBLE_NVIDIA_L4_GPUS", 1, "GPUs")]),
        ("gcp", "a2-ultragpu-1g", False, [("NVIDIA_A100_80GB_GPUS", 1, "GPUs"), ("GPUS_ALL_REGIONS", 1, "GPUs"), ("A2_CPUS", 12, "vCPUs"),
                                          ("CPUS_ALL_REGIONS", 12, "vCPUs")]),
        ("gcp", "n2-standard-4", False, [("N2_CPUS", 4, "vCPUs"), ("CPUS_ALL_REGIONS", 4, "vCPUs")]),
        ("azure", "Standard_NC24ads_A100_v4", False, [("StandardNCADSA100v4Family", 24, "vCPUs"), ("cores", 24, "vCPUs")]),
        ("azure", "Standard_NC4as_T4_v3", False, [("Standard NCASv3_T4 Family", 4, "vCPUs"), ("cores", 4, "vCPUs")]),
        ("azure", "Standard_NC40ads_H100_v5", True, [("lowPriorityCores", 40, "vCPUs")]),
        ("azure", "Standard_D4s_v5", False, [("standardDSv5Family", 4, "vCPUs"), ("cores", 4, "vCPUs")]),
    ],
)  # fmt: skip
def test_what_a_machine_counts_against(
    cloud: str, instance_type: str, spot: bool, expected: list[tuple[str, float, str]]
) -> None:
    found = asking(cloud).needs(wanted(cloud, instance_type, spot=spot))
    assert [(need.code, need.amount, need.unit) for need in found] == expected


@pytest.mark.parametrize("cloud", names())
def test_every_machine_of_the_snapshot_counts_against_one_quota_of_its_own_at_least(cloud: str) -> None:
    for offer in offers(cloud):
        for spot in (False, True):
            machine = Wanted(cloud, offer.instance_type, offer.accelerator, offer.count, offer.vcpus, spot)
            found = asking(cloud).needs(machine)
            shared = {gcp.ALL_GPUS, gcp.ALL_CPUS, "cores"}
            if not (cloud == "gcp" and spot and not offer.accelerator):  # vCPUs of a spot machine there: see the module
                assert {need.code for need in found} - shared, offer
            assert len({need.code for need in found}) == len(found)


def test_what_no_table_knows_counts_against_nothing() -> None:
    for cloud in ("aws", "azure"):
        assert asking(cloud).needs(Wanted(cloud, "quantum.large", None, 0, 4, False)) == []


# ---- AWS: moto's server


@pytest.fixture
def amazon(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, str], float | str]]:
    """moto over HTTP, taught EC2's quotas: (region, code) to a limit, or to the code of an error; ("*", code) is everywhere."""
    from moto.core.exceptions import JsonRESTError
    from moto.server import ThreadedMotoServer
    from moto.servicequotas.models import ServiceQuotasBackend

    limits: dict[tuple[str, str], float | str] = {}

    def get_service_quota(self: Any, service_code: str, quota_code: str) -> dict[str, Any]:
        value = limits.get((self.region_name, quota_code), limits.get(("*", quota_code), "NoSuchResourceException"))
        if isinstance(value, str):
            raise JsonRESTError(value, "said so")
        return {"ServiceCode": service_code, "QuotaCode": quota_code, "Value": value}

    monkeypatch.setattr(ServiceQuotasBackend, "get_service_quota", get_service_quota)
    monkeypatch.setattr(preflight, "SECONDS", 60.0)  # moto answers one after the other
    monkeypatch.setattr(aws, "SECONDS", 30)  # and at the first question of EC2 reads all that it knows of that
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    yield limits
    __import__("requests").post(f"http://{host}:{port}/moto-api/reset", timeout=600)
    server.stop()


def run_instances(region: str, instance_type: str, *, spot: bool = False) -> str:
    import boto3
    from moto.ec2.models.amis import AMIS

    ec2 = boto3.client("ec2", region_name=region)
    market: dict[str, Any] = {"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}
    [one] = ec2.run_instances(ImageId=AMIS[0]["ami_id"], MinCount=1, MaxCount=1, InstanceType=instance_type, **market)[
        "Instances"
    ]
    return str(one["InstanceId"])


def test_aws_says_limit_and_use(amazon: dict[tuple[str, str], float | str]) -> None:
    import boto3

    need = Need(G, G_NAME, 4, "vCPUs")
    amazon["us-west-2", G] = 32.0
    assert aws.ask("us-west-2", [need]) == {G: (32.0, 0.0)}
    stopped = run_instances("us-west-2", "g4dn.xlarge")
    for instance_type in ("g5.2xlarge", "g4dn.xlarge", "m5.large"):
        run_instances("us-west-2", instance_type)
    run_instances("us-west-2", "g5.xlarge", spot=True)
    boto3.client("ec2", region_name="us-west-2").stop_instances(InstanceIds=[stopped])
    assert aws.ask("us-west-2", [need]) == {G: (32.0, 12.0)}
    spot = Need("L-3819A6DF", "", 4, "vCPUs")
    amazon["us-west-2", spot.code] = 8.0
    assert aws.ask("us-west-2", [spot]) == {spot.code: (8.0, 4.0)}
    amazon["us-west-2", G] = 0.0
    assert aws.ask("us-west-2", [need]) == {G: (0.0, None)}  # too small whatever is in use


def test_what_aws_refuses_is_unknown_by_name(amazon: dict[tuple[str, str], float | str]) -> None:
    need = Need(G, G_NAME, 4, "vCPUs")
    amazon["us-west-2", G] = "AccessDeniedException"
    with pytest.raises(Unknown, match="GetServiceQuota: AccessDeniedException"):
        aws.ask("us-west-2", [need])
    with pytest.raises(Unknown, match="NoSuchResourceException"):
        aws.ask("us-east-1", [need])


def test_without_a_network_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unknown, match="AWS does not answer"):
        aws.ask("us-west-2", [Need(G, G_NAME, 4, "vCPUs")])


# ---- Google and Azure: the two calls, as their references write them


@contextmanager
def serving(answer: Callable[[str, dict[str, str]], tuple[int, Any]]) -> Iterator[str]:
    """A server that answers GET and POST with (status, JSON) by path and headers; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answer(self.path, {key.lower(): value for key, value in self.headers.items()})
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def metrics(**rows: tuple[float, float]) -> dict[str, Any]:
    return {"quotas": [{"metric": metric, "limit": limit, "usage": used} for metric, (limit, used) in rows.items()]}


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, tuple[int, Any]]]:
    """Compute Engine's v1 API for one signed-in project: what each path answers."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    paths: dict[str, tuple[int, Any]] = {}

    def answer(path: str, headers: dict[str, str]) -> tuple[int, Any]:
        if path == "/token":
            return 200, {"access_token": "made-up", "expires_in": 3600, "token_type": "Bearer"}
        if headers.get("authorization") != "Bearer made-up":
            return 401, {}
        return paths.get(path.partition("?")[0], (404, {}))

    with serving(answer) as url:
        secret = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account", "project_id": "mine", "client_email": "me@mine.iam.gserviceaccount.com", "client_id": "1",
            "private_key_id": "1", "private_key": secret.decode(), "token_uri": f"{url}/token",
        }  # fmt: skip
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        monkeypatch.setattr(gcp, "ENDPOINT", f"{url}/compute/v1")
        monkeypatch.setattr(preflight, "SECONDS", 60.0)
        gcp._signed_in.cache_clear()
        yield paths
        gcp._signed_in.cache_clear()


def test_google_says_limit_and_use_of_region_and_project(google: dict[str, tuple[int, Any]]) -> None:
    google["/compute/v1/projects/mine/regions/us-central1"] = 200, metrics(NVIDIA_L4_GPUS=(4.0, 1.0), CPUS=(24.0, 0.0))
    google["/compute/v1/projects/mine"] = 200, metrics(GPUS_ALL_REGIONS=(0.0, 0.0), CPUS_ALL_REGIONS=(32.0, 2.0))
    found = gcp.ask("us-central1", gcp.needs(wanted("gcp", "g2-standard-4")))
    assert {code: found[code] for code in ("NVIDIA_L4_GPUS", "GPUS_ALL_REGIONS", "CPUS_ALL_REGIONS")} == {
        "NVIDIA_L4_GPUS": (4.0, 1.0), "GPUS_ALL_REGIONS": (0.0, 0.0), "CPUS_ALL_REGIONS": (32.0, 2.0),
    }  # fmt: skip
    quotas = preflight.run(make(cloud=["gcp"], accelerators="L4:1", region="us-central1"))
    assert {quota.code: quota.enough for quota in quotas} == {
        "NVIDIA_L4_GPUS": True, "GPUS_ALL_REGIONS": False, "CPUS_ALL_REGIONS": True,
    }  # fmt: skip


def test_what_google_refuses_is_unknown_by_name(google: dict[str, tuple[int, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    google["/compute/v1/projects/mine/regions/us-central1"] = 403, {"error": {"code": 403}}
    needs = gcp.needs(wanted("gcp", "g2-standard-4"))
    with pytest.raises(Unknown, match=r"Google refused compute.regions.get \(403\)"):
        gcp.ask("us-central1", needs)
    google["/compute/v1/projects/mine/regions/us-central1"] = 200, metrics(CPUS=(24.0, 0.0))
    google["/compute/v1/projects/mine"] = 200, metrics()
    quotas = preflight.run(make(cloud=["gcp"], accelerators="H100:1", region="us-central1", spot=True))
    assert {(quota.limit, quota.enough, quota.why) for quota in quotas} == {(None, None, "it is not in the cloud's list")}
    monkeypatch.setattr(gcp, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unknown, match="Google does not answer"):
        gcp.ask("us-central1", needs)


def test_without_credentials_of_google_it_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("names()DK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    gcp._signed_in.cache_clear()
    with pytest.raises(Unknown, match="gcloud auth application-default login"):
        gcp.ask("us-central1", [])


def usage(name: str, limit: int, used: int) -> dict[str, Any]:
    return {"unit": "Count", "currentValue": used, "limit": limit, "name": {"value": name, "localizedValue": name}}


@pytest.fixture
def microsoft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[int, Any]]]:
    """Azure's usages of one location, page by page, and an `az` that is signed in."""
    pages: list[tuple[int, Any]] = []
    own = "/subscriptions/0000-1/providers/Microsoft.Compute/locations/eastus/usages?api-version=2024-07-01"

    def answer(path: str, headers: dict[str, str]) -> tuple[int, Any]:
        if headers.get("authorization") != "Bearer made-up":
            return 401, {}
        number = 0 if path == own else int(path.removeprefix("/page/")) if path.startswith("/page/") else -1
        if number < 0:
            return 404, {}
        status, body = pages[number]
        return status, body if number + 1 == len(pages) else body | {"nextLink": f"{url}/page/{number + 1}"}

    az = tmp_path / "bin" / "az"
    az.parent.mkdir()
    token = {"accessToken": "made-up", "expiresOn": "2999-01-01 00:00:00.000000", "tokenType": "Bearer"}
    az.write_text(f"#!/bin/sh\necho '{json.dumps(token)}'\n")
    az.chmod(0o755)
    profile = {"subscriptions": [{"id": "0000-0", "isDefault": False}, {"id": "0000-1", "isDefault": True}]}
    (tmp_path / "azureProfile.json").write_text(json.dumps(profile), "utf-8-sig")
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{az.parent}:{os.environ['PATH']}")
    azure._token.cache_clear()
    with serving(answer) as url:
        monkeypatch.setattr(azure, "ENDPOINT", url)
        monkeypatch.setattr(preflight, "SECONDS", 60.0)
        yield pages
    azure._token.cache_clear()


def test_azure_says_limit_and_use_however_it_spells_the_family(microsoft: list[tuple[int, Any]]) -> None:
    microsoft += [
        (200, {"value": [usage("cores", 100, 10), usage("standardNCASv3_T4Family", 8, 4)]}),
        (200, {"value": [usage("standardNCADSA100v4Family", 0, 0), usage("lowPriorityCores", 3, 0)]}),
    ]
    assert azure.ask("eastus", azure.needs(wanted("azure", "Standard_NC4as_T4_v3"))) == {
        "Standard NCASv3_T4 Family": (8.0, 4.0), "cores": (100.0, 10.0),
    }  # fmt: skip
    quotas = preflight.run(make(cloud=["azure"], accelerators="A100-80GB:1", region="eastus"))
    assert [(quota.code, quota.needs, quota.limit, quota.used, quota.enough) for quota in quotas] == [
        ("StandardNCADSA100v4Family", 24, 0, 0, False), ("cores", 24, 100, 10, True),
    ]  # fmt: skip
    [spot] = preflight.run(make(cloud=["azure"], accelerators="A100-80GB:1", region="eastus", spot=True))
    assert (spot.code, spot.enough) == ("lowPriorityCores", False)


def test_what_azure_refuses_is_unknown_by_name(
    microsoft: list[tuple[int, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs = azure.needs(wanted("azure", "Standard_D4s_v5"))
    microsoft.append((403, {}))
    with pytest.raises(Unknown, match=r"Azure refused Microsoft.Compute/locations/usages/read \(403\)"):
        azure.ask("eastus", needs)
    (tmp_path / "bin" / "az").write_text("#!/bin/sh\necho 'Please run az login' >&2\nexit 1\n")
    azure._token.cache_clear()
    with pytest.raises(Unknown, match="az login"):
        azure.ask("eastus", needs)
    (tmp_path / "azureProfile.json").write_text('{"subscriptions": []}')
    with pytest.raises(Unknown, match="az login"):
        azure.ask("eastus", needs)


# ---- what follows


def test_too_small_everywhere_stops_before_anything_is_rented(amazon: dict[tuple[str, str], float | str]) -> None:
    amazon["*", G] = 0.0
    notes: list[str] = []
    with pytest.raises(UserError) as stopped:
        preflight.check(make(cloud=["aws"], accelerators="L4:1"), notes.append)
    assert stopped.value.code == Exit.CLOUD
    assert str(stopped.value) == (
        "no quota lets mistral-7b-instruct-v0-1 run anywhere, so nothing was launched; ask for more at "
        "https://us-east-1.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/L-DB2E81BA, or allow another --cloud, --region or "
        "--accelerators (--offline does not ask)"
    )
    head, row = stopped.value.details.splitlines()
    assert head.split() == ["CLOUD", "MACHINE", "QUOTA", "NEEDS", "LIMIT", "USED", "REGIONS"]
    assert row.startswith(f"  aws    L4:1     {G} {G_NAME}  4 vCPUs  0      ?     TOO SMALL  us-east-1, us-west-2, ")
    assert int(row.split(" and ")[-1].split()[0]) > 10  # every region of the account was asked
    assert notes == []


def test_one_region_far_away_is_enough(amazon: dict[tuple[str, str], float | str]) -> None:
    amazon["*", G] = 0.0
    amazon["ap-southeast-2", G] = 4.0
    notes: list[str] = []
    preflight.check(make(cloud=["aws"], accelerators="L4:1"), notes.append)
    assert notes[0] == (
        f"aws us-east-1: {G} {G_NAME} is too small for L4:1 (needs 4 vCPUs, limit 0); ask for more at "
        f"https://us-east-1.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{G}"
    )


def test_what_is_in_use_counts_unless_our_own_machine_goes_first(amazon: dict[tuple[str, str], float | str]) -> None:
    amazon["us-west-2", G] = 4.0
    run_instances("us-west-2", "g5.xlarge")
    plan = make(cloud=["aws"], accelerators="L4:1", region="us-west-2")
    with pytest.raises(UserError, match="no quota lets"):
        preflight.check(plan, lambda note: None)
    preflight.check(plan, lambda note: None, limits_only=True)


def test_what_is_not_known_stops_nobody(amazon: dict[tuple[str, str], float | str]) -> None:
    amazon["*", G] = "AccessDeniedException"
    plan = make(cloud=["aws"], accelerators="L4:1")
    notes: list[str] = []
    preflight.check(plan, notes.append)
    amazon["us-east-1", G] = 0.0
    preflight.check(plan, notes.append)
    assert [note.partition(":")[0] for note in notes] == ["aws us-east-1"]


def test_a_cloud_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SECONDS", 0.5)
    over = threading.Event()
    monkeypatch.setattr(aws, "ask", lambda region, needs: over.wait(100))
    began = time.monotonic()
    quotas = preflight.run(make(cloud=["aws"], accelerators="L4:1", region="us-west-2"))
    assert time.monotonic() - began < 60
    over.set()
    assert [(quota.limit, quota.why) for quota in quotas] == [(None, "no answer within 0 s")]


def test_the_plan_shows_them(amazon: dict[tuple[str, str], float | str]) -> None:
    import dataclasses

    amazon["*", G] = 0.0
    plan = make(cloud=["aws"], accelerators="L4:1", region="us-west-2")
    text = plan_text(dataclasses.replace(plan, quotas=preflight.run(plan))).splitlines()
    at = text.index("quotas:")
    assert text[at + 1 : at + 4] == [
        f"  CLOUD  MACHINE  QUOTA{' ' * 43} NEEDS    LIMIT  USED             REGIONS",
        f"  aws    L4:1     {G} {G_NAME}  4 vCPUs  0      ?     TOO SMALL  us-west-2",
        f"  ask for more: https://us-west-2.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{G}",
    ]
