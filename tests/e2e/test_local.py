"""The main job, for real: the task's own setup and run, vLLM, our class, real weights, the openai client."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import tiny
from mistralctl import state
from mistralctl.endpoint import is_free
from running import LITTLE, MODEL, Cli, down, share_node

# Who is not root makes the namespaces inside a user namespace of their own.
NAMESPACES = ["unshare"] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
CLASS = "vllm_mistral.model.MistralSWAForCausalLM"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cli, dict[str, Any]]]:
    """One server for the tests that only look at it, and the result of its `up`."""
    import sys

    cli = Cli(share_node(tmp_path_factory.mktemp("served") / "home"), [sys.executable, "-m", "mistralctl"], PLANTED="x")
    try:
        yield cli, cli.json("up", MODEL, *LITTLE, "--cloud", "local", "--name", "served", "--idle", "never")
    finally:
        down(cli)


def client(cli: Cli, key: str | None = None) -> openai.OpenAI:
    found = cli.json("env", "served")
    return openai.OpenAI(base_url=found["base_url"], api_key=key or found["api_key"], max_retries=0)


def test_up_says_what_it_did(served: tuple[Cli, dict[str, Any]]) -> None:
    result = served[1]
    assert result["action"] == "started"
    assert {phase["phase"] for phase in result["phases"]} == {"environment", "weights", "engine", "check", "gate", "outside"}
    assert all(phase["seconds"] >= 0 for phase in result["phases"])
    assert result["answer"].strip()
    assert "Paris" in result["answer"]


def test_the_gate_walked_every_route_and_let_in_the_short_list(served: tuple[Cli, dict[str, Any]]) -> None:
    cli, result = served
    assert result["gate"]["let_in"] == {
        "GET /health": [200, 200, 200], "GET /v1/models": [401, 401, 200], "POST /v1/completions": [401, 401, 400],
        "POST /v1/chat/completions": [401, 401, 400],
    }  # fmt: skip
    assert result["gate"]["routes"] > 20
    table = (cli.home / "deployments" / "served" / "gate.txt").read_text()
    assert [line.split()[2:] for line in table.splitlines() if line.startswith("GET ") and "/version" in line] == [
        ["401", "401", "404"]
    ]
    routes = json.loads((cli.home / "node" / "run" / "served" / "shared" / "routes.json").read_text())
    logged = [line for line in cli("logs", "served").stdout.splitlines() if "Route: " in line]
    assert len(routes) >= len(logged) > 20  # all that vLLM itself lists, and what is mounted


def test_chat_completion_and_streams(served: tuple[Cli, dict[str, Any]]) -> None:
    api = client(served[0])
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    whole = api.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=16)
    assert "Paris" in (whole.choices[0].message.content or "")
    stream = api.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=16, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 2
    assert "".join(pieces) == whole.choices[0].message.content
    text = api.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8).choices[0].text
    streamed = api.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    assert "Paris" in text
    assert [model.id for model in api.models.list()] == [MODEL]


def test_a_wrong_key_is_refused(served: tuple[Cli, dict[str, Any]]) -> None:
    with pytest.raises(openai.AuthenticationError):
        client(served[0], key="wrong").models.list()


def test_our_class_served_the_answer(served: tuple[Cli, dict[str, Any]]) -> None:
    [status] = served[0].json("status", "served")
    engine = status["launcher"]["engine"]
    assert (engine["class"], engine["architecture"]) == (CLASS, "MistralSWAForCausalLM")
    assert status["launcher"]["requests"]["served"] > 0
    assert status["idle_left"] is None
    assert 700 < status["ttl_left"] <= 720


def assert_fit(cli: Cli, *arguments: str, engine: dict[str, Any]) -> dict[str, Any]:
    """The plan's arithmetic is the running vLLM's; the plan's fit."""
    plan = cli.json("plan", *arguments, "--cloud", "local")
    fit: dict[str, Any] = plan["options"][0]["fit"]
    assert fit["cache_tokens"] == engine["num_blocks"] * engine["block_size"]
    assert fit["request_tokens"] == engine["blocks_per_request"] * engine["block_size"]
    assert fit["concurrency"] == pytest.approx(engine["max_concurrency"], abs=0.01)
    return fit


