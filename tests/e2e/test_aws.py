"""The main job on a simulated AWS: the real SkyPilot, a node of its own, weights from S3, vLLM, the openai client, and down."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployments import ASK, CLASS, PLACES, comes_to_the_command_line, gone, mirrors, tells_of_its_machine
from planted import are_where_they_belong, key_file, plant, went_with_the_node
from running import MODEL
from secrets_search import Processes
from simcloud import SimCloud

CLOUD = "aws"
WEIGHTS = "s3://models/smollm2"
UP = ["mistralctl", "up", MODEL, "--cloud", "aws", "--weights", WEIGHTS]
TUNNEL = "ssh -F .*deployments/served/ssh_config -N"
OUTSIDE = Path(__file__).parent / "outside.py"


def up(sim: SimCloud, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON result of an `up` that works."""
    done: dict[str, Any] = json.loads(sim.run([*UP, *options, "-o", "json"], env=env).stdout)
    return done


def on_node(sim: SimCloud, name: str, command: str) -> str:
    return sim.run(["mistralctl", "ssh", name, command]).stdout


def outside(sim: SimCloud, *words: str, given: str | None = None) -> Any:
    """What a stranger on the internet sees (outside.py)."""
    return json.loads(sim.run([sys.executable, OUTSIDE, *words], input=given).stdout)


@pytest.fixture(scope="module")
def planted(sim: SimCloud) -> dict[str, str]:
    return plant(sim, PLACES["aws"], "served")


@pytest.fixture(scope="module")
def processes(planted: dict[str, str]) -> Iterator[Processes]:
    """Every process on laptop and node, from before `up` on."""
    found = Processes(planted).start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def served(sim: SimCloud, planted: dict[str, str], processes: Processes) -> dict[str, Any]:
    return up(sim, "--name", "served", env={"HF_TOKEN": planted["token"]})


def test_it_answers_through_the_tunnel_and_only_there(sim: SimCloud, served: dict[str, Any]) -> None:
    assert (served["action"], served["cloud"]) == ("started", "aws")
    phases = [phase["phase"] for phase in served["phases"]]
    assert phases == ["optimize", "provision", "node", "files", *sorted(phases[4:6]), "engine", "check", "gate", "outside"]
    print("phases:", ", ".join(f"{phase['phase']} {phase['seconds']:.1f} s" for phase in served["phases"]))
    lines = sim.run(["mistralctl", "env", "served"]).stdout
    variables = dict(line.removeprefix("export ").split("=", 1) for line in lines.splitlines())
    answer = sim.run([sys.executable, "-c", ASK], env=variables).stdout
    assert "Paris" in answer
    [instance] = sim.instances("aws")
    assert outside(sim, "ports", str(instance.address)) == [22]
    [one] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    assert (one["state"], one["region"], one["machine"]) == ("up", instance.zone, instance.type)
    assert one["launcher"]["engine"]["class"] == CLASS
    assert one["launcher"]["canary"]["state"] == "verified"
    assert one["price"] > 0
    assert 0 < one["cost"] < one["price"]
    assert instance.tags["mistralctl-name"] == "served"
    folder = sim.home / ".mistralctl" / "deployments" / "served"
    assert {line.split()[0] for line in (folder / "known_hosts").read_text().splitlines()} == {f"{instance.id}-0"}
    assert instance.tags["mistralctl-owner"] == (sim.home / ".mistralctl" / "owner").read_text().strip()
    tells_of_its_machine(sim, "served")
    assert 25 < one["idle_left"] <= 30
    assert 600 < one["ttl_left"] <= 720


def test_the_same_again_asks_no_cloud(sim: SimCloud, served: dict[str, Any]) -> None:
    before = len(sim.journal("aws"))
    again = up(sim, "--name", "served")
    assert again["action"] == "unchanged"
    # SkyPilot's API server looks after its machines now and then, by itself.
    assert {call["action"] for call in sim.journal("aws")[before:]} <= {"DescribeInstances"}


def test_a_longer_life_is_in_the_label_and_on_the_node(sim: SimCloud, served: dict[str, Any]) -> None:
    [before] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    longer = json.loads(sim.run(["mistralctl", "extend", "served", "2h", "-o", "json"]).stdout)
    [after] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    assert after["launcher"]["ends_at"] == longer["ends_at"] == before["launcher"]["ends_at"] + 7200
    assert after["ttl_left"] == pytest.approx(before["ttl_left"] + 120, abs=1)
    [instance] = sim.instances("aws")
    assert 840 <= int(instance.tags["mistralctl-ttl"]) < 860  # from the machine's start, which is minutes before the launcher's
    assert instance.tags["mistralctl-name"] == "served"
    folder = sim.home / ".mistralctl" / "deployments" / "served"
    assert {line.split()[0] for line in (folder / "known_hosts").read_text().splitlines()} == {f"{instance.id}-0"}
    assert instance.tags["mistralctl-owner"] == (sim.home / ".mistralctl" / "owner").read_text().strip()


