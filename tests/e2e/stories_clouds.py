"""Failure stories on each simulated cloud, longer than what every test run should take: `make e2e`; -k gcp for one cloud.

Each line that is printed is a row of the table: the story, the cloud, that it passed, and how long it took.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from deployments import (
    AUTOSTOP_SECONDS,
    PLACES,
    Place,
    comes_to_the_command_line,
    gone,
    gpu,
    mirrors,
    on_node,
    replaces_the_job,
    simulated,
    status,
    story,
    up,
    when,
)
from mistral_node.tls import self_signed
from mistralctl import images
from planted import are_where_they_belong, plant, went_with_the_node
from roles import exceeded
from running import on_nodes
from secrets_search import Processes
from simcloud import SimCloud


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return PLACES[request.param]


@pytest.fixture(scope="module")
def sim(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimCloud]:
    with simulated(tmp_path_factory.mktemp(place.cloud), [place.cloud]) as sim:
        yield sim
        assert exceeded(sim, place.cloud) == set()


@pytest.fixture(autouse=True)
def no_faults(sim: SimCloud) -> Iterator[None]:
    yield
    sim.clear_faults()


def launches(sim: SimCloud, place: Place, since: int) -> list[str]:
    """The calls for a machine in the journal from a line on."""
    actions = [str(event.get("action")) for event in sim.journal(place.cloud)[since:]]
    return [action for action in actions if action.endswith(("RunInstances", "nsert", "virtualMachines/write"))]


def test_zone_after_zone_refuses_and_the_next_region_gives(sim: SimCloud, place: Place) -> None:
    with story("every zone of the cheapest region refuses, the next region gives", place.cloud):
        sim.fault(place.cloud, "capacity", region=place.region)
        result = up(sim, place, "moved")
        [instance] = sim.instances(place.cloud)
        assert instance.region != place.region
        assert result["answer"]
        assert status(sim, "moved")["region"] == instance.zone
        gone(sim, place, "moved")


def test_a_spot_machine_that_is_taken_is_said_and_brought_back(sim: SimCloud, place: Place) -> None:
    with story("a spot machine is taken while it serves; up brings it back", place.cloud):
        up(sim, place, "cheap", "--spot")
        [before] = sim.instances(place.cloud)
        assert before.spot
        sim.preempt(before.id)
        one = status(sim, "cheap")
        assert (one["state"], "took its spot machine away" in one["why"]) == (place.taken, True)
        if place.taken == "stopped":  # its disk stays, costs, and is reaped with it
            assert "it is deallocated and its disk still costs " in one["why"]
            assert 0 < one["price"] < 0.1
            [left] = json.loads(sim.run(["mistralctl", "reap", "--cloud", place.cloud, "--dry-run", "-o", "json"]).stdout)[
                "parts"
            ]
            assert left["per_day"] == pytest.approx(one["price"] * 24, abs=0.01)
        assert up(sim, place, "cheap", "--spot")["action"] == "started"
        [after] = sim.instances(place.cloud)
        assert (after.id == before.id) == (place.taken == "stopped")
        gone(sim, place, "cheap")


def test_a_spot_machine_that_is_taken_while_it_trains_is_gone_on_with(sim: SimCloud, place: Place) -> None:
    with story("a spot machine is taken while it trains; the same command goes on, publishes, and the machine goes", place.cloud):
        data, out = sim.home / "chats.jsonl", f"{place.weights.rpartition('/')[0]}/tuned"
        pair = (
            '{"messages": [{"role": "user", "content": "What is the code of %d?"}, {"role": "assistant", "content": "ZX %d"}]}\n'
        )
        data.write_text("".join(pair % (number, number) for number in range(20)), "utf-8")
        words = [
            "mistralctl", "finetune", "smollm2-135m-instruct", "--cloud", place.cloud, "--weights", place.weights, "--data", str(data), "--out", out,
            "--name", "tuned", "--spot", "--epochs", "4",
        ]  # fmt: skip
        first = sim.popen(words)
        when(lambda: _checkpoints(sim, place) > 1, 1500)  # of which the first is uploaded
        assert status(sim, "tuned")["state"] == "running"
        [before] = sim.instances(place.cloud)
        assert before.spot
        sim.preempt(before.id)
        said = first.communicate(timeout=300)[1]
        assert first.returncode != 0
        assert "the same command goes on from the last checkpoint" in said
        done = json.loads(sim.run([*words, "-o", "json"], timeout=1200).stdout)
        assert (done["action"], done["out"], done["usd"] > 0) == ("trained", out, True)
        log = (sim.home / ".mistralctl" / "deployments" / "tuned" / "serve.log").read_text("utf-8")
        assert "; goes on at step " in log
        assert sim.instances(place.cloud) == []
        assert status(sim, "tuned")["state"] == "down"
        assert json.loads(sim.run([*words, "-o", "json"]).stdout)["action"] == "unchanged"


def _checkpoints(sim: SimCloud, place: Place) -> int:
    """How many sealed checkpoints the run's machine holds."""
    for process in on_nodes(sim.root, "tuned"):
        folder = Path(f"/proc/{process.pid}/root/home/{place.user}/.mistralctl/run/tuned/tune/checkpoints")
        with contextlib.suppress(OSError):
            return len(list(folder.glob("*/mistral-weights.json")))
    return 0