def test_the_plan_computes_what_vllm_reports(served: tuple[Cli, dict[str, Any]]) -> None:
    [status] = served[0].json("status", "served")
    assert_fit(served[0], MODEL, *LITTLE, engine=status["launcher"]["engine"])
    log = served[0]("logs", "served").stdout
    assert f"{status['launcher']['engine']['max_concurrency']:.2f}x" in log  # vLLM's own line


def test_up_again_has_nothing_to_do(served: tuple[Cli, dict[str, Any]]) -> None:
    cli = served[0]
    pid = cli.json("status", "served")[0]["launcher"]["pid"]
    again = cli.json("up", MODEL, *LITTLE, "--cloud", "local", "--name", "served", "--idle", "never")
    assert again["action"] == "unchanged"
    assert again["base_url"] == served[1]["base_url"]
    assert cli.json("status", "served")[0]["launcher"]["pid"] == pid


def test_it_listens_on_loopback_only_and_the_key_is_on_no_command_line(served: tuple[Cli, dict[str, Any]]) -> None:
    cli, result = served
    port = int(result["base_url"].rsplit(":", 1)[1].split("/")[0])
    processes = cli.processes()
    assert len(processes) >= 3
    listening = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert "127.0.0.1" in listening
    assert not {"0.0.0.0", "::"} & {ip for p in processes for ip in _listening(p, port)}
    key = Path(result["key_file"]).read_text().strip()
    assert len(key) > 40
    for process in processes:
        assert key not in " ".join(process.cmdline())
        assert key not in str(process.environ())


def _listening(process: psutil.Process, port: int) -> list[str]:
    return [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]


