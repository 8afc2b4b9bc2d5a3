"""What lies on the image that a machine was asked for, by the reference of it that the cloud was given.

Which driver that is, says mistralctl's own table (deploy/mistralctl/clouds/CLOUD/images.py). A node's system is this machine's own, without
anything of NVIDIA's and without ninja (image.py hides that); what a real image has of it, gpus.py puts there. Sources:

- SkyPilot's images, its sky/catalog/images/provisioners: cuda.sh (AWS, GCP) installs gcc 12 and CUDA's toolkit with nvcc in /usr/local/cuda, which
  /etc/profile puts on PATH and LD_LIBRARY_PATH; cuda-azure-grid.sh (A10) does so by ~/.bashrc. No ninja there, in skypilot.sh, in user-toolkit.sh.
- microsoft-dsvm:ubuntu-hpc, Azure/azhpc-images: install_nvidiagpudriver.sh puts CUDA's toolkit on PATH and LD_LIBRARY_PATH by
  /etc/profile.d/cuda.sh; install_dynolog_drl.sh installs Ubuntu's ninja-build since 6744d0a3 (2026-03-19).
- nvidia-modprobe: cuda.sh names it for arm64 alone (skypilot#9639), NVIDIA's packages bring it beside the driver; not seen on a real image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mistralctl import images as table

from simcloud import catalog

PROFILE, PROFILE_D, BASHRC = "etc/profile", "etc/profile.d/cuda.sh", "home/ubuntu/.bashrc"
# A release, where the table knows no more than the series.
RELEASES = {"580": "580.95.05", "535": "535.216.01"}
# Images that the table does not know: of GPUs of long ago (SkyPilot 0.14.1, sky/clouds/gcp.py), of another Ubuntu (azhpc-images@ae0cb33d).
OTHERS = {
    ("gcp", "projects/deeplearning-platform-release/global/images/common-cu113-v20220701"): "470.57.02",
    ("azure", "microsoft-dsvm:ubuntu-hpc:2004:20.04.2024102301"): "560.35.03",
}
HPC = re.compile(r"microsoft-dsvm:ubuntu-hpc:2\d04:(?:2\d\.04\.(\d{10})|latest)")
NINJA_SINCE = 2026050501  # the first release of it with that commit
TOO_OLD_FOR_VGPU = 570  # guests of vGPU 18, which the hosts of Azure's A10 run: skypilot-org/skypilot#10468
NOT_LOADED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and "
    "running.\n",
    9,
)
NO_DEVICES = ("No devices were found", 6)


@dataclass(frozen=True)
class Image:
    """`driver`: the version of NVIDIA's, empty where there is none; `grid`: it is one for guests of vGPU; `toolkit`: the file by which CUDA's
    is on the PATH, empty where there is none; `ninja`: whether that is there."""

    driver: str = ""
    grid: bool = False
    toolkit: str = ""
    ninja: bool = False


BARE = Image()  # also of an image that nobody knows


def name(cloud: str, reference: str | dict[str, Any]) -> str:
    """What a user calls an image: AWS's id, GCP's path, Azure's gallery or four words. `reference` is that, GCP's address, Azure's imageReference."""
    if isinstance(reference, dict):
        found = reference.get("communityGalleryImageId") or reference.get("id")
        reference = str(found or ":".join(str(reference.get(part, "")) for part in ("publisher", "offer", "sku", "version")))
    if cloud == "gcp" and "projects/" in reference:
        reference = reference[reference.index("projects/") :]
    return reference


def of(cloud: str, reference: str | dict[str, Any]) -> Image:
    """What is on an image."""
    called = name(cloud, reference)
    tags = [row["Tag"] for row in catalog.images(cloud) if row["ImageId"] == called]
    row = next(filter(None, (table.find(cloud, known) for known in (called, *tags))), None)
    driver = row.driver if row else OTHERS.get((cloud, called), "")
    if not driver:
        return BARE
    driver = RELEASES.get(driver, driver)
    if hpc := HPC.fullmatch(called):
        return Image(driver, toolkit=PROFILE_D, ninja=int(hpc[1] or NINJA_SINCE) >= NINJA_SINCE)
    grid = bool(row and row.grid)
    return Image(driver, grid, toolkit=BASHRC if grid else PROFILE)


def trouble(cloud: str, gpu: str, image: Image) -> tuple[str, int] | None:
    """What nvidia-smi says instead of showing such a GPU, and its code; None if it shows it. Azure's A10 is one of vGPU."""
    if not table.needs_grid(cloud, gpu):
        return None
    if not image.grid:
        return NOT_LOADED
    return NO_DEVICES if int(image.driver.split(".")[0]) < TOO_OLD_FOR_VGPU else None
