"""The table of images against the page that shows it, the node's set-up, the installed SkyPilot, and what is planned with it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from mistral_contract import driver
from mistralctl import checkpoints, images, package_dir, plan, prices
from mistralctl.clouds import Image
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.plan import Plan
from mistralctl.tasks import serve

HPC = "microsoft-dsvm:ubuntu-hpc:2204"
AMI = "ami-0123456789abcdef0"
GRID = "/CommunityGalleries/mine-1/Images/grid595"


def make(**flags: Any) -> Plan:
    sourced = load(flags, {}, None)
    return plan.make(sourced, checkpoints.resolve(sourced), None)


def resources(**flags: Any) -> dict[str, Any]:
    return dict(serve.render(make(**flags), owner="0123456789ab")["resources"])


def refusal(**flags: Any) -> str:
    with pytest.raises(UserError) as error:
        make(**flags)
    return str(error.value)


def shown(image: Image) -> list[str]:
    """A row of the table as docs/gpu.md has it."""
    sold = dict.fromkeys(offer.accelerator for offer in prices.offers(image.cloud))
    served = sorted(gpu for gpu in sold if gpu and images.default(image.cloud, gpu) == image)
    later = " and later" if image.since else ""
    grid = " (GRID)" if image.grid else ""
    return [
        image.cloud, f"`{image.id}{image.since}`{later}", f"{image.driver or 'none'}{grid}", image.cuda or "none", ", ".join(served),
        image.source, image.date,
    ]  # fmt: skip


def test_the_page_shows_the_table() -> None:
    page = (package_dir("model").parent / "docs" / "gpu.md").read_text("utf-8")
    section = page.partition("\n## Images and drivers\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if re.match(r"\| (aws|gcp|azure) ", line)
    ]
    assert rows == [shown(image) for table in images.known().values() for image in table.rows]


def test_the_nodes_set_up_wants_the_driver_that_the_laptop_wants() -> None:
    scripts = "".join(path.read_text("utf-8") for path in (package_dir("model") / "node").rglob("*.sh"))
    assert re.findall(r"^OLDEST_DRIVER=(.*)$", scripts, re.MULTILINE) == [str(driver.OLDEST)]


def test_every_gpu_of_the_catalog_has_a_row_and_what_cannot_serve_is_never_planned() -> None:
    for cloud in images.known():
        for gpu in {offer.accelerator for offer in prices.offers(cloud)} - {None}:
            assert gpu
            image = images.default(cloud, gpu)
            assert image
            assert (images.refusal(cloud, gpu, None) is None) == (not driver.too_old(image.driver))
    everywhere = make(max_price=1000)
    assert {(option.cloud, option.label) for option in everywhere.options} >= {("azure", "A100-80GB:1"), ("azure", "H100:1")}
    for option in everywhere.options:
        assert option.accelerator
        image = images.default(option.cloud, option.accelerator)
        assert image
        assert not driver.too_old(image.driver)


@pytest.mark.parametrize(
    ("cloud", "image", "found"),
    [
        ("aws", "skypilot:custom-gpu-ubuntu-cuda13", "580"), ("aws", AMI, None), ("aws", "skypilot:custom-cpu-ubuntu", ""),
        ("gcp", "projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-241030", "535.216.01"),
        ("azure", f"{HPC}:latest", "580.126.16"), ("azure", "Microsoft-DSVM:Ubuntu-HPC:2204:22.04.2026082801", "580.126.16"),
        ("azure", f"{HPC}:22.04.2025102701", "580.95.05"), ("azure", f"{HPC}:22.04.2025102601", "570.133.20"),
        ("azure", f"{HPC}:22.04.2022121201", "535.54.03"), ("azure", f"{HPC}-v100:latest", None),
        ("azure", "microsoft-dsvm:ubuntu-hpc:2404:24.04.2026011501", "570.195.03"), ("azure", "Canonical:x:y:latest", None),
    ],
)  # fmt: skip
def test_an_image_is_known_by_its_id_or_its_series(cloud: str, image: str, found: str | None) -> None:
    assert images.driver(cloud, image) == found


def test_azures_gpus_get_an_image_with_the_driver_and_the_other_clouds_keep_skypilots() -> None:
    got = resources(max_price=1000)["any_of"]
    named = {entry["infra"]: entry.get("image_id") for entry in got}
    assert named == {"aws": None, "gcp": None, "azure": f"{HPC}:latest"}
    assert "image_id" not in resources(model="smollm2-135m-instruct", cloud=["azure"])


def test_azures_a10_is_refused_with_the_reason_unless_an_image_is_named() -> None:
    why = "azure's image for it has the GRID driver 535.161.08, vLLM's CUDA 13 needs 580 or newer; name one with --image azure=ID"
    assert {option.label: option.reason for option in make(cloud=["azure"]).refused}["A10:1"] == why
    assert why in refusal(cloud=["azure"], accelerators="A10")
    assert make(cloud=["azure"], accelerators="A10", image={"azure": GRID}).chosen.label == "A10:1"
    assert resources(cloud=["azure"], accelerators="A10", image=GRID)["image_id"] == GRID
    # An image that the table knows is judged by it: this driver does not work with a vGPU.
    assert "is no GRID driver, which this vGPU needs" in refusal(cloud=["azure"], accelerators="A10", image=f"{HPC}:latest")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"cloud": ["azure"], "image": f"{HPC}:22.04.2024102301"}, "has the driver 560.35.03, vLLM's CUDA 13 needs 580"),
        ({"cloud": ["aws"], "image": "skypilot:custom-gpu-ubuntu"}, "has the driver 535.216.01"),
        ({"cloud": ["gcp"], "image": "skypilot:custom-cpu-ubuntu-2204"}, "has no NVIDIA driver"),
        ({"cloud": ["azure"], "accelerators": "H100", "image": "skypilot:custom-gpu-ubuntu-v2-grid"}, "535.161.08"),
    ],
)  # fmt: skip
def test_a_named_image_that_the_table_says_cannot_serve_is_not_rented(flags: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as error:
        make(**flags)
    assert error.value.code is Exit.NO_FIT
    assert why in str(error.value)


def test_an_image_is_named_for_each_cloud_and_changes_the_machine() -> None:
    image = "projects/mine/global/images/gpu-580"
    got = {entry["infra"]: entry.get("image_id") for entry in resources(image={"gcp": image}, max_price=2)["any_of"]}
    assert got == {"aws": None, "gcp": image}
    one, other = resources(cloud=["gcp"]), resources(cloud=["gcp"], image=image)
    assert one["labels"]["mistralctl-resources"] != other["labels"]["mistralctl-resources"]
    assert resources(model="smollm2-135m-instruct", cloud=["gcp"], image=image)["image_id"] == image


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"image": AMI}, f"--image: '{AMI}' needs exactly one cloud beside it; add --cloud, or write CLOUD=ID"),
        ({"image": AMI, "cloud": ["aws", "gcp"]}, "needs exactly one cloud"),
        ({"image": {"aws": AMI}}, "is the image of one region; add --cloud aws and that --region"),
        ({"image": {"gcp": "projects/x/global/images/y"}, "cloud": ["aws"]}, "is for gcp, which is not among the clouds"),
        ({"image": {"aws": AMI}, "cloud": ["local"]}, "means nothing on this machine (--cloud local)"),
        ({"image": "docker:nvidia/cuda", "cloud": ["gcp"]}, "is a container"),
        ({"image": {"gcp": AMI}}, "is not an image of gcp's; write for example projects/PROJECT/global/images/NAME"),
        ({"image": {"azure": "ubuntu-hpc:2204"}}, "is not an image of azure's; write for example PUBLISHER:OFFER:SKU:VERSION"),
        ({"image": {"ibm": "x"}}, "'ibm' is not one of aws, gcp, azure"),
        ({"image": {"aws": 7}}, "7 is no text"),
        ({"image": ["x"]}, "'x' needs exactly one cloud beside it"),
        ({"image": ["x", "y"]}, "'x' does not say its cloud; write CLOUD=ID for each, for example aws=ami-0123456789abcdef0"),
        ({"image": [["x"]]}, "does not say its cloud"),
        ({"image": 7}, "is not an image"),
        ({"image": ""}, "is not an image"),
    ],
)  # fmt: skip
def test_an_image_that_cannot_be_meant_is_refused(flags: dict[str, Any], why: str) -> None:
    got = refusal(**flags)
    assert got.startswith("--image: ")
    assert why in got


def test_an_image_comes_from_the_variable_and_the_file_as_well(tmp_path: Any) -> None:
    file = tmp_path / "mistralctl.yaml"
    file.write_text(f"cloud: [aws]\nregion: us-east-1\nimage: {AMI}\n")
    assert load({}, {}, file).spec.images == {"aws": AMI}
    file.write_text(f"image:\n  aws: {AMI}\n  azure: '{HPC}:latest'\n")
    assert load({}, {}, file).spec.images == {"aws": AMI, "azure": f"{HPC}:latest"}
    variable = {"MISTRALCTL_IMAGE": f"aws={AMI}, azure={HPC}:latest"}
    assert load({}, variable, None).spec.images == {"aws": AMI, "azure": f"{HPC}:latest"}
    with pytest.raises(UserError, match="does not say its cloud"):
        load({}, {"MISTRALCTL_IMAGE": f"aws={AMI},{HPC}:latest"}, None)
