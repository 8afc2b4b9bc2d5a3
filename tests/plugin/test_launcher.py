"""How the launcher fails and when it ends, without a server where one is not needed."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import vllm_mistral
from checkpoints import mistral_tokenizer, write
from mistral_contract import files, keys, routes
from mistral_contract.figures import FILE
from mistral_node import contract, disk, engine, engines, pulse, serve, traffic
from mistral_node.client import Client
from mistral_node.contract import Code, LaunchError
from mistral_node.engines import vllm
from mistral_node.phases import Status
from mistral_node.traffic import Traffic
from nodes import KEY, Launcher, free_port, known, launched, variables, write_secrets
from safetensors.torch import load_file, save_file

POPEN = subprocess.Popen


@pytest.fixture
def node_dir(tmp_path: Path) -> Path:
    """A node with weights that can be served."""
    shape = {"vocab_size": 32000, "hidden_size": 64, "sliding_window": 128, "max_position_embeddings": 4096}
    mistral_tokenizer(write(tmp_path / "weights" / "tiny", **shape), "tokenizer.model.v1")
    return tmp_path


def failed(launcher: Launcher, code: Code, says: str, seconds: float = 600) -> None:
    """The launcher ends with this code, and says why in one line: in its log and in the status file."""
    assert launcher.wait(seconds) == code, launcher.log.read_text()[-3000:]
    lines = [line for line in launcher.log.read_text().splitlines() if line.startswith("mistralctl-phase ")]
    event = json.loads(lines[-1].split(" ", 1)[1])
    assert event["event"] == "fail"
    assert says in event["message"]
    assert len(event["message"]) < 700
    status = launcher.status()
    if code is not Code.CONTRACT:
        assert (status["state"], status["error"]) == ("failed", {"code": int(code), "message": event["message"]})


def test_a_bad_contract(tmp_path: Path) -> None:
    with launched(tmp_path, DTYPE="int8") as launcher:
        failed(launcher, Code.CONTRACT, "MISTRALCTL_DTYPE should be one of")
        assert "Traceback" not in launcher.log.read_text()


def test_missing_weights(tmp_path: Path) -> None:
    with launched(tmp_path) as launcher:
        failed(launcher, Code.WEIGHTS, "weights/tiny is missing; run mistralctl up again")


def test_a_plugin_that_does_not_load_is_named_with_its_true_cause(node_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = node_dir / "site" / "vllm_mistral"
    shutil.copytree(Path(vllm_mistral.__file__).parent, broken)
    (broken / "model.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.setenv("PYTHONPATH", str(node_dir / "site"))
    with launched(node_dir) as launcher:
        failed(launcher, Code.PLUGIN, "ModuleNotFoundError: No module named 'a_module_that_is_not_there'")


def test_a_port_in_use_is_named(node_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with launched(node_dir, PORT=str(other.getsockname()[1])) as launcher:
            failed(launcher, Code.ENGINE, "cannot be used: Address already in use")


def test_on_a_node_the_port_of_a_server_that_is_ending_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "predecessors", lambda name: pytest.fail("nobody is to be ended yet"))
    with socket.create_server(("127.0.0.1", 0)) as ending:
        port = ending.getsockname()[1]
        with monkeypatch.context() as short:
            short.setattr(serve, "PORT_SECONDS", 0.2)
            with pytest.raises(LaunchError, match="cannot be used"):
                serve.until_free("127.0.0.1", port, threading.Event(), "test")
        closing = threading.Timer(0.5, ending.close)
        closing.start()
        serve.until_free("127.0.0.1", port, threading.Event(), "test")
        closing.join()


def test_of_two_homes_with_the_same_port_the_second_is_told_at_once(node_dir: Path) -> None:
    """vLLM binds long before it listens: both could bind, and the second would wait for its own /health for half an hour."""
    port = free_port()
    holds = "from mistral_contract import ports; held = ports.hold({0}); print('held', flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holds.format(port)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            LaunchError, match=f"^port {port} is held by another deployment on this machine; choose another --port$"
        ):
            engine.check_port("127.0.0.1", port)
        other.kill()
    engine.check_port("127.0.0.1", port)
    engine.check_port("127.0.0.1", port)  # by the same launcher, whose server starts again


LAUNCHER = """
import signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: print("told", flush=True))
server = socket.create_server(("127.0.0.1", int(sys.argv[2])))
print("there", flush=True)
time.sleep(300)
"""


def test_on_a_node_an_earlier_launcher_that_hangs_is_told_and_then_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    ports, logged, heard = [free_port() for _ in range(3)], list[str](), list[str]()
    monkeypatch.setenv("MISTRALCTL_NODE_DIR", "/a")

    class Patient(threading.Event):
        """Goes on once the hung one has said that it was told."""

        def wait(self, timeout: float | None = None) -> bool:
            if logged and not heard and hung.stdout:
                heard.append(hung.stdout.readline())
            return super().wait(timeout)

    hung, another, elsewhere = (
        subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, "mistral_node.serve", str(port)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"MISTRALCTL_NAME": name, "MISTRALCTL_NODE_DIR": folder},
        )
        for port, name, folder in zip(ports, ("test", "another", "test"), ("/a", "/a", "/b"), strict=True)
    )  # fmt: skip
    try:
        for process in (hung, another, elsewhere):
            assert process.stdout
            assert process.stdout.readline() == "there\n"
        assert [one.pid for one in serve.predecessors("test")] == [hung.pid]
        monkeypatch.setattr(serve, "TERM_SECONDS", 0.2)
        monkeypatch.setattr(serve, "KILL_SECONDS", 0.4)
        monkeypatch.setattr(serve.log, "line", logged.append)
        serve.until_free("127.0.0.1", ports[0], Patient(), "test")
        assert hung.wait(300) == -signal.SIGKILL
        assert heard == ["told\n"]
        assert (another.poll(), elsewhere.poll()) == (None, None)
    finally:
        for process in (hung, another, elsewhere):
            process.kill()
            process.communicate()


def test_on_a_gpu_the_memory_of_a_server_that_is_ending_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By nvidia-smi, which here names three processes: one of this deployment, one of another, and one that is gone."""
    ending, another, gone = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], env={"MISTRALCTL_NAME": name})
        for name in ("test", "another", "test")
    )
    try:
        gone.kill()
        gone.wait()
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f'#!/bin/sh\n[ "$*" = "--query-compute-apps=pid --format=csv,noheader" ] || exit 2\n'
                       f'printf "{ending.pid}\\n{another.pid}\\n[N/A]\\n{gone.pid}\\n{ending.pid}\\n"\n')  # fmt: skip
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
        wanted = contract.read(variables(tmp_path, DEVICE="cuda", KV_CACHE_GIB="", MEMORY_UTILIZATION="0.92"))
        with monkeypatch.context() as short:
            short.setattr(serve, "GPU_SECONDS", 0.2)
            serve.until_gpu_free(wanted, threading.Event())
        said = capsys.readouterr().out
        assert f"waits until an earlier server (processes {ending.pid}) gives the GPU's memory back\n" in said
        assert "not given back within 0 s; starts nevertheless" in said
        killer = threading.Timer(0.5, lambda: (ending.kill(), ending.wait()))
        killer.start()
        began = time.monotonic()
        serve.until_gpu_free(wanted, threading.Event())
        assert ending.poll() is not None
        assert time.monotonic() - began < 30
        assert "starts nevertheless" not in capsys.readouterr().out
        assert another.poll() is None
        user = psutil.Process(another.pid).username()  # on a node: whatever runs as vLLM's own user is this deployment's
        assert serve.gpu_holders(dataclasses.replace(wanted, serve_user=user)) == [another.pid]
        for text in ("#!/bin/sh\necho No devices were found\nexit 6\n", "#!/bin/sh\nexit 0\n"):
            smi.write_text(text)
            assert serve.gpu_holders(wanted) == []
        smi.unlink()
        assert serve.gpu_holders(wanted) == []
    finally:
        for process in (ending, another, gone):
            process.kill()
            process.wait()


