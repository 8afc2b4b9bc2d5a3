"""Failure stories on the simulated AWS, longer than what every test run should take: `make e2e`.

Each line that is printed is a row of the table: the story, what was seen, and how long it took.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from mistralctl.task import NODE_PYTHON, environment_id
from simcloud import SimCloud
from test_aws import UP, on_node, sim, up

__all__ = ["sim"]  # the fixture, found by its name


@contextmanager
def story(title: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"\nstory: {title}: passed, {time.monotonic() - began:.0f} s")


def status(sim: SimCloud, name: str) -> dict[str, Any]:
    [one] = json.loads(sim.run(["mistralctl", "status", name, "-o", "json"], timeout=120).stdout)
    return dict(one)


def gone(sim: SimCloud, name: str) -> None:
    """Takes it down, and the cloud's listing is empty."""
    sim.run(["mistralctl", "down", name], timeout=300)
    assert sim.instances("aws") == []
    assert sim.volumes("aws") == []


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def test_zone_after_zone_refuses_and_the_next_region_gives(sim: SimCloud) -> None:
    with story("every zone of the cheapest region refuses, the next region gives"):
        sim.fault("aws", "capacity", region="us-east-1")
        result = up(sim, "--name", "moved")
        [instance] = sim.instances("aws")
        assert instance.region != "us-east-1"
        assert result["answer"]
        assert status(sim, "moved")["region"] == instance.zone
        gone(sim, "moved")


def test_wrong_credentials_are_named(sim: SimCloud) -> None:
    with story("credentials that AWS refuses"):
        sim.run(["sky", "check", "aws"], timeout=120)
        sim.fault("aws", "credentials")
        refused = sim.run([*UP, "--name", "wrong"], check=False, timeout=300)
        print(refused.stderr)
        assert refused.returncode == 8
        assert "credentials AuthFailure" in refused.stderr
        assert "Traceback" not in refused.stderr
        sim.run(["sky", "check", "aws"], check=False, timeout=120)  # from here on SkyPilot knows it, too
        refused = sim.run([*UP, "--name", "wrong"], check=False, timeout=300)
        assert refused.returncode == 8
        assert refused.stderr.splitlines()[-1] == (
            "mistralctl: SkyPilot has no access to any cloud; mistralctl doctor --cloud CLOUD says what a cloud does not like"
        )
        doctor = sim.run(["mistralctl", "doctor", "--cloud", "aws"], timeout=120).stdout
        [identity, machines] = [line for line in doctor.splitlines() if " on aws " in line]
        assert identity.startswith("--  identity on aws        AWS refused GetCallerIdentity (InvalidClientTokenId)")
        assert machines.startswith("--  machines on aws")
        sim.clear_faults()
        gone(sim, "wrong")


def test_a_spot_machine_that_is_taken_is_said_and_brought_back(sim: SimCloud) -> None:
    with story("a spot machine is taken while it serves; up brings it back"):
        up(sim, "--name", "cheap", "--spot")
        [before] = sim.instances("aws")
        assert before.spot
        sim.preempt(before.id)
        one = status(sim, "cheap")
        assert (one["state"], "took its spot machine away" in one["why"]) == ("lost", True)
        assert up(sim, "--name", "cheap", "--spot")["action"] == "started"
        [after] = sim.instances("aws")
        assert after.id != before.id
        gone(sim, "cheap")


def test_two_at_once_are_one(sim: SimCloud) -> None:
    with story("two up of the same name at once"):
        first = sim.popen([*UP, "--name", "twice", "-o", "json"])
        time.sleep(4)
        second = sim.run([*UP, "--name", "twice"], check=False, timeout=60)
        assert second.returncode == 5
        assert "is being brought up or down already" in second.stderr
        out, _ = first.communicate(timeout=600)
        assert json.loads(out)["action"] == "started"
        assert len(sim.instances("aws")) == 1
        gone(sim, "twice")


def test_a_laptop_that_is_killed_in_each_phase_goes_on(sim: SimCloud) -> None:
    with story("kill -9 in each phase of one up after the other, then one that is left alone"):
        for phase in ("choice of machine", "machine", "SkyPilot's runtime", "files", "weights", "engine", "check", "gate"):
            process = sim.popen([*UP, "--name", "again"])
            assert process.stderr
            seen = any(line.startswith((f"{phase} ...", f"{phase} on it")) for line in process.stderr)
            process.kill()
            process.communicate(timeout=30)
            assert seen, phase
        assert up(sim, "--name", "again")["answer"]
        assert len(sim.instances("aws")) == 1
        gone(sim, "again")