def test_no_keys_of_a_cloud_and_no_secret_but_one_are_on_the_node(
    sim: SimCloud, served: dict[str, Any], planted: dict[str, str], processes: Processes
) -> None:
    assert Path(served["key_file"]) == key_file(sim, "served")
    are_where_they_belong(sim, PLACES["aws"], "served", planted, processes)
    assert {secret for secret, _ in processes.environments} == {"key", "token"}  # the openai client was given the key


def test_commands_go_over_the_tunnels_connection_and_over_their_own_where_that_hangs(
    sim: SimCloud, served: dict[str, Any]
) -> None:
    config = sim.home / ".mistralctl" / "deployments" / "served" / "ssh_config"
    text = config.read_text()
    config.write_text(text.replace("  Port 22\n", "  Port 9\n"))  # where nobody answers
    try:
        [shared] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    finally:
        config.write_text(text)
    assert "Port 22" in text
    assert (shared["state"], shared["why"], shared["launcher"]["state"]) == ("up", "", "ready")
    sim.run(["pkill", "-STOP", "-f", TUNNEL])
    try:
        [alone] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    finally:
        sim.run(["pkill", "-CONT", "-f", TUNNEL])
    assert (alone["state"], alone["launcher"]["state"]) == ("up", "ready")
    assert "its tunnel is not open" in alone["why"]


def test_a_lost_tunnel_comes_back_by_itself_and_by_hand(sim: SimCloud, served: dict[str, Any]) -> None:
    sim.run(["pkill", "-f", TUNNEL])
    deadline = time.monotonic() + 300
    while "8000" not in sim.run(["ss", "-ltn"]).stdout and time.monotonic() < deadline:
        time.sleep(0.3)
    sim.run(["mistralctl", "chat", "served", "-m", "Hello"])
    sim.run(["pkill", "-f", "mistralctl.runtime.tunnel"])
    deadline = time.monotonic() + 300
    while "8000" in sim.run(["ss", "-ltn"]).stdout and time.monotonic() < deadline:
        time.sleep(0.3)
    [one] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    assert "mistralctl connect served" in one["why"]
    assert served["base_url"] in sim.run(["mistralctl", "connect", "served"]).stdout
    sim.run(["mistralctl", "chat", "served", "-m", "Hello"])


def test_a_changed_option_replaces_the_job_on_the_same_machine(sim: SimCloud, served: dict[str, Any]) -> None:
    [before] = sim.instances("aws")
    changed = up(sim, "--name", "served", "--max-model-len", "2048")
    assert changed["action"] == "replaced"
    assert changed["base_url"] == served["base_url"]
    assert [phase["phase"] for phase in changed["phases"]] == ["engine", "check", "gate", "outside"]
    [after] = sim.instances("aws")
    assert after.id == before.id
    assert int(after.tags["mistralctl-ttl"]) > 720  # its life began anew
    [one] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    assert one["launcher"]["engine"]["max_model_len"] == 2048


def test_another_machine_is_only_made_after_a_yes(sim: SimCloud, served: dict[str, Any]) -> None:
    [before] = sim.instances("aws")
    refused = sim.run([*UP, "--name", "served", "--region", "us-east-2"], check=False)
    assert refused.returncode == 5
    assert "needs another machine; m6i.large in us-east-1" in refused.stderr
    assert "--yes" in refused.stderr
    [one] = json.loads(sim.run(["mistralctl", "status", "served", "-o", "json"]).stdout)["items"]
    assert (one["state"], one["why"]) == ("up", "")  # it is served as before, tunnel and all
    assert [one.id for one in sim.instances("aws")] == [before.id]


def test_logs_of_set_up_and_server(sim: SimCloud, served: dict[str, Any]) -> None:
    every = sim.run(["mistralctl", "logs", "served"]).stdout
    assert "Launching on AWS" in every
    assert '"phase": "ready"' in every
    assert len(sim.run(["mistralctl", "logs", "served", "-n", "2"]).stdout.splitlines()) <= 4