def test_a_context_longer_than_the_models_is_named(node_dir: Path) -> None:
    with launched(node_dir, MAX_MODEL_LEN="5000") as launcher:
        failed(launcher, Code.ENGINE, "max_model_len (5000) is greater than the derived max_model_len")


def test_another_model_is_named_before_vllm_starts(node_dir: Path) -> None:
    config = node_dir / "weights" / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    with launched(node_dir) as launcher:
        failed(launcher, Code.WEIGHTS, "config.json: hidden_act = 'gelu' asks for a computation that the class does not have")
        assert "starts " not in launcher.log.read_text()


def test_a_tensor_without_a_place_is_named_from_inside_the_engine(node_dir: Path) -> None:
    file, name = node_dir / "weights" / "tiny" / "model.safetensors", "model.layers.0.self_attn.q_proj.bias"
    save_file(load_file(file) | {name: torch.ones(128)}, file, metadata={"format": "pt"})
    with launched(node_dir) as launcher:
        failed(launcher, Code.ENGINE, f"ValueError: {name} is a bias, and the class has none; this is not the model that its")


def test_an_engine_that_is_killed_is_named_with_what_may_have_done_it(node_dir: Path) -> None:
    with launched(node_dir) as launcher:
        servers: list[psutil.Process] = []
        while not servers and launcher.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                below = psutil.Process(launcher.process.pid).children(recursive=True)
                servers = [process for process in below if "mistral_node.start" in process.cmdline()]
            time.sleep(0.1)
        assert servers
        servers[0].kill()
        failed(
            launcher,
            Code.ENGINE,
            "vLLM was killed (signal 9): by somebody, or by the kernel because the machine's memory was full",
        )