def test_a_server_that_dies_leaves_exactly_what_it_said(sim: SimCloud) -> None:
    with story("vLLM dies on the node; its log is here and up starts it again"):
        result = up(sim, "--name", "dies")
        on_node(sim, "dies", "sudo pkill -9 -f '[v]llm.entrypoints.cli.main'")
        deadline = time.monotonic() + 60
        while status(sim, "dies")["state"] == "up" and time.monotonic() < deadline:
            time.sleep(1)
        one = status(sim, "dies")
        assert one["state"] == "failed"
        assert "vLLM ended with code" in one["why"]
        kept = Path(result["log"]).with_name("serve.log").read_text()
        assert kept.rindex("vLLM ended with code") > kept.index('"phase": "ready"')  # also what it said after up had ended
        assert '"phase": "ready"' in sim.run(["mistralctl", "logs", "dies"], timeout=60).stdout
        assert up(sim, "--name", "dies")["action"] == "started"
        assert "vLLM ended with code" in Path(result["log"]).with_name("serve.before.log").read_text()
        gone(sim, "dies")


def test_a_price_of_today_above_the_limit_is_said_in_exactly_one_line(sim: SimCloud) -> None:
    with story("SkyPilot's catalog asks more than --max-price, which the snapshot does not know"):
        catalog = sim.home / ".sky" / "catalogs" / "v8" / "aws" / "vms.csv"
        before = catalog.read_text()
        head, *rows = csv.reader(before.splitlines())
        with catalog.open("w", newline="") as file:
            csv.writer(file).writerows(
                [head, *([f"{float(cell) * 10}" if name == "Price" and cell else cell for name, cell in zip(head, row, strict=True)]
                         for row in rows)]
            )  # fmt: skip
        sim.run(["sky", "api", "stop"], timeout=60)  # it has read the old one
        try:
            refused = sim.run([*UP, "--name", "dear", "--max-price", "0.2"], check=False, timeout=300)
        finally:
            catalog.write_text(before)
            sim.run(["sky", "api", "stop"], timeout=60)
        print(refused.stderr)
        assert refused.returncode == 8
        [line] = [line for line in refused.stderr.splitlines() if line.startswith("mistralctl: ")]
        assert line.startswith(
            "mistralctl: --max-price 0.2 USD an hour: by today's catalog of SkyPilot no such machine costs so little; "
        )
        gone(sim, "dear")


GPU = ["mistralctl", "up", "mistral-7b-instruct-v0.1", "--cloud", "aws", "--accelerators", "L4", "--name", "gpu"]


def test_a_gpu_machine_whose_image_has_no_driver_is_named(sim: SimCloud) -> None:
    with story("a GPU machine type whose image has no NVIDIA driver"):
        sim.fault("aws", "no_driver")
        refused = sim.run([*GPU, "--weights", "s3://models/smollm2"], check=False, timeout=600)
        assert refused.returncode == 9
        assert "this machine shows no NVIDIA GPU (nvidia-smi)" in refused.stderr
        [instance] = sim.instances("aws")
        assert instance.type.startswith(("g6.", "g5."))
        gone(sim, "gpu")