def test_the_key_is_in_one_private_file_and_nowhere_else(served: tuple[Cli, dict[str, Any]]) -> None:
    cli, result = served
    key = Path(result["key_file"]).read_text().strip().encode()
    holders = []
    for folder, _, files in os.walk(cli.home):
        for name in files:
            path = Path(folder) / name
            if path.is_file() and key in path.read_bytes():
                holders.append(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [str(path.relative_to(cli.home)) for path in holders] == ["deployments/served/api_key"]


def test_chat_and_env_on_the_command_line(served: tuple[Cli, dict[str, Any]]) -> None:
    cli, result = served
    assert "Paris" in cli("chat", "served", "-m", "What is the capital of France?").stdout
    lines = cli("env", "served").stdout.splitlines()
    assert lines[0] == f"export OPENAI_BASE_URL={result['base_url']}"
    assert lines[1].startswith("export OPENAI_API_KEY=mctl-")
    assert json.loads(cli("env", "served", "--shell", "json").stdout)["OPENAI_MODEL"] == result["served_model_name"]
    assert cli("logs", "served", "-n", "1").stdout.count("\n") == 1


def test_a_longer_life_is_taken_up_and_said(served: tuple[Cli, dict[str, Any]]) -> None:
    cli = served[0]
    [before] = cli.json("status", "served")
    longer = cli.json("extend", "served", "2h")
    assert list(longer) == ["name", "by", "ends_at", "ttl_left"]
    [after] = cli.json("status", "served")
    assert after["launcher"]["ends_at"] == longer["ends_at"] == before["launcher"]["ends_at"] + 7200
    assert after["ttl_left"] == pytest.approx(before["ttl_left"] + 120, abs=1)
    assert re.fullmatch(
        r"served lives 1d longer: until [-0-9]+ [0-9:]+, 3[78]\.\dh from now\n", cli("extend", "served", "1d").stdout
    )
    error = cli("extend", "served", "364d", code=2).stderr
    assert error == "mistralctl: DURATION: served would end in 366 days; 365 days is the longest life\n"


def test_the_receipt_has_what_was_served(served: tuple[Cli, dict[str, Any]]) -> None:
    cli, result = served
    receipt = cli.json("receipt", "served")
    assert receipt["phases"] == result["phases"]
    assert receipt["versions"] == {"mistralctl": "0.1.0", "skypilot": None, "vllm": "0.32.0", "torch": "2.13.0+cpu"}
    [file] = receipt["files"]
    weights = cli.home / "node" / "weights" / receipt["task"]["envs"]["MISTRALCTL_WEIGHTS_ID"] / file["name"]
    with weights.open("rb") as content:
        assert hashlib.file_digest(content, "sha256").hexdigest() == file["sha256"]
    assert receipt["flags"][receipt["flags"].index("--middleware") + 1] == "mistral_node.front.Guard"
    assert (receipt["engine"]["class"], receipt["canary"]["state"], receipt["down_at"]) == (CLASS, "verified", None)
    now = cli.json("doctor", "--node", "served")
    assert list(now) == list(receipt["node"])
    assert now["kernel"] == receipt["node"]["kernel"] == os.uname().release
    assert "memory      " in cli("doctor", "--node", "served").stdout
    assert cli("doctor", "--node", "nobody", code=4).stderr.startswith("mistralctl: ")


def test_what_is_served_is_evaluated_and_nothing_is_asked_twice(served: tuple[Cli, dict[str, Any]]) -> None:
    cli, _ = served
    before = cli.json("status", "served")[0]["launcher"]["requests"]["served"]
    found = cli.json("eval", "served", "--tasks", "hellaswag_100", "--limit", "2")
    assert [(one["task"], one["metric"], one["n"]) for one in found["values"]] == [
        ("hellaswag_100", "acc", 2),
        ("hellaswag_100", "acc_norm", 2),
    ]
    assert found["requests"] == {"all": 8, "asked": 8, "sent": 10, "refused": 0}
    assert all(one["low"] <= one["value"] <= one["high"] for one in found["values"])
    again = cli("eval", "served", "--tasks", "hellaswag_100", "--limit", "2")
    assert "8 requests, 8 of them answered before: nothing is asked\n" in again.stderr
    assert "8 requests, 0 of them asked now" in again.stdout
    deadline = time.monotonic() + 60
    while cli.json("status", "served")[0]["launcher"]["requests"]["served"] < before + 12:
        assert time.monotonic() < deadline
    assert cli.json("receipt", "served")["evaluations"] == {MODEL: found["file"]}
    [acc, _] = cli.json("eval", "--compare", "served", found["file"])["rows"]
    assert (acc["difference"], acc["sigmas"], acc["paired"]) == (0.0, 0.0, True)
    assert f"serves no other; it serves {MODEL}" in cli("eval", "served", "--model", "other", code=4).stderr
    key = (cli.home / "deployments" / "served" / "api_key").read_text().strip()
    folder = Path(found["file"]).parent
    assert not [path for path in folder.rglob("*") if path.is_file() and key in path.read_text("utf-8", "replace")]


def test_another_name_cannot_have_the_same_port(served: tuple[Cli, dict[str, Any]]) -> None:
    cli, result = served
    port = result["base_url"].rsplit(":", 1)[1].split("/")[0]
    error = cli("up", MODEL, "--cloud", "local", "--name", "other", "--port", port, code=5).stderr
    assert error == f"mistralctl: --port: port {port} belongs to another deployment; give another one\n"
    assert [one["name"] for one in cli.json("status")] == ["served"]


def test_a_changed_model_replaces_the_server_on_the_same_port_and_down_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    weights = state.home() / "node" / "weights"
    tokenizer = next(path for path in weights.glob("smollm2-135m-instruct-*.hf2"))
    folder = tiny.write(tmp_path / "tiny", tokenizer)
    first = cli.json("up", str(folder), "--cloud", "local", "--name", "life", "--dtype", "float32")
    [status] = cli.json("status", "life")
    engine = status["launcher"]["engine"]
    assert (engine["class"], engine["sliding_window"], engine["kv_cache_spec"]) == (CLASS, 1000, "SlidingWindowSpec")
    fit = assert_fit(cli, str(folder), "--dtype", "float32", engine=engine)
    assert fit["concurrency"] > 2 * fit["concurrency_without_window"]
    made = first["canary"]
    assert (made["state"], made["max_difference"]) == ("made here", None)
    assert made == status["launcher"]["canary"] == cli.json("receipt", "life")["canary"]
    assert "check: made here: the first start of these weights, later ones are compared with it, made on a CPU by vLLM" in (
        cli("status", "life").stdout
    )
    (
        cli.home / "node" / "canaries" / f"{made['weights']}.json"
    ).unlink()  # as on another machine: only the laptop knows the figures

    second = cli.json("up", str(folder), "--cloud", "local", "--name", "life", "--max-model-len", "4096", "--dtype", "float32")
    assert second["action"] == "replaced"
    assert second["base_url"] == first["base_url"]
    assert (second["canary"]["state"], second["canary"]["against"]) == ("verified", made["against"])
    assert second["canary"]["max_difference"] < 0.01
    assert cli.json("status", "life")[0]["launcher"]["engine"]["max_model_len"] == 4096

    port = int(second["base_url"].rsplit(":", 1)[1].split("/")[0])
    assert cli("down", "life").stdout == "life is down\n"
    assert cli.processes() == []
    assert is_free(port)
    assert not (cli.home / "node" / "run" / "life").exists()
    assert cli("down", "life").stdout == "life was down already\n"
    assert "there is no deployment 'never'" in cli("down", "never", code=4).stderr
    assert cli.json("status", "life")[0]["state"] == "down"


def test_an_adapter_is_evaluated_beside_its_base_and_replaced_by_one_that_is_there_and_right(cli: Cli, tmp_path: Path) -> None:
    weights = state.home() / "node" / "weights"
    folder = tiny.write(tmp_path / "tiny", next(path for path in weights.glob("smollm2-135m-instruct-*.hf2")))
    adapter = tiny.adapter(tmp_path / "sql", 1)
    command = ("up", str(folder), *LITTLE, "--cloud", "local", "--name", "adapted", "--dtype", "float32", "--lora")

    def launcher() -> dict[str, Any]:
        [status] = cli.json("status", "adapted")
        assert status["state"] == "up"
        found: dict[str, Any] = status["launcher"]
        return found

    assert cli.json(*command, f"sql={adapter}")["action"] == "started"
    first = launcher()
    assert first["adapters"]["sql"]["state"] == "answers"
    assert cli.json(*command, f"sql={adapter}")["action"] == "unchanged"
    evaluate = ("eval", "adapted", "--tasks", "hellaswag_100", "--limit", "2")
    base, tuned = cli.json(*evaluate), cli.json(*evaluate, "--model", "sql")
    assert (base["requests"]["asked"], tuned["requests"]["asked"], tuned["model"]) == (8, 8, "sql")
    beside = cli.json("eval", "--compare", "adapted", "adapted/sql")
    assert (beside["second"], [row["paired"] for row in beside["rows"]]) == ("adapted/sql", [True, True])
    served, deadline = first["requests"]["served"] + 20, time.monotonic() + 60
    while (first := launcher())["requests"]["served"] < served:
        assert time.monotonic() < deadline

    # An adapter of the same name that is not there, not even at the node's set-up, leaves the server as it was.
    cli.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    error = cli(*command, "sql=hf://nobody/nothing", "--offline", code=9).stderr
    assert "hf://nobody/nothing" in error or "what reads hf could not be installed" in error
    assert launcher() == first
    tiny.adapter(adapter, 2)
    config = adapter / "adapter_config.json"
    good = config.read_text()
    config.write_text(good.replace("}", ', "use_dora": true}'))
    assert "it uses DoRA" in cli(*command, f"sql={adapter}", code=10).stderr
    assert launcher() == first
    config.write_text(good)

    again = cli.json(*command, f"sql={adapter}")
    assert again["action"] == "replaced"
    assert launcher()["pid"] != first["pid"]
    assert launcher()["adapters"]["sql"]["max_difference"] != first["adapters"]["sql"]["max_difference"]
    asked = [cli.json(*evaluate, *more)["requests"]["asked"] for more in ((), ("--model", "sql"))]
    assert asked == [0, 8]  # of the base, which stayed, and of the adapter, which is another one
    assert "sql" in [model.id for model in openai.OpenAI(
        base_url=again["base_url"], api_key=cli.json("env", "adapted")["api_key"]).models.list()]  # fmt: skip


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_up_leaves_nothing_half_done(cli: Cli, sign: signal.Signals) -> None:
    process = cli.start("up", MODEL, *LITTLE, "--cloud", "local", "--name", "cut")
    deadline = time.monotonic() + 300
    log = cli.home / "deployments" / "cut" / "up.log"
    while not (log.exists() and '"engine", "event": "start"' in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(sign)
    _, err = process.communicate(timeout=600)
    if sign is signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "mistralctl: interrupted; nothing was left half-done"
        assert cli.json("status") == []
    else:  # nobody could clean up; whoever comes next does
        assert cli.json("down", "cut") == [{"name": "cut", "was": "up", "left": ""}]
    assert cli.processes() == []
    assert not (cli.home / "node" / "run" / "cut").exists()


def test_a_port_that_another_program_has_is_refused_before_anything_is_made(cli: Cli) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        error = cli("up", MODEL, "--cloud", "local", "--port", port, code=5).stderr
    assert error == f"mistralctl: --port: port {port} is taken by another program; stop that program or give another --port\n"
    assert cli.json("status") == []


def test_a_full_disk_is_named_before_anything_is_made(tmp_path: Path) -> None:
    """On a file system of 64 MiB, in a mount namespace of its own."""
    import sys

    small = tmp_path / "small"
    small.mkdir()
    script = 'mount -t tmpfs -o size=64m none "$MISTRALCTL_HOME" && exec "$@"'
    cli = Cli(small, [*NAMESPACES, "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "mistralctl"])
    error = cli("up", MODEL, "--cloud", "local", code=6).stderr
    assert error.startswith(f"mistralctl: {small}/node: 8.5 GiB are needed and 0.1 GiB are free; free some space or set ")


def test_without_a_network_the_weights_are_named(cli: Cli) -> None:
    """In a network namespace without any interface; the environment is there already."""
    cli.command = [*NAMESPACES, "--net", *cli.command]
    error = cli("up", MODEL, "--cloud", "local", "--name", "cut", "--weights", "hf://nobody/nothing", code=7).stderr
    assert error.startswith("mistralctl: hf://nobody/nothing: ")
    assert error.endswith(" cannot be reached (ConnectError); check the network\n")
    error = cli("up", MODEL, "--cloud", "local", "--name", "cut", "--weights", "hf://nobody/nothing", "--offline", code=9).stderr
    assert error.count("mistralctl: ") == 1
    [last] = [line for line in error.splitlines() if line.startswith("mistralctl: ")]
    assert last.startswith(
        (
            "mistralctl: what reads hf could not be installed; check the network",
            "mistralctl: mistral_weights: hf://nobody/nothing: ",
        )
    )
    [status] = cli.json("status")
    assert (status["name"], status["state"]) == ("cut", "failed")
    assert cli.processes() == []


def test_the_record_of_a_deployment_holds_no_secret(served: tuple[Cli, dict[str, Any]]) -> None:
    record = json.loads((served[0].home / "deployments" / "served" / "record.json").read_text())
    assert "secrets" not in record["task"]
    assert "api_key" not in json.dumps(record)


def test_a_hung_launcher_is_ended_from_outside_with_all_that_it_started(served: tuple[Cli, dict[str, Any]]) -> None:
    """The last test of this server."""
    cli = served[0]
    [status] = cli.json("status", "served")
    assert len(cli.processes()) >= 3
    os.kill(status["launcher"]["pid"], signal.SIGSTOP)
    began = time.monotonic()
    (cli.home / "node" / "run" / "served" / "ends_at").write_text("1\n")
    while cli.processes() and time.monotonic() - began < 300:
        time.sleep(0.5)
    assert cli.processes() == []
    assert 30 < time.monotonic() - began < 300
    assert "the launcher outlived its lifetime; it is ended from outside\n" in cli("logs", "served").stdout
    assert cli.json("status", "served")[0]["state"] == "lost"
    error = cli("extend", "served", "1h", code=9).stderr
    assert error == "mistralctl: served: its launcher has not taken the new end; mistralctl status served says why\n"