def test_an_engine_that_hangs_is_called_stuck_and_its_server_is_started_again(
    node_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from mistral_node import pulse\npulse.SECONDS, pulse.MISSED_SECONDS, pulse.STUCK_SECONDS = 0.5, 10.0, 20.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    with launched(node_dir, RESTART="1") as launcher:
        first = launcher.until("ready")
        time.sleep(11)
        quiet = launcher.status()  # nobody asked, and it is not called stuck
        assert (quiet["state"], quiet["requests"]) == ("ready", {"served": 0, "running": 0, "last_at": None})
        [core] = [process for process in launcher.children if "EngineCore" in " ".join(process.cmdline())]
        core.suspend()
        launcher.until("stuck")
        assert launcher.ask("/health", key=None)[0] == 200  # its server does not know
        core.resume()
        launcher.until("ready")
        before = launcher.children
        core.suspend()
        launcher.until("stuck")
        launcher.until("starting")
        again = launcher.until("ready")
        assert again["restarts"]["why"] == "vLLM's engine answered nothing for 20 s; see mistralctl logs"
        assert (again["restarts"]["count"], again["ready_at"], again["pid"]) == (1, first["ready_at"], first["pid"])
        assert not [process for process in before if process.is_running() and process.status() != "zombie"]
        launcher.json("/v1/completions", body)
        launcher.until_served(1)


def test_a_server_that_is_killed_is_started_again_with_its_log_kept_as_often_as_asked(node_dir: Path) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    with launched(node_dir, RESTART="1") as launcher:
        first = launcher.until("ready")
        launcher.json("/v1/completions", body)
        launcher.until_served(1)
        before = launcher.children
        [server] = [
            process for process in before if "mistral_node.start" in process.cmdline() and process.ppid() != launcher.process.pid
        ]
        (launcher.run_dir / files.GATE.name).unlink()
        server.kill()
        launcher.until("starting")
        assert launcher.status()["restarts"]["count"] == 1
        second = launcher.until("ready")
        assert not [process for process in before if process.is_running() and process.name() != "python" and process.ppid() == 1]
        assert second["restarts"] == {
            "count": 1,
            "of": 1,
            "why": f"vLLM {engine.KILLED}; see mistralctl logs",
            "at": second["restarts"]["at"],
        }
        assert (second["ready_at"], second["requests"]["served"], second["error"]) == (first["ready_at"], 1, None)
        assert routes.read((launcher.run_dir / files.GATE.name).read_text()).fault() == ""
        one = [(phase, event) for phase in ("engine", "check", "gate") for event in ("start", "end")] + [("ready", "end")]
        assert launcher.phases() == one * 2
        log = launcher.log.read_text()
        assert log.count("\nstarts ") + log.startswith("starts ") == 2
        assert f"restart 1 of 1 in 5 s, because vLLM {engine.KILLED}" in log
        launcher.json("/v1/completions", body)
        [core] = [process for process in launcher.children if "EngineCore" in " ".join(process.cmdline())]
        core.kill()  # a process of the engine that dies alone is named, too
        failed(launcher, Code.ENGINE, vllm.WITHOUT_A_WORD)
        assert not [process for process in (*before, *launcher.children) if process.is_running() and process.status() != "zombie"]


HOLE = """
_lifespan = Guard._lifespan

async def _leaky(self, scope, receive, send):
    scope["app"].add_api_route("/leak", lambda: {"a": "secret"})
    await _lifespan(self, scope, receive, send)

Guard._lifespan = _leaky
OPEN = OPEN | {("GET", "/leak")}
"""


def test_a_route_that_answers_without_a_key_ends_it_before_anybody_is_let_in(
    node_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = node_dir / "site" / "mistral_node"
    shutil.copytree(Path(serve.__file__).parent, broken)
    with (broken / "guard.py").open("a") as guard:
        guard.write(HOLE)
    monkeypatch.setenv("PYTHONPATH", str(node_dir / "site"))
    answers = set()
    with launched(node_dir, RESTART="2") as launcher:
        while launcher.process.poll() is None:
            for path in ("/leak", "/health"):
                with suppress(OSError, http.client.HTTPException):
                    answers.add(launcher.ask(path)[0])
            time.sleep(0.05)
        failed(
            launcher, Code.GATE, "the gate found open what should be shut (GET /leak answered 200, 200, 200; asked with no key,"
        )
        assert answers == {503}
        assert ("gate", "fail") in launcher.phases()
        assert launcher.status()["restarts"]["count"] == 0
    assert {str(row) for row in routes.read((launcher.run_dir / files.GATE.name).read_text()).rows if not row.right} == {
        "GET /leak answered 200, 200, 200"
    }


@pytest.mark.parametrize(
    ("ready_at", "code", "count", "again"),
    [
        (1.0, Code.ENGINE, 0, True),
        (1.0, Code.ENGINE, 1, True),
        (1.0, Code.ENGINE, 2, False),
        (None, Code.ENGINE, 0, False),
        (1.0, Code.CANARY, 0, False),
        (1.0, Code.GATE, 1, False),
    ],
)
def test_only_a_server_that_died_after_one_was_ready_is_started_again(
    tmp_path: Path, ready_at: float | None, code: Code, count: int, again: bool
) -> None:
    wanted = dataclasses.replace(contract.read(variables(tmp_path)), restart=2)
    status = Status(tmp_path / "status.json", ready_at=ready_at)
    status.set(restarts={**status.fields["restarts"], "count": count})
    assert serve._again(wanted, status, LaunchError(code, "why")) is again
    assert not serve._again(dataclasses.replace(wanted, restart=0), status, LaunchError(code, "why"))


def test_each_restart_waits_longer_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds: waits.append(seconds))
    wanted = dataclasses.replace(contract.read(variables(tmp_path)), restart=8)
    status = Status(tmp_path / "status.json")
    for _ in range(8):
        serve._pause(wanted, status, LaunchError(Code.ENGINE, "it died"), threading.Event())
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]
    assert capsys.readouterr().out.splitlines()[1] == "restart 2 of 8 in 10 s, because it died"
    assert (status.fields["restarts"]["count"], status.fields["restarts"]["why"], status.fields["state"]) == (
        8,
        "it died",
        "starting",
    )
    asked = threading.Event()
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds: True)
    with pytest.raises(serve._Asked):
        serve._pause(wanted, status, LaunchError(Code.ENGINE, "it died"), asked)


