"""A node over SSH: its address and key, commands on it, secrets to it, and the tunnel to its server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_contract import files, keys

from mistralctl import own_files, processes, state, tasks
from mistralctl.errors import Exit, UserError

HOST = "node"
UNREACHED = 255  # how ssh ends if it came to no session
NODE_DIR = tasks.NODE_DIR.replace("~", "$HOME")  # as a shell on the node finds it
CONNECT_SECONDS = 15
SHARED = "ssh.sock"  # how commands go over the tunnel's connection; relative, because a socket's path has to be short
SHARED_SECONDS = 3.0  # the tunnel takes up to 45 s to notice that its connection is dead
# The host keys of a new machine are published nowhere: the first connection remembers one, for that machine alone, and only that one is
# taken from then on. Where one is known, `accept-new` would still take one of another type.
STRICT, FIRST = "StrictHostKeyChecking yes", "StrictHostKeyChecking accept-new"
REFUSED = "Host key verification failed."
OPTIONS = {
    "IdentitiesOnly": "yes",
    "GlobalKnownHostsFile": "/dev/null",
    "HashKnownHosts": "no",
    "UpdateHostKeys": "no",
    "LogLevel": "ERROR",
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_SECONDS),
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "3",
}


@dataclass(frozen=True)
class Address:
    """Where a node's SSH server is, and what to say to it. `proxy_command` is the way into a private network.

    `machine` is the cloud's id of the machine, under which its host key is remembered; empty where SkyPilot does not say it.
    """

    host: str
    port: int
    user: str
    key_file: str
    proxy_command: str = ""
    machine: str = ""


class HostKeyChanged(UserError):
    """A node showed another host key than at the first connection; nothing was sent to it."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: its machine shows another host key than at the first connection, so nothing was sent to it; somebody may stand in "
            f"between. If you changed the machine's keys yourself, delete {known_hosts(name)} and run the same again; otherwise end the "
            f"machine: mistralctl down {name}",
            Exit.NETWORK,
        )


def known_hosts(name: str) -> Path:
    """The host keys of a deployment's machines."""
    return state.folder(name) / "known_hosts"


def config_file(name: str) -> Path:
    """The SSH configuration of a deployment's node, for `ssh -F`."""
    return state.folder(name) / "ssh_config"


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """While this lasts no other command changes the way to a deployment's machine."""
    from filelock import FileLock

    with FileLock(own_files.folder(state.folder(name)) / "ssh.lock", mode=0o600):
        yield


def remember(name: str, address: Address) -> None:
    """Writes the SSH configuration; the key itself stays where SkyPilot keeps it."""
    with _alone(name):
        _remember(name, address)


def _remember(name: str, address: Address) -> None:
    given = {"HostName": address.host, "Port": str(address.port), "User": address.user, "IdentityFile": f'"{address.key_file}"'}
    kept, unnamed = _alias(name), f"machine-of-{name}"
    named = re.sub(r"[^A-Za-z0-9._-]", "_", address.machine)
    # One that had no name keeps its key when it is told one: nothing says that it is another machine.
    given["HostKeyAlias"] = (kept if not named or (kept == unnamed and _is_known(name)) else named) or unnamed
    given["UserKnownHostsFile"] = f'"{known_hosts(name)}"'.replace("%", "%%")
    if address.proxy_command:
        given["ProxyCommand"] = address.proxy_command
    lines = [f"Host {HOST}", *(f"  {key} {value}" for key, value in (given | OPTIONS).items()), f"  {FIRST}"]
    state.write_private(config_file(name), "\n".join(lines) + "\n")


def _alias(name: str) -> str:
    """The name under which the host key of a deployment's machine is remembered; empty if none is."""
    try:
        found = re.search(r"^  HostKeyAlias (.*)$", own_files.read(config_file(name)), re.MULTILINE)
    except FileNotFoundError:
        return ""
    return found[1] if found else ""


def _is_known(name: str) -> bool:
    """Whether a host key of a deployment's machine is remembered."""
    try:
        lines = own_files.read(known_hosts(name)).splitlines()
    except FileNotFoundError:
        return False
    alias = _alias(name)
    if alias in {line.partition(" ")[0] for line in lines}:
        return True
    if not any(map(str.strip, lines)):
        return False
    # Somebody hashed the names, or wrote them otherwise: as ssh itself finds them.
    asked = ["ssh-keygen", "-F", alias, "-f", str(known_hosts(name))]
    return subprocess.run(asked, capture_output=True, check=False, timeout=CONNECT_SECONDS).returncode == 0


def forget_machine(name: str) -> None:
    """Forget the way to a machine and its host key, before there is another one or none."""
    with _alone(name):
        for file in (config_file(name), known_hosts(name)):
            file.unlink(missing_ok=True)


def command(name: str, *arguments: str) -> list[str]:
    """`ssh` to the node of a deployment; UserError if none is known. It takes a new host key only from a machine of which none is remembered."""
    own_files.require(known_hosts(name))
    try:
        if FIRST in own_files.read(config_file(name)) and _is_known(name):  # it may name a command to run
            with _alone(name):  # `remember` may have written another machine's meanwhile
                text = own_files.read(config_file(name))
                if _is_known(name):
                    state.write_private(config_file(name), text.replace(FIRST, STRICT))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name}: no machine is known; run {state.again(name)} first", Exit.NOT_FOUND) from None
    return ["ssh", "-F", str(config_file(name)), *arguments]


