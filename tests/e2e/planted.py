"""Secrets that can be told from everything else, planted before an `up`; and the only places where they may be after it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from deployments import Place
from mistral_contract import files, keys
from mistralctl import state
from running import launchers
from secrets_search import Processes, in_files
from simcloud import SimCloud


def plant(sim: SimCloud, place: Place, name: str) -> dict[str, str]:
    """A key in the file where mistralctl keeps that of deployment `name`, a `token` for the hub, and the laptop's own of the cloud."""
    key = f"mctl-planted-{secrets.token_urlsafe(32)}"
    state.write_private(key_file(sim, name), f"{key}\n")
    return {"key": key, "token": f"hf_planted{secrets.token_hex(16)}"} | {each: sim.credentials[each] for each in place.secrets}


def key_file(sim: SimCloud, name: str) -> Path:
    return sim.home / ".mistralctl" / "deployments" / name / "api_key"


def _is_printed_env(path: Path) -> bool:
    """Whether it is what `mistralctl env` printed, which is the key on purpose."""
    return path.parent.name == "runs" and path.read_text().startswith("export OPENAI_BASE_URL=")


def are_where_they_belong(sim: SimCloud, place: Place, name: str, planted: dict[str, str], processes: Processes) -> None:
    """Looks through everything that `up` wrote, on laptop and node, and every process's arguments and environment.

    `name` has been brought up with HF_TOKEN; a second `up` that fails with a traceback is made here.
    """
    key, receipt = key_file(sim, name), key_file(sim, name).with_name("receipt.json")
    again, token = [*place.up, "--name"], {"HF_TOKEN": planted["token"]}
    sim.fault(place.cloud, "capacity", region=place.region)
    try:
        words = [again[0], "--debug", *again[1:], "refused", "--region", place.region]
        debug = sim.run(words, check=False, env=token)
    finally:
        sim.clear_faults()
    assert "Traceback" in debug.stderr
    [instance] = sim.instances(place.cloud)
    node = sim.root / place.cloud / "nodes" / instance.id
    root = Path(f"/proc/{launchers(sim.root, name)[0].pid}/root")
    # `control` makes sure that the search finds what is there: SkyPilot keeps the task with this hash, also encoded.
    sought = planted | {"control": json.loads(receipt.read_text())["task"]["envs"]["MISTRALCTL_SERVING_ID"]}
    laptop = in_files([sim.home, sim.root / "tmp", sim.root / "runs"], sought)
    there = in_files([node, root / "run", root / "dev" / "shm"], sought)
    print(f"secrets: {place.cloud}: {laptop.files} files with {laptop.bytes:,} bytes on the laptop, {there.files} with "
          f"{there.bytes:,} on the node, {processes.seen} processes")  # fmt: skip
    run = node / "upper" / "home" / "ubuntu" / ".mistralctl" / "run" / name
    assert {each: there.hits[each] for each in planted if there.hits[each]} == {}
    assert keys.digest(planted["key"]) in (run / files.KEYS.name / files.KEYS_FILE.name).read_text()
    assert not (run / "secrets.json").exists()  # nothing was to be sent
    assert [path for path in laptop.hits["key"] if not _is_printed_env(path)] == [key]
    assert laptop.hits["token"] == []
    for secret in place.secrets:
        assert laptop.hits[secret] == [sim.home / place.secrets_file]
    for path in (key, receipt):
        assert path.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in laptop.hits["control"]} >= {"record.json", "receipt.json"}
    assert [path for path in laptop.hits["control"] if path.is_relative_to(sim.home / ".sky") and ".db" in path.name]
    assert there.hits["control"]
    assert processes.seen > 100
    assert processes.arguments == set()
    # What was given to `up` in a variable is in its own process (and in that of the test which starts it), and goes no further.
    # The key is in the environment of the openai client, to whom `mistralctl env` gives it there.
    told = {"key": "import openai", "token": " up "}
    assert "token" in {secret for secret, _ in processes.environments} <= set(told)
    assert [command for secret, command in processes.environments if told[secret] not in command] == []
    dry = sim.run([*again, name, "--dry-run"], env=token).stdout
    assert not [secret for secret in planted.values() if secret in dry or secret in str(instance.tags)]


def went_with_the_node(sim: SimCloud, place: Place, name: str, planted: dict[str, str]) -> None:
    """After `down` the key is in its file here, and nothing is anywhere else."""
    left = in_files([sim.home, sim.root / "tmp", sim.root / place.cloud], {each: planted[each] for each in ("key", "token")})
    assert left.hits == {"key": [key_file(sim, name)], "token": []}