DEAD = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
FAILED_CORE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"


@pytest.mark.parametrize(
    ("said", "kills", "why"),
    [
        ([DEAD], 7, f"{vllm.WITHOUT_A_WORD}; see"),
        ([DEAD], 8, f"{vllm.WITHOUT_A_WORD}: {engine.MEMORY_FULL}; see"),
        ([FAILED_CORE], 8, f"{vllm.WITHOUT_A_WORD}: {engine.MEMORY_FULL}; see"),
        (["(EngineCore pid=7) ValueError: too long", DEAD], 8, "vLLM ended with code 0: ValueError: too long; see"),
        (["bye"], 8, "vLLM ended with code 0: bye; see"),
    ],
)
def test_what_an_engine_died_of_that_said_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], kills: int, why: str
) -> None:
    monkeypatch.setattr(vllm, "check_class", lambda: None)
    monkeypatch.setattr(engine, "VMSTAT", tmp_path / "vmstat")
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 7\n")
    quiet = [sys.executable, "-c", "\n".join(f"print({line!r})" for line in said)]
    monkeypatch.setattr(engine.subprocess, "Popen", lambda command, **options: POPEN(quiet, **options))
    found = engine.Engine(engine.Command(vllm), Client("http://127.0.0.1:9", KEY))
    found.process.wait()
    (tmp_path / "vmstat").write_text(f"nr_free_pages 5\noom_kill {kills}\n")
    with pytest.raises(LaunchError, match=re.escape(why)):
        found.raise_if_dead()
    (tmp_path / "vmstat").unlink()
    assert engine.out_of_memory_kills() == 0