@pytest.mark.parametrize("place", ["azure", "gcp"], indirect=True, scope="module")
def test_a_changed_option_replaces_the_job_and_a_mirror_runs_on_a_machine_of_its_own(sim: SimCloud, place: Place) -> None:
    """What tests/e2e/test_aws.py shows on AWS, here as well."""
    with story("a changed option replaces the job on its machine; a mirror runs on one of its own", place.cloud):
        replaces_the_job(sim, place, up(sim, place, "served"))
        gone(sim, place, "served")
        mirrors(sim, place, place.weights.replace("smollm2", "copy"))


def test_two_at_once_are_one(sim: SimCloud, place: Place) -> None:
    with story("two up of the same name at once", place.cloud):
        first = sim.popen([*place.up, "--name", "twice", "-o", "json"])
        deadline = time.monotonic() + 300
        while not (sim.home / ".mistralctl" / "deployments" / "twice" / "lock.by").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = sim.run([*place.up, "--name", "twice"], check=False)
        assert second.returncode == 5
        assert "is being brought up or down already" in second.stderr
        out, _ = first.communicate(timeout=600)
        assert json.loads(out)["action"] == "started"
        assert len(sim.instances(place.cloud)) == 1
        gone(sim, place, "twice")


def test_a_laptop_that_is_killed_in_each_phase_goes_on(sim: SimCloud, place: Place) -> None:
    with story("kill -9 in each phase of one up after the other, then one that is left alone", place.cloud):
        for phase in ("choice of machine", "machine", "SkyPilot's runtime", "files", "weights", "engine", "check", "gate"):
            process = sim.popen([*place.up, "--name", "again"])
            assert process.stderr
            seen = any(line.startswith((f"{phase} ...", f"{phase} on it")) for line in process.stderr)
            process.kill()
            process.communicate(timeout=600)
            assert seen, phase
        assert up(sim, place, "again")["answer"]
        assert len(sim.instances(place.cloud)) == 1
        gone(sim, place, "again")