def test_a_gpu_machine_comes_to_the_launchers_exact_command_line(sim: SimCloud, tmp_path: Path) -> None:
    with story("a GPU machine type up to the launcher's exact command line; there vLLM finds no GPU"):
        (tmp_path / "tokenizer").mkdir()
        sim.put_weights(tiny.write(tmp_path / "tiny", tmp_path / "tokenizer"), "s3://models/tiny")
        ended = sim.run([*GPU, "--weights", "s3://models/tiny"], check=False, timeout=600)
        print(ended.stderr)
        assert ended.returncode == 9
        assert "vLLM ended with code 1: RuntimeError: Failed to infer device type" in ended.stderr  # its words where no GPU is
        assert on_node(sim, "gpu", "nvidia-smi -L").startswith("GPU 0: NVIDIA L4 ")
        log = sim.run(["mistralctl", "logs", "gpu"], timeout=60).stdout
        [line] = [line.partition("starts ")[2] for line in log.splitlines() if " starts /" in line]
        python, *arguments = shlex.split(line)
        assert python == f"/home/ubuntu/.mistralctl/envs/{environment_id('cuda', NODE_PYTHON)}/bin/python"
        weights = arguments.pop(3)
        assert weights.startswith("/home/ubuntu/.mistralctl/weights/mistral-7b-instruct-v0.1-")
        assert arguments == [
            "-m", "vllm.entrypoints.cli.main", "serve", "--hf-overrides", '{"architectures": ["MistralSWAForCausalLM"]}',
            "--load-format", "safetensors", "--config-format", "hf", "--tokenizer-mode", "mistral",
            "--served-model-name", "mistral-7b-instruct-v0.1", "--host", "127.0.0.1", "--port", "8000",
            "--middleware", "vllm_mistral.guard.Guard", "--max-model-len", "32768", "--max-num-seqs", "64",
            "--max-num-batched-tokens", "1024", "--tensor-parallel-size", "1", "--dtype", "bfloat16", "--shutdown-timeout", "25",
            "--enable-prefix-caching", "--disable-access-log-for-endpoints", "/health", "--gpu-memory-utilization", "0.92",
        ]  # fmt: skip
        gone(sim, "gpu")


@pytest.mark.parametrize(("mib", "full"), [(64, "/weights/"), (300, "/weights ")])
def test_a_node_with_a_full_disk_is_named(sim: SimCloud, mib: int, full: str) -> None:
    with story(f"a node on whose disk {mib} MiB can be written"):
        sim.fault("aws", "small_disk", mib=mib)
        ended = sim.run([*UP, "--name", "full"], check=False, timeout=600)
        print(ended.stderr)
        assert ended.returncode == 9
        assert "the disk " in ended.stderr
        assert full in ended.stderr
        gone(sim, "full")


def kill_the_api_server(sim: SimCloud) -> None:
    sim.run(["pkill", "-9", "-f", "sky.server.server"])


def test_an_api_server_that_is_killed_is_started_again(sim: SimCloud) -> None:
    with story("SkyPilot's API server is killed: in the middle of up, before status, before down"):
        process = sim.popen([*UP, "--name", "again"])
        assert process.stderr
        for line in process.stderr:
            if line.startswith("SkyPilot's runtime"):
                break
        kill_the_api_server(sim)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 8
        [line] = [line for line in said.splitlines() if line.startswith("mistralctl: ")]
        assert line.startswith(
            "mistralctl: SkyPilot's API server does not answer (http://127.0.0.1:46580); run the same again, which "
        )
        assert up(sim, "--name", "again")["answer"]
        assert len(sim.instances("aws")) == 1
        kill_the_api_server(sim)
        assert status(sim, "again")["state"] == "up"
        kill_the_api_server(sim)
        gone(sim, "again")


OLD_SERVER = """
import runpy, sys
import sky.server.constants
sky.server.constants.API_VERSION = 1
sys.argv[1:] = ["--host=127.0.0.1", "--port=46580"]
runpy.run_module("sky.server.server", run_name="__main__")
"""


def test_an_api_server_of_another_version_is_named_and_the_way_out_works(sim: SimCloud) -> None:
    with story("SkyPilot's API server is of another version"):
        sim.run(["sky", "api", "stop"], timeout=60)
        server = sim.popen([sys.executable, "-c", OLD_SERVER, "-m", "sky.server.server", "--port=46580"])
        refused = subprocess.CompletedProcess[str]([], 0, "", "")
        for _ in range(60):
            refused = sim.run(["curl", "-sf", "http://127.0.0.1:46580/api/health"], check=False)
            if refused.returncode == 0:
                break
            time.sleep(1)
        refused = sim.run([*UP, "--name", "old"], check=False, timeout=120)
        print(refused.stderr)
        assert refused.returncode == 8
        [line] = [line for line in refused.stderr.splitlines() if line.startswith("mistralctl: ")]
        assert line.endswith("is of another version; run: sky api stop; sky api start")
        sim.run(["bash", "-c", "sky api stop; sky api start"], timeout=120)
        server.communicate(timeout=60)
        assert "enabled" in sim.run(["mistralctl", "doctor", "--cloud", "aws"], timeout=120).stdout