def test_an_engine_that_computes_something_else_is_named_before_it_is_ended(node_dir: Path) -> None:
    figures = {"prompt_token_ids": [1, 2, 3], "forced_token_ids": [4, 5], "logprobs": [-100.0, -100.0]}
    (node_dir / "weights" / "tiny" / FILE).write_text(json.dumps(figures))
    with launched(node_dir) as launcher:
        failed(launcher, Code.CANARY, "the engine does not compute what the weights say: a log-probability differs by")
        log = launcher.log.read_text()
        assert 0 < log.index('"event": "fail"') < log.index("[shutdown] API server: shutdown triggered")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_ends_early_leaves_nothing(node_dir: Path, sign: signal.Signals) -> None:
    with launched(node_dir) as launcher:
        started: list[psutil.Process] = []
        while not started:
            started = psutil.Process(launcher.process.pid).children(recursive=True)
            time.sleep(0.1)
        time.sleep(3)
        started = psutil.Process(launcher.process.pid).children(recursive=True)
        launcher.process.send_signal(sign)
        assert launcher.wait(300) == (0 if sign is signal.SIGTERM else -sign)
        _, left = psutil.wait_procs(started, timeout=600)
        assert not left
        if sign is signal.SIGTERM:
            assert launcher.status()["state"] == "stopped"


def waiting_for(node_dir: Path, *names: str) -> contract.Contract:
    return contract.read(variables(node_dir, SECRETS=json.dumps(names)))


def test_no_secrets_in_time(tmp_path: Path) -> None:
    wanted = waiting_for(tmp_path, "tls_key")
    with pytest.raises(LaunchError, match="no secrets came within 0 s") as caught:
        serve.wait_for_secrets(wanted, threading.Event(), seconds=0)
    assert caught.value.code is Code.SECRETS
    for text, problem in (
        ("", "is no JSON object of texts"),
        ("{}", "has no tls_key"),
        ('{"tls_key": ""}', "has no tls_key"),
        ("[]", "is no JSON"),
    ):
        write_secrets(tmp_path).write_text(text)
        with pytest.raises(LaunchError, match=f"{problem}.* within 0 s"):
            serve.wait_for_secrets(wanted, threading.Event(), seconds=0)


def test_what_the_task_does_not_name_is_not_waited_for(tmp_path: Path) -> None:
    assert serve.wait_for_secrets(waiting_for(tmp_path), threading.Event()) == {}
    assert serve._sent_figures(tmp_path / "run" / "test") == []
    write_secrets(tmp_path, figures='[{"weights": "x"}]')
    assert serve._sent_figures(tmp_path / "run" / "test") == [{"weights": "x"}]