def verify(name: str, *, seconds: float = CONNECT_SECONDS + 5) -> None:
    """HostKeyChanged if the node shows another host key than at the first connection; a node that cannot be reached is no matter."""
    try:
        _run(name, [HOST, "true"], "", seconds)
    except HostKeyChanged:
        raise
    except UserError:
        return


def run(name: str, script: str, *, given: str = "", seconds: float = 60) -> str:
    """What a shell script printed on the node; UserError if it cannot be reached or the script fails.

    What only reads goes over the tunnel's connection, which saves both sides the work of a new one, and where that is dead over one of
    its own. What is `given` does not: a connection that comes to life again would run a script late, with nothing given.
    """
    if not given and has_tunnel(name):
        with contextlib.suppress(UserError):
            return _run_shared(name, script, seconds)
    return _run(name, [HOST, script], given, seconds)


def has_tunnel(name: str) -> bool:
    """Whether a tunnel shares its connection, dead or alive."""
    return (state.folder(name) / SHARED).exists()


def _run_shared(name: str, script: str, seconds: float) -> str:
    """Over the tunnel's connection or not at all: where that is gone, ssh would dial by itself, and finds a command that fails instead."""
    over = ["-o", f"ControlPath={SHARED}", "-o", "ProxyCommand=false"]
    return _run(name, [*over, HOST, script], "", min(seconds, SHARED_SECONDS))


def _run(name: str, arguments: Sequence[str], given: str, seconds: float) -> str:
    try:
        done = subprocess.run(
            command(name, *arguments),
            cwd=state.folder(name),
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env=state.without_secrets(os.environ),
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{name}: its machine did not answer over SSH within {seconds:.0f} s", Exit.NETWORK) from None
    if done.returncode:
        if done.returncode == UNREACHED and REFUSED in done.stderr:
            raise HostKeyChanged(name)
        why = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise UserError(f"{name}: its machine cannot be reached over SSH ({why[0]})", Exit.NETWORK)
    return done.stdout


def write_secrets(name: str, secrets: Mapping[str, str]) -> None:
    """Puts the secrets into the node's file of mode 0600, over standard input, so that they are in no argument and no log."""
    folder, text = f"{NODE_DIR}/{files.RUN.of(name)}", json.dumps(dict(secrets))
    file = f"{folder}/{files.SECRETS.name}"
    run(name, f'umask 077; mkdir -p "{folder}" && {received(file, text)} && mv "$new" "{file}"', given=text)


def received(file: str, text: str) -> str:
    """A command of a shell on the node that writes standard input to `$new`, beside a file; it fails unless that is this very text.

    Where the connection is lost, standard input ends early and the shell goes on.
    """
    whole = f'[ "$(sha256sum < "$new")" = "{keys.digest(text)}  -" ]'
    return f'new="{file}.$$.new" && {{ {{ cat > "$new" && {whole}; }} || {{ rm -f "$new"; echo "what was sent was cut off" >&2; false; }}; }}'


def read_status(name: str, *, seconds: float = 20, shared: bool = False) -> str:
    """The launcher's status.json on the node, empty where there is none yet; `shared`: over the tunnel's connection or not at all."""
    file = f'"{NODE_DIR}/{files.STATUS.of(name)}"'
    script = f"[ ! -r {file} ] || exec cat {file}"
    return _run_shared(name, script, seconds) if shared else run(name, script, seconds=seconds)


def can_share(folder: Path) -> bool:
    """Whether a folder's file system has what ssh needs to share a connection there, a Unix socket with a second name; without, ssh ends.

    Goes into the folder, because a socket's whole path may be longer than the kernel takes; so it is for a process of its own.
    """
    made, named = Path(f"{SHARED}.try"), Path(f"{SHARED}.tried")
    try:
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as tried:
            tried.bind(str(made))
        named.hardlink_to(made)
    except OSError:
        return False
    finally:
        for file in (made, named):
            with contextlib.suppress(OSError):
                file.unlink()
    return True


def tunnel_command(name: str, port: int, node_port: int, *, share: bool = True) -> list[str]:
    """`ssh` that only forwards 127.0.0.1:port to the node's server, lets others share its connection, and ends when it cannot."""
    forward = f"127.0.0.1:{port}:127.0.0.1:{node_port}"
    sharing = ("-o", "ControlMaster=yes", "-o", f"ControlPath={SHARED}") if share else ()
    return command(name, "-N", "-o", "ExitOnForwardFailure=yes", *sharing, "-L", forward, HOST)


def start_tunnel(name: str) -> int:
    """Starts the tunnel of a deployment in the background; its process id."""
    log = state.folder(name) / "tunnel.log"
    if not log.is_file():
        own_files.begin_log(log)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", processes.TUNNEL, name], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
            env=state.without_secrets(os.environ) | {"MISTRALCTL_HOME": str(state.home())},
        )  # fmt: skip
    return process.pid


def end_tunnel(name: str) -> None:
    """Ends the tunnel of a deployment and its ssh."""
    processes.end(lambda: processes.tunnels(name), drain=5)
