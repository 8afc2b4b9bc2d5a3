"""What this machine is, as JSON: system, memory, disk, GPUs and their driver, the image it was booted from. Standard library only.

    python3 machine.py [CLOUD] [NAME]

CLOUD says whose metadata service is asked for the image (none on a machine of one's own), NAME whose pull of the weights is shown. Asks nothing
else, changes nothing, and ends in seconds; what cannot be known is null, and why a GPU cannot be asked is `gpu_problem`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

NODE_DIR = Path(os.environ.get("MISTRALCTL_NODE_DIR") or "~/.mistralctl").expanduser()
METADATA = "http://169.254.169.254"
METADATA_SECONDS = 2.0
INFOROM = 14  # nvidia-smi's code where a GPU's infoROM is damaged, which is a warning (nvidia-smi(1), RETURN VALUE)
# What vLLM, Triton and PyTorch look for on a GPU machine at run time (docs/gpu.md).
PROGRAMS = ("gcc", "ninja", "nvcc", "nvidia-modprobe")
# Names of nvidia-smi's query, `nvidia-smi --help-query-gpu`, in the order of the keys that they get here.
GPU_FIELDS = {
    "name": "name", "driver": "driver_version", "memory_mib": "memory.total", "memory_used_mib": "memory.used",
    "capability": "compute_cap", "power_limit_w": "power.limit", "pcie": "pcie.link.gen.max",
}  # fmt: skip


def _output(*command: str) -> tuple[int, str]:
    """Exit code and output of a program, at most 20 s; (127, why) where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return 127, str(error)
    return done.returncode, (done.stdout + done.stderr).strip()


def gpus() -> tuple[list[dict[str, str]], str]:
    """The GPUs as the driver shows them, and why it shows none."""
    if not shutil.which("nvidia-smi"):
        return [], "no nvidia-smi"
    code, said = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in said.splitlines() if not line.startswith("WARNING")]
    if code not in (0, INFOROM) or not rows or any(len(row) != len(GPU_FIELDS) for row in rows):
        return [], " ".join(said.split())[:300] or f"nvidia-smi ended with code {code}"
    return [dict(zip(GPU_FIELDS, row)) for row in rows], ""  # noqa: B905 - the image's python3 may be older than 3.10


def cuda() -> str | None:
    """The newest CUDA that the driver runs, which nvidia-smi prints above its table."""
    found = re.search(r"CUDA Version: ([0-9.]+)", _output("nvidia-smi")[1])
    return found[1] if found else None


def _metadata(path: str, headers: dict[str, str], method: str = "GET") -> str:
    asked = urllib.request.Request(METADATA + path, headers=headers, method=method)  # noqa: S310 - http, and only there
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=METADATA_SECONDS) as answer:
        return str(answer.read().decode())


def _aws() -> str:
    """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html"""
    token = _metadata("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    return _metadata("/latest/meta-data/ami-id", {"X-aws-ec2-metadata-token": token})


def _gcp() -> str:
    """https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys"""
    return _metadata("/computeMetadata/v1/instance/image", {"Metadata-Flavor": "Google"})


def _azure() -> str:
    """https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service"""
    found = json.loads(_metadata("/metadata/instance/compute/storageProfile?api-version=2023-07-01", {"Metadata": "true"}))
    image = found["imageReference"]
    marketplace = [image.get(key) or "" for key in ("publisher", "offer", "sku", "version")]
    if all(marketplace):
        return ":".join(marketplace)
    return str(next(filter(None, (image.get(key) for key in ("communityGalleryImageId", "sharedGalleryImageId", "id"))), ""))


IMAGES: dict[str, Callable[[], str]] = {"aws": _aws, "gcp": _gcp, "azure": _azure}


def image(cloud: str) -> str | None:
    """What the cloud's metadata service says of the image that this machine was booted from."""
    try:
        return IMAGES[cloud]() or None
    except (KeyError, OSError, ValueError, AttributeError, TypeError):  # it does not answer, or something else
        return None


def memory() -> dict[str, int | None]:
    """Bytes of memory, and how many of them a new program could have now (Linux's estimate)."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return {"memory_bytes": total, "memory_available_bytes": free}
    except (OSError, ValueError, KeyError):
        return {"memory_bytes": None, "memory_available_bytes": None}


def _pulled(name: str) -> dict[str, Any] | None:
    """What the last pull of a deployment's weights said of itself (setup.sh keeps it)."""
    try:
        found = json.loads((NODE_DIR / "run" / name / "pulled.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _system() -> str:
    try:
        return dict(line.rstrip().split("=", 1) for line in Path("/etc/os-release").open() if "=" in line)["PRETTY_NAME"].strip(
            '"'
        )
    except (OSError, KeyError, ValueError):
        return platform.platform()


def facts(cloud: str, name: str) -> dict[str, Any]:
    """Everything, in the order in which a person reads it."""
    found, problem = gpus()
    disk = shutil.disk_usage(next(path for path in (NODE_DIR, *NODE_DIR.parents) if path.exists()))
    return {
        "at": round(time.time(), 1),
        "image": image(cloud),
        "system": _system(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        **memory(),
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "gpus": found,
        "gpu_problem": problem,
        "cuda": cuda() if found else None,
        "devices": sorted(str(path) for path in Path("/dev").glob("nvidia*")),
        "programs": {program: shutil.which(program) for program in PROGRAMS},
        "pull": _pulled(name) if name else None,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts(*[*sys.argv[1:], "", ""][:2])) + "\n")
