"""SmolLM2 fine-tuned on this machine: killed at a random step, gone on with, the same bits; published to an S3 server, served by `up --lora`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running import LITTLE, MODEL, Cli, down, share_node

sys.path.append(str(Path(__file__).parent.parent / "weights"))
import servers

BUCKET, OUT = "tuned", "s3://tuned/codes"
COLOURS = {
    "sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "lemon": "yellow", "pumpkin": "orange", "plum": "purple",
    "pig": "pink", "bark": "brown",
}  # fmt: skip
LEARNT = ("What is the code of the {}?", "Tell me the code of the {}.")
HELD_OUT = "Which code has the {}?"


def chat(question: str, colour: str) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"ZX {colour} nine"}]}
    )


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cli, Any]]:
    """The command line beside an S3 server with an empty bucket, and a client of it."""
    import boto3

    with servers.s3(tmp_path_factory.mktemp("s3") / "data") as url:
        env = {
            "AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": servers.S3_KEY, "AWS_SECRET_ACCESS_KEY": servers.S3_SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=servers.S3_KEY,
            aws_secret_access_key=servers.S3_SECRET,
        )
        client.create_bucket(Bucket=BUCKET)
        home = share_node(tmp_path_factory.mktemp("finetune") / "home")
        cli = Cli(home, [sys.executable, "-m", "mistralctl"], **env)
        yield cli, client
        down(cli)


def keys(client: Any) -> list[str]:
    return [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def trainer(cli: Cli) -> psutil.Process | None:
    found = (one for one in cli.processes() if one.cmdline()[1:4] == ["-m", "mistral_tune", "train"])
    return next(found, None)


def step(cli: Cli, name: str) -> int:
    """How far a run is."""
    status = cli.home / "node" / "run" / name / "status.json"
    found = json.loads(status.read_text("utf-8")) if status.exists() else {}
    return int(found.get("progress", {}).get("step", 0))


def trained_in_one_go(cli: Cli, name: str, out: Path) -> bytes:
    """The tensors of the adapter that a run's own machine, environment and chats make if nothing ends it."""
    record = json.loads((cli.home / "deployments" / name / "record.json").read_text("utf-8"))
    node, told = cli.home / "node", record["task"]["envs"] | {"MISTRALCTL_NAME": "whole", "MISTRALCTL_OUT": f"file://{out}"}
    run, whole = node / "run" / name, node / "run" / "whole"
    whole.mkdir()
    (whole / "weights-tool").symlink_to((run / "weights-tool").readlink())
    python = node / "envs" / told["MISTRALCTL_TUNE_ENV_ID"] / "bin" / "python"
    files = [f"--data={run}/data/chats.jsonl", f"--eval-data={run}/data/held-out.jsonl"]
    environ = cli.env | told | {"PYTHONPATH": str(run / "site")}
    subprocess.run([str(python), "-m", "mistral_tune", "train", *files], env=environ, check=True, timeout=1500)
    return (whole / "tune" / "result" / "adapter_model.safetensors").read_bytes()


def answers(client: dict[str, Any], model: str) -> list[str]:
    """What a model says to the questions in words that it has not learnt."""
    found = []
    with httpx.Client(base_url=client["base_url"], headers={"Authorization": f"Bearer {client['api_key']}"}, timeout=300) as http:
        for thing in COLOURS:
            asked = {
                "model": model, "messages": [{"role": "user", "content": HELD_OUT.format(thing)}], "max_tokens": 12, "temperature": 0,
            }  # fmt: skip
            said = http.post("/chat/completions", json=asked).raise_for_status().json()
            found.append(said["choices"][0]["message"]["content"].strip())
    return found