def test_a_server_that_dies_leaves_exactly_what_it_said(sim: SimCloud, place: Place) -> None:
    with story("vLLM dies on the node; its log is here and up starts it again", place.cloud):
        result = up(sim, place, "dies")
        on_node(sim, "dies", "sudo pkill -9 -f '[m]istral_node.start'")
        deadline = time.monotonic() + 300
        while status(sim, "dies")["state"] == "up" and time.monotonic() < deadline:
            time.sleep(1)
        one = status(sim, "dies")
        assert one["state"] == "failed"
        assert "vLLM was killed (signal 9)" in one["why"]
        kept = Path(result["log"]).with_name("serve.log").read_text()
        assert kept.rindex("vLLM was killed") > kept.index('"phase": "ready"')  # also what it said after up had ended
        assert '"phase": "ready"' in sim.run(["mistralctl", "logs", "dies"]).stdout
        assert up(sim, place, "dies")["action"] == "started"
        assert "vLLM was killed" in Path(result["log"]).with_name("serve.before.log").read_text()
        gone(sim, place, "dies")


def test_a_public_server_shows_the_users_certificate_to_the_networks_that_are_allowed(
    sim: SimCloud, place: Place, tmp_path: Path
) -> None:
    with story("--public --cert --allow: the user's certificate, the firewall's rule narrowed, then widened", place.cloud):
        cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        for path, text in zip((key, cert), self_signed(["llm.example.org"]), strict=True):
            path.write_text(text)
        options = ["--public", "--cert", str(cert), "--key", str(key)]
        result = up(sim, place, "public", *options, "--allow", "127.0.0.0/24")
        assert (result["base_url"], result["gate"]["routes"] > 20) == ("https://llm.example.org:8000/v1", True)
        [instance] = sim.instances(place.cloud)
        assert instance.address

        def reachable() -> list[list[str]]:
            return [rule["ports"]["8000"] for rule in sim.firewalls(place.cloud) if "8000" in rule["ports"]]

        assert reachable() == [["127.0.0.0/24"]]
        assert sim.run(["mistralctl", "chat", "public", "-m", "Hello"]).stdout.strip()
        named = [
            "--cacert",
            str(cert),
            "--resolve",
            f"llm.example.org:8000:{instance.address}",
            "https://llm.example.org:8000/health",
        ]
        assert sim.run(["env", "-u", "CURL_CA_BUNDLE", "curl", "-sSf", *named]).returncode == 0
        assert up(sim, place, "public", *options)["action"] == "replaced"
        assert [network for networks in reachable() for network in networks] == ["0.0.0.0/0"]
        gone(sim, place, "public")
        assert reachable() == []


def test_planted_secrets_are_in_their_files_and_nowhere_else(sim: SimCloud, place: Place) -> None:
    with story("planted secrets: every file of laptop and node, every process", place.cloud):
        planted = plant(sim, place, "secret")
        processes = Processes(planted).start()
        try:
            up(sim, place, "secret", env={"HF_TOKEN": planted["token"]})
            are_where_they_belong(sim, place, "secret", planted, processes)
            gone(sim, place, "secret")
        finally:
            processes.stop()
        went_with_the_node(sim, place, "secret", planted)


def test_a_gpu_quota_of_zero_costs_no_attempt(sim: SimCloud, place: Place) -> None:
    with story("a GPU quota of 0 in every region: named, nothing tried", place.cloud):
        sim.quota(place.cloud, place.gpu_quota, 0)
        before = len(sim.journal(place.cloud))
        refused = sim.run([*gpu(place), "--weights", place.weights], check=False)
        print(refused.stderr)
        assert refused.returncode == 8
        assert place.gpu_quota in refused.stderr
        assert "Traceback" not in refused.stderr
        assert sim.journal(place.cloud)[before:]  # asked for the quotas
        assert launches(sim, place, before) == []
        assert sim.instances(place.cloud) == []


def test_a_gpu_machine_whose_image_has_no_driver_is_named(sim: SimCloud, place: Place) -> None:
    with story("a GPU machine type whose image has no NVIDIA driver", place.cloud):
        sim.fault(place.cloud, "no_driver")
        refused = sim.run([*gpu(place), "--weights", place.weights], check=False)
        assert refused.returncode == 9
        assert "this machine shows no NVIDIA GPU (nvidia-smi)" in refused.stderr
        [instance] = sim.instances(place.cloud)
        assert instance.type.startswith(place.gpu_types)
        gone(sim, place, "gpu")


