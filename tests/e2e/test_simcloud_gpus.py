"""What a simulated machine shows of its GPUs, by the image that was asked for: against mistralctl's table, and in nvidia-smi's words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mistralctl import images as table
from mistralctl import prices
from simcloud import catalog, gpus, images, nvidia_smi

GALLERY = "/CommunityGalleries/skypilot-5c783dcb-c1d8-48ca-a5eb-0cee59e165fd/Images/skypilot-gpu-gen2-grid"
HPC = {"publisher": "microsoft-dsvm", "offer": "ubuntu-hpc", "sku": "2204", "version": "latest"}
FAILED = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "


def test_each_gpu_of_the_catalog_gets_the_driver_of_its_default_image() -> None:
    for cloud in table.known():
        for gpu in {offer.accelerator for offer in prices.offers(cloud)} - {None}:
            wanted = table.asked_for(cloud, gpu, None) or table.skypilots(cloud, gpu)
            assert wanted
            ids = [row["ImageId"] for row in catalog.images(cloud) if row["Tag"] == wanted] or [wanted]
            for image_id in ids:
                named = dict(zip(HPC, image_id.split(":"), strict=True)) if image_id.startswith("microsoft") else image_id
                row = table.find(cloud, wanted)
                assert row
                assert images.of(cloud, named).driver.startswith(row.driver), (cloud, gpu)


@pytest.mark.parametrize(
    ("cloud", "asked", "driver", "toolkit", "ninja"),
    [
        ("aws", "ami-cc3bc6c2c633f3dd3", "580.95.05", images.PROFILE, False),
        ("aws", "ami-0c3bc6c2c633f3dd3", "535.216.01", images.PROFILE, False),
        ("aws", "ami-0123456789abcdef0", "", "", False),
        ("aws", "", "", "", False),
        ("gcp", "https://www.googleapis.com/compute/v1/projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-260603",
         "580.95.05", images.PROFILE, False),
        ("gcp", "projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-241030", "535.216.01", images.PROFILE, False),
        ("gcp", "projects/deeplearning-platform-release/global/images/common-cu113-v20220701", "470.57.02", images.PROFILE, False),
        ("azure", {"communityGalleryImageId": GALLERY}, "535.161.08", images.BASHRC, False),
        ("azure", HPC, "580.126.16", images.PROFILE_D, True),
        ("azure", HPC | {"version": "22.04.2026022601"}, "580.126.16", images.PROFILE_D, False),
        ("azure", HPC | {"version": "22.04.2023080201"}, "535.54.03", images.PROFILE_D, False),
        ("azure", HPC | {"sku": "2004", "version": "20.04.2024102301"}, "560.35.03", images.PROFILE_D, False),
        ("azure", {}, "", "", False),
    ],
)  # fmt: skip
def test_what_an_image_has(cloud: str, asked: str | dict[str, Any], driver: str, toolkit: str, ninja: bool) -> None:
    found = images.of(cloud, asked)
    assert (found.driver, found.toolkit, found.ninja) == (driver, toolkit, ninja)


def said(folder: Path, cloud: str, names: tuple[str, ...], asked: str | dict[str, Any], *words: str) -> tuple[int, str]:
    """Code and output of nvidia-smi on a machine with these GPUs, booted from that image."""
    program = folder / "nvidia-smi"
    shutil.copy(nvidia_smi.__file__, program)
    program.with_suffix(".json").write_text(json.dumps(gpus.smi(cloud, names, images.of(cloud, asked))))
    done = subprocess.run([sys.executable, "-I", program, *words], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_nvidia_smi_in_the_words_of_the_real_one(tmp_path: Path) -> None:
    def one(*words: str) -> tuple[int, str]:
        return said(tmp_path, "aws", ("L4",), "ami-cc3bc6c2c633f3dd3", *words)

    code, listed = one("-L")
    assert (code, listed[:28]) == (0, "GPU 0: NVIDIA L4 (UUID: GPU-")
    assert one("--query-gpu=driver_version", "--format=csv,noheader") == (0, "580.95.05\n")
    assert one("--query-gpu=name,memory.total,compute_cap", "--format=csv") == (
        0, "name, memory.total [MiB], compute_cap\nNVIDIA L4, 22477 MiB, 8.9\n",
    )  # fmt: skip
    assert one("--query-gpu=memory.used", "--format=csv,noheader,nounits") == (0, "0\n")
    assert one("--query-compute-apps=pid", "--format=csv,noheader") == (0, "")
    assert one("--query-gpu=cuda_version", "--format=csv") == (2, 'Field "cuda_version" is not a valid field to query.\n\n')
    assert "CUDA Version: 13.0" in one()[1]
    assert one("--gom=0")[0] == 1


@pytest.mark.parametrize(("gpu", "state", "status"), [("H100", "Completed", "Success"), ("A100", "N/A", "N/A")])
def test_eight_gpus_have_a_fabric(tmp_path: Path, gpu: str, state: str, status: str) -> None:
    code, text = said(tmp_path, "aws", (gpu,) * 8, "ami-cc3bc6c2c633f3dd3", "-q")
    assert code == 0
    lines = [line.strip() for line in text.splitlines()]
    assert lines.count("Fabric") == 8
    assert {line.partition(": ")[2] for line in lines if line.startswith("State ")} == {state}
    assert {line.partition(": ")[2] for line in lines if line.startswith("Status ")} == {status}
    query = ("--query-gpu=fabric.state,fabric.status", "--format=csv,noheader")
    shown = ", ".join(f"[{value}]" if value == "N/A" else value for value in (state, status))
    assert said(tmp_path, "aws", (gpu,) * 8, "ami-cc3bc6c2c633f3dd3", *query) == (0, f"{shown}\n" * 8)


@pytest.mark.parametrize(
    ("asked", "code", "text"),
    [({"communityGalleryImageId": GALLERY}, 6, "No devices were found\n"), (HPC, 9, FAILED)],
)
def test_azures_a10_is_reached_by_no_driver_that_an_image_has(
    tmp_path: Path, asked: dict[str, Any], code: int, text: str
) -> None:
    for words in ((), ("-L",), ("--query-gpu=driver_version", "--format=csv,noheader")):
        found = said(tmp_path, "azure", ("A10",), asked, *words)
        assert (found[0], found[1][: len(text)]) == (code, text)