def test_secrets_that_others_can_read(tmp_path: Path) -> None:
    write_secrets(tmp_path, hf_token=KEY).chmod(0o640)
    with pytest.raises(LaunchError, match="run chmod 600 on it") as caught:
        serve.wait_for_secrets(waiting_for(tmp_path, "hf_token"), threading.Event())
    assert caught.value.code is Code.SECRETS
    assert KEY not in str(caught.value)


def test_secrets_that_come_late_and_in_two_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "POLL_SECONDS", 0.02)
    found: list[dict[str, str]] = []
    wanted = waiting_for(tmp_path, "hf_token")
    waiter = threading.Thread(target=lambda: found.append(serve.wait_for_secrets(wanted, threading.Event(), seconds=300)))
    waiter.start()
    time.sleep(0.1)
    file = write_secrets(tmp_path)
    file.write_text('{"hf_tok')
    time.sleep(0.1)
    file.write_text(json.dumps({"hf_token": "t"}))
    waiter.join(300)
    assert found == [{"hf_token": "t"}]


def test_the_tasks_keys_are_taken_unless_newer_ones_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run" / "test" / "keys" / "keys.json"

    def settled(serial: int) -> int:
        serve.settle_keys(contract.read(variables(tmp_path, KEYS=known(serial).dump())))
        return keys.read(file.read_text()).serial

    assert settled(3) == 3
    assert file.stat().st_mode & 0o777 == 0o644  # the server may be another user; it is hashes only
    assert (settled(2), settled(3), settled(5)) == (3, 3, 5)
    file.write_text("{")
    assert settled(1) == 1
    assert "the task's keys replace it" in capsys.readouterr().out
    assert KEY not in file.read_text()


def test_without_any_key_nothing_starts(tmp_path: Path) -> None:
    with launched(tmp_path, KEYS="") as launcher:
        failed(
            launcher, Code.CONTRACT, "MISTRALCTL_KEYS names no key, so nobody could ask; start the deployment with mistralctl up"
        )
    with launched(tmp_path, KEYS='{"version": 2, "serial": 1, "keys": []}') as launcher:
        failed(launcher, Code.CONTRACT, "MISTRALCTL_KEYS version 2 is not known here, only 1")


def test_the_engine_must_be_ours_and_have_the_window(tmp_path: Path) -> None:
    wanted = contract.read(variables(tmp_path))
    facts = {"class": "vllm_mistral.model.MistralSWAForCausalLM", "architecture": "MistralSWAForCausalLM", "sliding_window": 128}
    file = tmp_path / files.ENGINE.name

    def refused(**changed: Any) -> str:
        file.write_text(json.dumps(facts | changed))
        with pytest.raises(LaunchError) as caught:
            engines.check(vllm, wanted, tmp_path)
        assert caught.value.code is Code.CLASS
        return str(caught.value)

    stock = {"class": "vllm.x.MistralForCausalLM", "architecture": "MistralForCausalLM"}
    assert "MistralForCausalLM, not MistralSWAForCausalLM" in refused(**stock)
    assert "the window 4096, 128 was asked for" in refused(sliding_window=4096)
    assert "the window None, 128 was asked for" in refused(sliding_window=None)
    file.unlink()
    with pytest.raises(LaunchError, match="its own class, not MistralSWAForCausalLM"):
        engines.check(vllm, wanted, tmp_path)
    file.write_text(json.dumps(facts))
    assert engines.check(vllm, wanted, tmp_path) == facts