def test_down_takes_all_away(sim: SimCloud, served: dict[str, Any], planted: dict[str, str]) -> None:
    before = json.loads(sim.run(["mistralctl", "receipt", "served", "-o", "json"]).stdout)
    assert sim.run(["mistralctl", "down", "served"]).stdout == "served is down\n"
    [instance] = [one for one in sim.instances("aws", gone=True) if one.tags.get("mistralctl-name") == "served"][-1:]
    receipt = json.loads(sim.run(["mistralctl", "receipt", "served", "-o", "json"]).stdout)
    assert receipt == before | {"down_at": receipt["down_at"]}
    assert receipt["down_at"] > receipt["up_at"]
    assert (receipt["cloud"], receipt["region"], receipt["machine"]) == ("aws", instance.region, instance.type)
    assert receipt["price"] > 0
    assert receipt["versions"]["skypilot"] == "0.14.1"
    [file] = receipt["files"]  # as a node that is gone has checked it
    assert (len(file["sha256"]), file["size"] > 90_000_000) == (64, True)
    assert receipt["canary"]["state"] == "verified"
    assert sim.instances("aws") == []
    assert sim.volumes("aws") == []
    assert sim.run(["pgrep", "-f", "mistralctl.runtime.tunnel"], check=False).stdout == ""
    went_with_the_node(sim, PLACES["aws"], "served", planted)
    assert sim.run(["mistralctl", "down", "served"]).stdout == "served was down already\n"


def test_when_every_place_refuses_it_says_which_and_why(sim: SimCloud) -> None:
    sim.fault("aws", "capacity", region="us-east-1")
    sim.fault("aws", "quota", region="us-[ew]*-2")
    sim.fault("aws", "permission", region="us-west-1")
    sim.fault("aws", "capacity", region="[a-tv-z]*")
    try:
        refused = sim.run([*UP, "--name", "refused"], check=False)
    finally:
        sim.clear_faults()
    assert refused.returncode == 8
    print(refused.stderr)
    assert "no cloud gave a machine" in refused.stderr
    assert "us-east-1a" in refused.stderr
    assert "InsufficientInstanceCapacity" in refused.stderr
    assert "VcpuLimitExceeded" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert sim.instances("aws") == []
    [one] = json.loads(sim.run(["mistralctl", "status", "refused", "-o", "json"]).stdout)["items"]
    assert one["state"] == "down"


def test_a_quota_that_is_too_small_stops_before_a_launch(sim: SimCloud) -> None:
    before = len(sim.journal("aws"))
    sim.quota("aws", "L-1216C47A", 1)
    began = time.monotonic()
    try:
        refused = sim.run([*UP, "--name", "quota", "--region", "us-east-1"], check=False)
        table = sim.run(["mistralctl", "plan", MODEL, "--cloud", "aws", "--region", "us-east-1", "--quota"]).stdout
    finally:
        sim.clear_faults()
    print(f"{refused.stderr}{time.monotonic() - began:.1f} s with the plan after it")
    assert refused.returncode == 8
    assert (
        "no quota lets quota run anywhere, so nothing was launched; ask for more at https://us-east-1.console" in refused.stderr
    )
    assert "L-1216C47A Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances  2 vCPUs  1 " in refused.stderr
    assert "TOO SMALL  us-east-1\n" in table
    actions = {call["action"] for call in sim.journal("aws")[before:]}
    assert actions == {"GetServiceQuota"}  # RunInstances is not among them, nor anything of SkyPilot's
    assert sim.run(["mistralctl", "status", "quota"], check=False).returncode == 4


def test_a_laptop_that_is_killed_in_the_middle_leaves_what_down_takes_away(sim: SimCloud) -> None:
    killed_in(sim, "machine ...")


def killed_in(sim: SimCloud, phase: str) -> None:
    """The command is killed in a phase of `up`; `down` takes away what is there by then."""
    process = sim.popen([*UP, "--name", "killed"])
    assert process.stderr
    for line in process.stderr:
        if line.startswith(phase):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)
    done = sim.run(["mistralctl", "down", "killed"])
    assert done.stdout.startswith("killed ")
    assert sim.instances("aws") == []
    assert sim.volumes("aws") == []


def test_a_mirror_runs_on_a_machine_of_the_cloud_that_is_gone_afterwards(sim: SimCloud) -> None:
    mirrors(sim, PLACES["aws"], "s3://models/copy")


def test_a_gpu_machine_comes_to_the_launchers_exact_command_line(sim: SimCloud, tmp_path: Path) -> None:
    comes_to_the_command_line(sim, PLACES["aws"], tmp_path)
    gone(sim, PLACES["aws"], "gpu")
