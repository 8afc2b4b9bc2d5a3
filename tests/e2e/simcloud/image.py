"""The image that nodes boot from: this machine's own system, and over it a baked layer.

The layer holds the user, uv, SkyPilot's runtime as SkyPilot's own commands install it, and the node's environment with vLLM
as the project's own `environment.sh` makes it: what a warm image of a cloud would hold. It is made once, with the network,
below ~/.cache/mistralctl/simcloud, under a hash of what it is made from; nodes have no network at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from simcloud import linux

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistralctl" / "simcloud"
USER = "ubuntu"
KEPT = 4  # images; the one that was used least recently goes first
# Folders of this machine that are its system; whatever else lies at its root a node does not see.
SYSTEM = {"bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr", "var", "dev", "proc", "sys"}
MISTRALCTL_ENVS = ".mistralctl/envs"

# CUDA's compilers, ninja, a driver's programs: of this machine's own a node sees none, wherever below /usr they lie. gpus.py gives a machine
# those that the image it was asked for has.
ABSENT = (
    "ninja", "ninja-build", "nvcc", "nvcc.profile", "__nvcc_device_query", "ptxas", "cicc", "cudafe++", "cuobjdump", "nvdisasm", "nvlink",
    "nvprune", "fatbinary", "bin2c", "nvidia-smi", "nvidia-modprobe",
)  # fmt: skip
ABSENT_FOLDERS = ("usr/local/cuda*", "usr/lib/cuda*", "usr/lib/nvidia-cuda-toolkit", "usr/share/cuda*")

# `shutdown` and its like; a node has no systemd. The first process ends when it hears the signal.
SHUTDOWN = """#!/bin/sh
# shutdown [-h|-P|-H] [now|+MINUTES], poweroff, halt
minutes=0
for word; do
  case $word in +*) minutes=${word#+} ;; now) minutes=0 ;; esac
done
case $0 in *shutdown) [ $# -gt 0 ] || minutes=1 ;; esac
[ "$(id -u)" = 0 ] || { echo "must be root" >&2; exit 1; }
if [ "$minutes" = 0 ]; then kill -USR1 1; else (sleep "$((minutes * 60))"; kill -USR1 1) > /dev/null 2>&1 & fi
"""


def recipe() -> dict[str, str]:
    """All that an image is made from: by its hash images are told apart."""
    from importlib.metadata import version

    from mistralctl.tasks import NODE_PYTHON, environment_id
    from mistralctl.tasks.finetune import tune_environment_id

    model = CHECKOUT / "model"
    sources = [
        HERE / "image.py", HERE / "linux.py", HERE / "packages.txt", model / "node" / "environment.sh", model / "node" / "once.sh",
        model / "node" / "byte_code.sh", model / "node" / "build-constraints.txt", model / "weights" / "constraints.txt",
        model / "tune" / "environment.sh", model / "tune" / "requirements.txt",
        *(model / part / "pyproject.toml" for part in ("contract", "plugin", "node", "weights", "chats", "tune")),
    ]  # fmt: skip
    found = {str(path.relative_to(CHECKOUT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    python = subprocess.run(["/usr/bin/python3", "--version"], capture_output=True, text=True, check=True).stdout
    return found | {
        "skypilot": version("skypilot"),
        "uv": version("uv"),
        "python": NODE_PYTHON,
        "environment": environment_id("cpu", NODE_PYTHON),
        "training": tune_environment_id("cpu", NODE_PYTHON),
        "system": Path("/etc/os-release").read_text().splitlines()[0] + ", " + python.strip(),
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def baked() -> Path:
    """The folder of the image for this checkout and machine, baked if it is not there: `upper` (the layer), `wheels`, `log`."""
    made_from = recipe()
    folder = CACHE / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    with _locked(CACHE / "lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "recipe.json").write_text(json.dumps(made_from, indent=1))
            _bake(folder)
            (folder / "complete").touch()
            for old in sorted(CACHE.glob("*/complete"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                shutil.rmtree(old.parent)
        (folder / "complete").touch()
    return folder


def _skypilot(folder: Path) -> dict[str, str]:
    """SkyPilot's wheel for nodes, built into `wheels`, and the commands by which it sets a node up."""
    program = """
import json
from sky.backends import wheel_utils
from sky.skylet import constants as c
_, wheel = wheel_utils.build_sky_wheel()
print(json.dumps({"wheel": wheel, "commands": "".join((
    c.SETUP_SKY_DIRS_COMMANDS, c.UV_INSTALLATION_COMMANDS, c.SKY_USER_ENV_CREATION_COMMANDS,
    c.RAY_SKYPILOT_INSTALLATION_COMMANDS.replace("{sky_wheel_hash}", wheel).replace("{cloud}", "azure"),
))}))
"""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environ |= {"HOME": home, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"SkyPilot's wheel could not be built:\n{done.stderr[-3000:]}")
        shutil.move(Path(home) / ".sky" / "wheels", folder / "wheels")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _bake(folder: Path) -> None:
    skypilot = _skypilot(folder)
    for made in ("upper", "work", "root", "tmp"):
        (folder / made).mkdir()
    (folder / "upper").chmod(0o755)
    for name in sorted({path.name for path in Path("/").iterdir() if path.is_dir() and not path.is_symlink()} - SYSTEM):
        hidden = folder / "upper" / name
        hidden.mkdir(mode=0o755)
        os.setxattr(hidden, "trusted.overlay.opaque", b"y")
    (folder / "setup.sh").write_text(
        "set -e\ncd ~\nuv=~/.local/bin/uv\nexport PATH=$PATH:~/.local/bin UV_COMPILE_BYTECODE=1\n"
        "$uv venv --quiet --seed --python /usr/bin/python3 ~/skypilot-runtime\n"
        f"set +e\n{skypilot['commands']}\nset -e\n"
        # SkyPilot sets a node up for one cloud, Azure with more than the others; this image is for all three.
        f"wheel=$(echo ~/.sky/wheels/{skypilot['wheel']}/skypilot-*.whl)\n"
        '$uv pip install --quiet --python ~/skypilot-runtime/bin/python "$wheel[aws,gcp,azure,remote]"\n'
        "~/skypilot-runtime/bin/python -c 'import ray, sky'\n"
        "~/skypilot-runtime/bin/az version\n"
        f"envs=~/{MISTRALCTL_ENVS} environment=$1 python=$2 tune=$3\n"
        'bash /mnt/model/node/environment.sh cpu "$python" "$envs/$environment" "$uv"\n'
        'bash /mnt/model/tune/environment.sh "$envs/$environment" "$envs/$tune" "$uv"\n'
        "# What a node installs later comes from uv's cache: the build of our packages, what reads each store.\n"
        "export UV_BUILD_CONSTRAINT=/mnt/model/node/build-constraints.txt\n"
        "cp -r /mnt/model/contract /mnt/model/plugin /mnt/model/node /mnt/model/weights /mnt/model/chats /mnt/model/tune /tmp/\n"
        '$uv pip install --quiet --python "$envs/$environment/bin/python" --no-deps --target /tmp/site'
        " /tmp/contract /tmp/plugin /tmp/node /tmp/weights /tmp/chats /tmp/tune\n"
        'PYTHONDONTWRITEBYTECODE= bash /mnt/model/node/byte_code.sh cpu "$envs/$environment" /tmp/site\n'
        "for extra in '' '--extra s3' '--extra gs' '--extra az'; do\n"
        '  $uv venv --quiet --clear --python "$python" /tmp/venv\n'
        "  $uv pip install --quiet --verify-hashes --python /tmp/venv/bin/python -r /mnt/model/weights/pyproject.toml"
        " -c /mnt/model/weights/constraints.txt $extra\n"
        "done\n"
    )
    log = folder / "log"
    with log.open("w") as out:
        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--ipc", "--fork", "--kill-child=SIGKILL"]
        done = subprocess.run(
            [*command, sys.executable, str(HERE / "image.py"), str(folder), skypilot["wheel"]],
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=1800,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the image could not be baked; see {log}:\n{log.read_text(errors='replace')[-3000:]}")
    shutil.rmtree(folder / "tmp")


def _inside(folder: Path, wheel: str) -> None:
    """The baking itself, in a mount namespace of its own."""
    from mistralctl.tasks import NODE_PYTHON, environment_id
    from mistralctl.tasks.finetune import tune_environment_id

    root = folder / "root"
    linux.overlay(root, "/", folder / "upper", folder / "work")
    linux.mount("proc", root / "proc", "proc")
    linux.minimal_devices(root / "dev")
    linux.bind(folder / "tmp", root / "tmp")
    (root / "tmp").chmod(0o1777)
    (root / "run" / "sshd").mkdir(parents=True)
    for name in ("model", "links"):
        (root / "mnt" / name).mkdir()
    linux.bind(CHECKOUT / "model", root / "mnt" / "model", read_only=True)
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or ""
    if links.startswith("/"):
        linux.bind(links, root / "mnt" / "links", read_only=True)
        links = "/mnt/links"

    etc = root / "etc"
    for key in etc.glob("ssh/ssh_host_*"):
        key.unlink()
    (etc / "nologin").unlink(missing_ok=True)
    inside = ["chroot", str(root)]
    subprocess.run([*inside, "userdel", USER], capture_output=True)
    subprocess.run([*inside, "useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
    (etc / "sudoers.d" / f"90-{USER}").write_text(f"{USER} ALL=(ALL) NOPASSWD:ALL\n")
    for name in ("shutdown", "poweroff", "halt"):
        program = root / "usr/local/sbin" / name
        program.write_text(SHUTDOWN)
        program.chmod(0o755)
    home = root / "home" / USER
    (home / ".local/bin").mkdir(parents=True)
    shutil.copy(Path(sys.executable).parent / "uv", home / ".local/bin/uv")
    (home / ".sky").mkdir()
    shutil.copytree(folder / "wheels" / wheel, home / ".sky/wheels" / wheel)
    shutil.copy(folder / "setup.sh", root / "tmp" / "setup.sh")
    subprocess.run([*inside, "chown", "-R", f"{USER}:{USER}", f"/home/{USER}"], check=True)

    passed = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy",
              "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NATIVE_TLS")  # fmt: skip
    environ = {name: os.environ[name] for name in passed if name in os.environ}
    environ |= {
        "HOME": f"/home/{USER}",
        "USER": USER,
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "UV_HTTP_TIMEOUT": "300",
    }
    if links:
        environ["UV_FIND_LINKS"] = links
    as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
    script = [
        "bash",
        "-ex",
        "/tmp/setup.sh",
        environment_id("cpu", NODE_PYTHON),
        NODE_PYTHON,
        tune_environment_id("cpu", NODE_PYTHON),
    ]
    subprocess.run([*inside, *as_user, *script], env=environ, check=True)

    for folder in (found for pattern in ABSENT_FOLDERS for found in root.glob(pattern)):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    names = " -o ".join(f"-name {name}" for name in ABSENT).split()
    subprocess.run(["find", str(root / "usr"), "-xdev", "!", "-type", "d", "(", *names, ")", "-delete"], check=True)

    # From here on the node knows that it has no network.
    (etc / "uv").mkdir(exist_ok=True)
    (etc / "uv" / "uv.toml").write_text("offline = true\n")
    (etc / "pip.conf").write_text("[global]\nno-index = true\n")


if __name__ == "__main__":
    started = time.monotonic()
    _inside(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.write(f"baked in {time.monotonic() - started:.0f} s\n")