class Alive:
    """An engine that never dies."""

    kind = vllm

    def raise_if_dead(self) -> None:
        pass


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Waits as a ready launcher does, with times in minutes; gives why and after how many seconds it ended."""
    monkeypatch.setattr(serve, "POLL_SECONDS", 0.02)
    traffic = Traffic(tmp_path, fresh=True)

    def wait(asked: threading.Event | None = None, **times: float) -> tuple[str, float]:
        wanted = dataclasses.replace(contract.read(variables(tmp_path)), **times)
        began = time.monotonic()
        why = serve._serve(wanted, Alive(), traffic, Status(tmp_path / "status.json"), asked or threading.Event())  # type: ignore[arg-type]
        return why, time.monotonic() - began

    wait.traffic = traffic  # type: ignore[attr-defined]
    return wait


def test_an_engine_that_answers_nothing_is_stuck_and_ends_its_server(
    ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "MISSED_SECONDS", 0.2)
    monkeypatch.setattr(pulse, "STUCK_SECONDS", 0.6)
    with pytest.raises(LaunchError, match="engine answered nothing for 1 s") as found:
        ready(ttl_minutes=1)
    assert found.value.code is Code.ENGINE
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stuck"


def test_an_engine_that_answers_now_and_then_is_ready(ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "MISSED_SECONDS", 0.4)
    monkeypatch.setattr(pulse, "STUCK_SECONDS", 0.8)
    looks: list[float] = []

    def now() -> float:
        """Between two looks 0.3 s pass; it answers before each second one."""
        looks.append(0.3 * len(looks))
        if len(looks) % 2:
            ready.traffic.beat()
        return looks[-1]

    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=now))
    assert "lifetime" in ready(ttl_minutes=1 / 60)[0]
    assert len(looks) > 6
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "ready"


def test_a_second_signal_while_the_engine_is_told_something_is_told_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bytes] = []

    class Pipe(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            told.append(bytes(data))
            if len(told) == 1:
                signals._heard(signal.SIGTERM, None)
            return len(data)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    running = SimpleNamespace(stdin=io.BufferedWriter(Pipe()), wait=lambda seconds: 0)
    one = object.__new__(engine.Engine)
    one.process = running  # type: ignore[assignment]
    one._reader = threading.Thread(target=str)
    one._reader.start()
    try:
        signals = serve._Signals()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    signals.asked.set()
    signals.engine = one
    others = threading.enumerate()
    one.end(1)
    for thread in set(threading.enumerate()) - set(others):
        thread.join(300)
    assert signals.hurried
    assert told == [b"end\n", b"kill\n"]


def test_two_launchers_that_write_a_status_at_once_each_write_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, others = tmp_path / "status.json", Path.write_text, list[bool]()

    def between(self: Path, text: str, encoding: str) -> int:
        done = write(self, text, encoding)
        if text == "one":
            with ThreadPoolExecutor() as pool:
                others.append(pool.submit(disk.replaced, file, "other").result())
        return done

    monkeypatch.setattr(Path, "write_text", between)
    assert disk.replaced(file, "one")
    assert others == [True]
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_the_end_of_a_long_request_is_never_one_of_long_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher reads while the guard writes, and ends an idle server."""
    counted, now, seen = Traffic(tmp_path, fresh=True), [1000.0], list[float]()
    monkeypatch.setattr(traffic.time, "time", lambda: now[0])
    counted.begin()
    now[0] = 9000.0

    class Between:
        size = traffic.COUNTS.size

        def pack_into(self, *given: Any, pack: Any = traffic.COUNTS.pack_into) -> None:
            seen.append(counted.read().last_at)
            pack(*given)

    monkeypatch.setattr(traffic, "COUNTS", Between())
    counted.end()
    assert seen == [9000.0]
    assert (counted.read().served, counted.read().running) == (1, 0)


def test_a_launcher_that_slept_itself_has_seen_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now)
    beat = pulse.Pulse(7)
    now += 3600
    assert beat.silent(7) == pulse.LONGEST_LOOK
    now += 1
    assert beat.silent(7) == pulse.LONGEST_LOOK + 1
    assert beat.silent(8) == 0


def test_it_ends_when_nobody_asks(ready: Any) -> None:
    why, seconds = ready(idle_minutes=0.5 / 60)
    assert "nobody asked anything" in why
    assert 0.5 <= seconds < 25


def test_a_request_puts_the_idle_end_off_and_a_running_one_holds_it(ready: Any) -> None:
    began = time.monotonic()  # before the request, so that no time of it is missed
    ready.traffic.begin()
    asker = threading.Timer(1.0, ready.traffic.end)
    asker.start()
    ready(idle_minutes=0.4 / 60)
    assert 1.4 <= time.monotonic() - began < 25
    asker.join()