def test_a_driver_that_is_too_old_is_named_with_its_version(sim: SimCloud, place: Place) -> None:
    with story("--image of an old image of which the table knows nothing: its driver is named, and the option", place.cloud):
        refused = sim.run([*gpu(place), "--weights", place.weights, *place.old, "--offline"], check=False)
        print(refused.stderr)
        assert refused.returncode == 9
        assert f"the NVIDIA driver of this image is {place.old_driver} and vLLM's CUDA 13 needs 580 or newer" in refused.stderr
        assert "--image" in refused.stderr
        gone(sim, place, "gpu")


def test_what_the_table_says_cannot_serve_is_never_rented(sim: SimCloud, place: Place) -> None:
    with story("an old image that the table knows, and Azure's A10: refused, nothing rented", place.cloud):
        before = len(sim.journal(place.cloud))
        old = next(one for one in images.known()[place.cloud].rows if one.driver.startswith("535") and not one.grid)
        refused = sim.run([*gpu(place), "--weights", place.weights, "--image", f"{place.cloud}={old.id}"], check=False)
        print(refused.stderr)
        assert (refused.returncode, old.driver in refused.stderr) == (3, True)
        if place.cloud == "azure":
            refused = sim.run([*gpu(place), "--weights", place.weights, "--accelerators", "A10"], check=False)
            print(refused.stderr)
            assert (refused.returncode, "GRID" in refused.stderr) == (3, True)
        assert launches(sim, place, before) == []


def test_a_gpu_machine_comes_to_the_launchers_exact_command_line(sim: SimCloud, place: Place, tmp_path: Path) -> None:
    with story("a GPU machine type up to the launcher's exact command line; there vLLM finds no GPU", place.cloud):
        comes_to_the_command_line(sim, place, tmp_path)
        gone(sim, place, "gpu")


def test_a_mirror_with_figures_is_what_the_first_start_is_verified_by(sim: SimCloud, place: Place, tmp_path: Path) -> None:
    with story(
        "weights mirror --canary: a machine of the cloud computes figures, the first start is verified by them", place.cloud
    ):
        source, copy = (place.weights.replace("smollm2", name) for name in ("plain", "with-figures"))
        sim.put_weights(tiny.write(tmp_path / "tiny", tiny.tokenizer(tmp_path / "tokenizer")), source)
        mirrored = ["mistralctl", "weights", "mirror", source, copy, "--canary", "-o", "json"]
        done = json.loads(sim.run(mirrored, timeout=600).stdout)
        assert (done["source"], done["target"], done["cloud"]) == (source, copy, place.cloud)
        assert sim.instances(place.cloud) == []
        assert "mistralctl-canary.json" in sim.run(["mistralctl", "weights", "ls", copy], timeout=600).stdout
        words = ["mistralctl", "up", copy, "--cloud", place.cloud, "--name", "figured", "--dtype", "float32", "-o", "json"]
        canary = json.loads(sim.run(words, timeout=600).stdout)["canary"]
        print("canary:", canary)
        assert (canary["state"], canary["max_difference"] < 0.01, "reference" in canary["against"]) == ("verified", True, True)
        gone(sim, place, "figured")


def test_a_server_that_nobody_asks_ends_with_its_machine(sim: SimCloud, place: Place) -> None:
    with story("idle for a minute: the server ends by itself, SkyPilot on the node takes the machine away", place.cloud):
        up(sim, place, "idle", "--idle", "1m")
        when(lambda: not sim.instances(place.cloud), 60 + AUTOSTOP_SECONDS)
        assert sim.volumes(place.cloud) == []
        one = status(sim, "idle")
        assert (one["state"], "its machine is gone" in one["why"]) == ("lost", True)
        gone(sim, place, "idle")