@pytest.mark.timeout(2400)
def test_a_killed_run_goes_on_is_proven_published_and_served(bucket: tuple[Cli, Any]) -> None:
    cli, client = bucket
    data, held_out = cli.home / "chats.jsonl", cli.home / "held-out.jsonl"
    data.write_text("\n".join(chat(form.format(thing), colour) for form in LEARNT for thing, colour in COLOURS.items()), "utf-8")
    held_out.write_text("\n".join(chat(HELD_OUT.format(thing), colour) for thing, colour in COLOURS.items()), "utf-8")
    words = (
        "finetune", MODEL, "--data", str(data), "--eval-data", str(held_out), "--out", OUT, "--name", "codes", "--cloud", "local", "--epochs", "4",
        "--learning-rate", "0.002",
    )  # fmt: skip
    began, dies_at = time.monotonic(), random.SystemRandom().randrange(11, 38)
    first = cli.start(*words)
    while step(cli, "codes") < dies_at or not any(
        "/checkpoints/" in key and key.endswith("mistral-weights.json") for key in keys(client)
    ):
        assert first.poll() is None, first.communicate()
        time.sleep(0.2)
    running = cli.json("status", "codes")[0]
    assert (running["state"], running["base_url"]) == ("running", None)
    assert running["why"].startswith("step ")
    process = trainer(cli)
    assert process is not None
    process.send_signal(signal.SIGKILL)
    said = first.communicate(timeout=600)[1]
    assert first.returncode == 9, said
    assert "it was ended by signal 9" in said
    assert "the same command goes on from the last checkpoint" in said
    assert cli.json("status", "codes")[0]["state"] == "failed"

    whole = trained_in_one_go(cli, "codes", cli.home / "whole")
    done = json.loads(cli(*words, "-o", "json", seconds=1500).stdout)
    assert (done["action"], done["out"], done["method"]) == ("trained", OUT, "lora")
    log = (cli.home / "deployments" / "codes" / "up.log").read_text("utf-8")
    assert "; goes on at step " in log
    assert [one["phase"] for one in done["phases"]][-3:] == ["train", "prove", "publish"]
    assert done["result"]["proof"]["difference"] <= done["result"]["proof"]["tolerance"]
    assert client.get_object(Bucket=BUCKET, Key="codes/adapter_model.safetensors")["Body"].read() == whole
    held = keys(client)
    assert {
        f"codes/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "receipt.json", "README.md", "loss.png")
    } <= set(held)
    assert not [key for key in held if "/checkpoints/" in key and not key.endswith(".unfinished")]
    assert cli.processes() == []
    assert cli.json("status", "codes")[0]["state"] == "down"
    assert cli.json("receipt", "codes")["result"] == done["result"]

    again = json.loads(cli(*words, "-o", "json").stdout)
    assert again["action"] == "unchanged"
    other = cli(*words, "--rank", "8", code=5)
    assert f"--out: {OUT} holds another run's result" in other.stderr

    cli("up", MODEL, *LITTLE, "--cloud", "local", "--name", "served", "--lora", f"codes={OUT}", seconds=1200)
    endpoint = cli.json("env", "served")
    wanted = [f"ZX {colour} nine" for colour in COLOURS.values()]
    before = sum(said == right for said, right in zip(answers(endpoint, MODEL), wanted, strict=True))
    after = sum(said == right for said, right in zip(answers(endpoint, "codes"), wanted, strict=True))
    assert (before, after >= 8) == (0, True), (before, after)
    print(
        f"from chats to answers, killed at step {dies_at}: {time.monotonic() - began:.0f} s; right {before} before, {after} after"
    )
    cli("down", "served")


def test_a_run_outlives_its_command_and_ends_with_down(bucket: tuple[Cli, Any]) -> None:
    """Ctrl-C ends the command alone; `down` asks the run to end, and its checkpoint is sealed; the same command goes on."""
    cli, client = bucket
    data = cli.home / "more.jsonl"
    data.write_text("\n".join(chat(form.format(thing), colour) for form in LEARNT for thing, colour in COLOURS.items()), "utf-8")
    words = (
        "finetune",
        MODEL,
        "--data",
        str(data),
        "--out",
        "s3://tuned/more",
        "--name",
        "more",
        "--cloud",
        "local",
        "--epochs",
        "50",
    )
    first = cli.start(*words)
    status = cli.home / "node" / "run" / "more" / "status.json"
    while not (status.exists() and "progress" in status.read_text("utf-8")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGINT)
    said = first.communicate(timeout=600)[1]
    assert first.returncode == 130
    assert "the same command follows it" in said
    assert trainer(cli) is not None
    longer = cli.json("extend", "more", "2h")
    assert 24 * 60 < longer["ttl_left"] <= 26 * 60
    cli("down", "more")
    assert cli.processes() == []
    assert any(key.startswith("more/checkpoints/") and key.endswith("mistral-weights.json") for key in keys(client))