def test_its_lifetime_ends_also_with_requests(ready: Any) -> None:
    ready.traffic.begin()
    why, seconds = ready(ttl_minutes=0.5 / 60, idle_minutes=0.1)
    assert "lifetime" in why
    assert seconds < 25


def test_a_budget_is_spent_by_price_and_time_since_the_machine_began(ready: Any, tmp_path: Path) -> None:
    file = tmp_path / "run" / "test" / files.PAID_FROM.name
    file.parent.mkdir(parents=True)
    file.write_text(f"{time.time() - 3595:.0f}\n")  # 5 s of the hour that it buys are left
    why, _ = ready(budget=0.8, price=0.8, ttl_minutes=60)
    assert why == "its budget of 0.80 USD is spent"
    assert time.time() >= int(file.read_text()) + 3600
    said = json.loads((tmp_path / "status.json").read_text())
    assert said["budget"]["ends_at"] == said["ends_at"] == said["budget"]["paid_from"] + 3600
    file.unlink()  # of a launcher that was started by hand
    assert ready(budget=0.8, price=1440.0)[0] == "its budget of 0.80 USD is spent"


def test_a_later_end_in_the_file_counts_and_what_is_no_time_does_not(ready: Any, tmp_path: Path) -> None:
    file = tmp_path / "run" / "test" / files.ENDS_AT.name
    file.parent.mkdir(parents=True)
    end = int(time.time()) + 2
    file.write_text(f"{end}\n")
    assert ready(ttl_minutes=0.2 / 60)[0] == "its lifetime is over"
    assert end <= time.time() < end + 25
    file.write_text("soon\n")
    assert 0.2 <= ready(ttl_minutes=0.2 / 60)[1] < 25
    file.write_text("1\n")
    assert "nobody asked" in ready(idle_minutes=0.2 / 60)[0]  # without a ttl there is no end


def test_a_signal_that_came_by_two_ways_is_one() -> None:
    hurried: list[str] = []
    kept = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        signals = serve._Signals()
        signals.engine = type("Engine", (), {"hurry": lambda self: hurried.append("once")})()  # type: ignore[assignment]
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert (signals.asked.is_set(), signals.hurried, hurried) == (True, False, [])
        time.sleep(serve.SAME_SECONDS)
        signal.raise_signal(signal.SIGTERM)
        assert (signals.hurried, hurried) == (True, ["once"])
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), kept, strict=True):
            signal.signal(number, handler)


def test_a_signal_ends_it(ready: Any) -> None:
    asked = threading.Event()
    threading.Timer(0.2, asked.set).start()
    assert ready(asked)[0] == "it was asked to"


def test_draining_waits_for_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path, fresh=True)
    guard_side = Traffic(tmp_path)
    guard_side.begin()
    threading.Timer(0.5, guard_side.end).start()
    signals = type("Signals", (), {"hurried": False})()
    status = Status(tmp_path / "status.json")
    began = time.monotonic()
    serve._drain(traffic, status, signals)
    assert 0.4 < time.monotonic() - began < 25
    assert guard_side.draining
    assert status.fields["requests"]["running"] == 0
    assert status.fields["requests"]["served"] == 1


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (
            [
                "(EngineCore pid=7) ERROR 11-24 01:48:00 [core.py:9] ValueError: too small",
                "RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "ValueError: too small",
        ),
        (["OSError: [Errno 98] Address already in use"], "OSError: [Errno 98] Address already in use"),
        (
            [
                "pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, max_model_len is too large [type=value_error, input_value=ArgsKwargs(())]",
            ],
            "max_model_len is too large",
        ),
        (["torch.OutOfMemoryError: CUDA out of memory."], "torch.OutOfMemoryError: CUDA out of memory."),
        (["killed", ""], "killed"),
        ([], "it said nothing"),
    ],
)
def test_the_cause_in_vllms_output(lines: list[str], named: str) -> None:
    assert engine.cause(lines) == named
