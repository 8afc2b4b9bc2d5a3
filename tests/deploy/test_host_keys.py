"""A node that shows another host key than at the first connection gets nothing: a real sshd whose keys are changed."""

from __future__ import annotations

import getpass
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mistralctl import endpoint, readiness, state
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Observed
from mistralctl.runtime import following, rented, sky, ssh
from mistralctl.runtime.following import Following
from mistralctl.runtime.protocol import Attempt
from mistralctl.runtime.ssh import Address
from test_status import remember

pytestmark = [pytest.mark.linux, pytest.mark.slow]  # it needs an sshd
CHANGED = r"^mine: its machine shows another host key than at the first connection, so nothing was sent to it; .* delete \S.*/known_hosts and "


def free_port() -> int:
    """A port that is free, and stays so until a server has it: connections take theirs from 32768 on."""
    while not endpoint.is_free(port := 22000 + secrets.randbelow(10000)):
        pass
    return port


class Machine:
    """An sshd of this user's on a port of this machine, with keys of its own; what ran there is what it wrote below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.key = folder / "user"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        self.generate("user", "ed25519")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)

    def generate(self, name: str, kind: str) -> Path:
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", self.folder / name], check=True, stdin=subprocess.DEVNULL)
        return self.folder / name

    def start(self, *host_keys: Path) -> None:
        self.stop()
        options = {
            "ListenAddress": "127.0.0.1", "Port": self.port, "AuthorizedKeysFile": f"{self.key}.pub", "PidFile": "none",
            "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes", "SetEnv": f"HOME={self.folder}",
        }  # fmt: skip
        lines = [f"{key} {value}" for key, value in options.items()] + [f"HostKey {key}" for key in host_keys]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["/usr/sbin/sshd", "-D", "-e", "-f", self.folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=log
            )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def address(self, machine: str) -> Address:
        return Address("127.0.0.1", self.port, getpass.getuser(), str(self.key), machine=machine)

    @property
    def sessions(self) -> int:
        """How many have signed in."""
        return (self.folder / "sshd.log").read_text().count("Accepted publickey")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A deployment `mine` whose machine i-1 was connected to once."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "a home"))
    one = Machine(tmp_path / "machine")
    try:
        one.start(one.generate("first", "ed25519"))
        remember("mine")
        ssh.remember("mine", one.address("i-1"))
        assert ssh.run("mine", "echo there") == "there\n"
        yield one
    finally:
        one.stop()


@pytest.fixture(params=["ed25519", "ecdsa"])
def changed(machine: Machine, request: pytest.FixtureRequest) -> Machine:
    """The same address with another host key: of the same type, or only of a type that was never seen."""
    machine.start(machine.generate("second", request.param))
    return machine


def test_the_first_key_is_remembered_for_its_machine(machine: Machine) -> None:
    [line] = ssh.known_hosts("mine").read_text().splitlines()
    assert line.split()[:2] == ["i-1", "ssh-ed25519"]
    assert ssh.run("mine", "echo again") == "again\n"
    ssh.verify("mine")
    other = free_port()  # the same machine at another address, as after it was stopped
    ssh.remember("mine", replace(machine.address("i-1"), port=other))
    machine.port = other
    machine.start(machine.folder / "first")
    assert ssh.run("mine", "echo moved") == "moved\n"


def test_no_command_and_no_secret_goes_to_a_changed_host(changed: Machine) -> None:
    before = changed.sessions
    calls: list[Callable[[], object]] = [
        lambda: ssh.run("mine", "touch ran"),
        lambda: ssh.write_secrets("mine", {"hf_token": "hf_secret"}),
        lambda: ssh.read_status("mine"),
        lambda: ssh.verify("mine"),
        lambda: rented.Rented().write(state.known("mine"), "run/mine/ends_at", "1\n"),
        lambda: list(rented.Rented().logs(state.known("mine"), follow=False, lines=10)),
    ]
    for call in calls:
        with pytest.raises(ssh.HostKeyChanged, match=CHANGED) as caught:
            call()
        assert caught.value.code == Exit.NETWORK
    ssh.remember("mine", changed.address("i-1"))  # what SkyPilot says once more changes nothing
    ssh.remember("mine", changed.address(""))
    with pytest.raises(ssh.HostKeyChanged):
        ssh.run("mine", "touch ran")
    assert changed.sessions == before
    assert len(ssh.known_hosts("mine").read_text().splitlines()) == 1


def test_another_machine_of_the_deployment_begins_anew_and_the_old_one_is_not_taken_for_it(changed: Machine) -> None:
    ssh.remember("mine", changed.address("i-2"))
    assert ssh.run("mine", "echo new") == "new\n"
    changed.start(changed.folder / "first")
    with pytest.raises(ssh.HostKeyChanged):
        ssh.run("mine", "true")
    ssh.forget_machine("mine")
    ssh.remember("mine", changed.address(""))
    assert ssh.run("mine", "echo forgotten") == "forgotten\n"
    changed.start(changed.folder / "second")
    ssh.remember("mine", changed.address("i-3"))  # it is told its name only now
    with pytest.raises(ssh.HostKeyChanged):
        ssh.run("mine", "true")


def test_the_secrets_sender_does_not_try_again(changed: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rented, "learn", lambda record: record)
    sender = rented.SecretsSender(state.known("mine"), {"hf_token": "hf_secret"})
    with pytest.raises(ssh.HostKeyChanged):
        sender.finish()
    assert not list(changed.folder.rglob("secrets.json"))


@pytest.mark.parametrize("way", ["start", "replace"])
def test_up_sends_no_task_to_a_machine_that_has_changed(changed: Machine, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("launch", "replace_job"):
        monkeypatch.setattr(sky, name, lambda *_: pytest.fail("SkyPilot was given the task"))
    monkeypatch.setattr(rented, "learn", lambda record: record)
    monkeypatch.setattr(rented.Rented, "_begin", lambda *_: None)
    record = replace(state.known("mine"), task={"name": "mine", "resources": {}, "envs": {}})
    attempt = Attempt(record, {}, Observed("up", {}), lambda event: None, state.save, time.time())
    with pytest.raises(ssh.HostKeyChanged):
        getattr(rented.Rented(), way)(attempt)


def test_the_log_is_not_followed_there(changed: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.05)
    followed = Following("mine", "mctl-mine", 7, state.folder("mine") / "serve.log", lambda line: None)
    with pytest.raises(ssh.HostKeyChanged):
        followed.wait(30, lambda: False, lambda: False)


def test_the_tunnel_ends_and_says_why(changed: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = changed.sessions
    done = subprocess.run(
        [sys.executable, "-m", "mistralctl.runtime.tunnel", "mine"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mine: its machine shows another host key than at the first connection")
    monkeypatch.setattr(rented, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(readiness, "reached", lambda record: False)
    with pytest.raises(ssh.HostKeyChanged):
        rented.reach(state.known("mine"))
    assert changed.sessions == before


def test_mistralctl_ssh_says_it_in_one_line(changed: Machine) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mistralctl", "ssh", "mine", "true"], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (Exit.NETWORK, 1)
    assert "its machine shows another host key" in done.stderr


def test_a_node_that_cannot_be_reached_is_no_changed_one(machine: Machine) -> None:
    machine.stop()
    ssh.verify("mine")
    with pytest.raises(UserError, match="cannot be reached over SSH") as caught:
        ssh.run("mine", "true")
    assert not isinstance(caught.value, ssh.HostKeyChanged)


@pytest.mark.parametrize("written", ["{} {}", "{},192.0.2.1 {}", "{}\t{}", "  {} {}", "hashed", "other {}", ""])
@pytest.mark.parametrize("port", [22, 2222])
def test_a_key_is_known_however_its_line_was_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, written: str, port: int
) -> None:
    """Else a key of another type would be taken as a first one."""
    monkeypatch.setenv("MISTRALCTL_HOME", str(home))
    ssh.remember("mine", ssh.Address("192.0.2.1", port, "ubuntu", "/key", machine="i-1"))
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFakeFakeFakeFakeFakeFakeFakeFakeFakeFakeFakeFak"
    line = "i-1 {}" if written == "hashed" else written
    state.write_private(ssh.known_hosts("mine"), line.format(*(["i-1", key] if line.count("{}") == 2 else [key])) + "\n")
    if written == "hashed":
        subprocess.run(["ssh-keygen", "-H", "-f", ssh.known_hosts("mine")], check=True, capture_output=True)
    ssh.command("mine", "true")
    assert (ssh.STRICT in ssh.config_file("mine").read_text()) == (written not in ("", "other {}"))
