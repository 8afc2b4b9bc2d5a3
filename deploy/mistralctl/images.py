"""The table of machine images: which NVIDIA driver the machine of each cloud has, and which image mistralctl asks for.

A driver is given as far as its source gives it. docs/gpu.md shows the same table; tests/deploy/test_images.py holds the two together,
and SKYPILOTS against the installed SkyPilot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mistral_contract import driver as drivers

HPC = "microsoft-dsvm:ubuntu-hpc"
SKY_FILES = "SkyPilot 0.14.1, sky/clouds/{}.py"


@dataclass(frozen=True)
class Image:
    """A row of the table. `id` is what SkyPilot takes as `image_id`; `ids` are other names of the same image.

    `driver` is empty where the image has none. `grid`: the driver is for a vGPU, which works with no other, and no other GPU works with it.
    A row with `since` is a release of a series: `id` ends with `:`, the version follows, and the row holds from that one on.
    """

    cloud: str
    id: str
    driver: str
    cuda: str
    source: str
    date: str
    ids: tuple[str, ...] = ()
    grid: bool = False
    since: str = ""


def _hpc(sku: str, since: str, driver: str, cuda: str, commit: str, date: str) -> Image:
    """A release of Azure's image for HPC: its version is a date and a number, its driver is that of the tag of the same name."""
    return Image(
        "azure", f"{HPC}:{sku}:", driver, cuda, f"Azure/azhpc-images@{commit}", date, since=f"{sku[:2]}.{sku[2:]}.{since}"
    )


IMAGES = (
    Image("aws", "skypilot:custom-gpu-ubuntu-cuda13", "580", "13.0", "skypilot-org/skypilot#9639, #9789", "2026-06-03"),
    Image("aws", "skypilot:custom-gpu-ubuntu", "535.216.01", "12.4", "skypilot-org/skypilot#9406, #9639", "2026-05-20"),
    Image("aws", "skypilot:custom-cpu-ubuntu", "", "", SKY_FILES.format("aws"), "2026-06-03"),
    Image("gcp", "skypilot:custom-gpu-ubuntu-2204-cuda13", "580", "13.0", "skypilot-org/skypilot#9639, #9789", "2026-06-03",
          ("projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-260603",)),
    Image("gcp", "skypilot:custom-gpu-ubuntu-2204", "535.216.01", "12.4", "skypilot-org/skypilot#9406, #9789", "2026-06-03",
          ("projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-241030",)),
    Image("gcp", "skypilot:custom-cpu-ubuntu-2204", "", "", SKY_FILES.format("gcp"), "2026-06-03",
          ("projects/sky-dev-465/global/images/skypilot-gcp-cpu-ubuntu-241030",)),
    Image("azure", "skypilot:custom-gpu-ubuntu-v2", "535", "12.4", "skypilot-org/skypilot#9639", "2026-05-20",
          ("/CommunityGalleries/skypilot-fc3311ab-d34c-4589-b2fb-a95b8a84ceb1/Images/skypilot-gpu-gen2",)),
    Image("azure", "skypilot:custom-gpu-ubuntu-v2-grid", "535.161.08", "12.2", "skypilot-org/skypilot#10468", "2026-08-14",
          ("/CommunityGalleries/skypilot-5c783dcb-c1d8-48ca-a5eb-0cee59e165fd/Images/skypilot-gpu-gen2-grid",), grid=True),
    Image("azure", "skypilot:gpu-ubuntu-2204", "535.54.03", "12.2", "Azure/azhpc-images@ffaacc22", "2023-08-01"),
    Image("azure", "skypilot:custom-cpu-ubuntu-v2", "", "", SKY_FILES.format("azure"), "2026-06-03",
          ("/CommunityGalleries/skypilot-fc3311ab-d34c-4589-b2fb-a95b8a84ceb1/Images/skypilot-cpu-gen2",)),
    _hpc("2204", "2023080201", "535.54.03", "12.2", "ffaacc22", "2023-08-01"),
    _hpc("2204", "2024091701", "550.90.07", "12.5", "d1457366", "2024-09-16"),
    _hpc("2204", "2024102301", "560.35.03", "12.6", "ae0cb33d", "2024-10-23"),
    _hpc("2204", "2025051501", "570.133.20", "12.8", "0d8a5669", "2025-05-14"),
    _hpc("2204", "2025102701", "580.95.05", "13.0", "f4c1ad54", "2025-11-12"),
    _hpc("2204", "2026022601", "580.126.16", "13.0", "9360c97d", "2026-02-20"),
    _hpc("2404", "2025100901", "570.172.08", "12.9", "ad95e252", "2025-10-09"),
    _hpc("2404", "2025120501", "570.195.03", "12.8", "b84b07d1", "2025-12-10"),
    _hpc("2404", "2026020201", "580.105.08", "13.0", "64f65bab", "2026-01-24"),
    _hpc("2404", "2026072901", "580.173.02", "13.0", "67a1b094", "2026-07-17"),
)  # fmt: skip

# What SkyPilot takes where nothing is asked for: by cloud, and by GPU where one GPU differs from the cloud's others ("" is no GPU).
SKYPILOTS = {
    "aws": {"": "skypilot:custom-cpu-ubuntu", "V100": "skypilot:custom-gpu-ubuntu", "*": "skypilot:custom-gpu-ubuntu-cuda13"},
    "gcp": {
        "": "skypilot:custom-cpu-ubuntu-2204", "V100": "skypilot:custom-gpu-ubuntu-2204", "*": "skypilot:custom-gpu-ubuntu-2204-cuda13",
    },
    "azure": {"": "skypilot:custom-cpu-ubuntu-v2", "A10": "skypilot:custom-gpu-ubuntu-v2-grid", "*": "skypilot:custom-gpu-ubuntu-v2"},
}  # fmt: skip
# What mistralctl asks for where SkyPilot's is too old. The newest release, because no public list names Azure's versions that are still
# there; every release since 22.04.2025102701 serves. It is in every region and needs a disk of 64 GB (Azure/azhpc-images, packer/source.pkr.hcl).
INSTEAD = {("azure", "*"): f"{HPC}:2204:latest"}
VGPU = frozenset((("azure", "A10"),))  # machines whose GPU is a vGPU, which works with a GRID driver alone

_SKYPILOT = r"skypilot:[a-z0-9-]+"
FORMS = {
    "aws": (rf"ami-[0-9a-f]{{8,17}}|{_SKYPILOT}", "ami-0123456789abcdef0"),
    "gcp": (rf"projects/[a-z0-9:.-]+/global/(images|machineImages)/[a-z0-9-]+|{_SKYPILOT}", "projects/PROJECT/global/images/NAME"),
    "azure": (
        rf"[\w-]+:[\w.-]+:[\w.-]+:(latest|[0-9.]+)|/CommunityGalleries/[\w.-]+/Images/[\w.-]+|"
        rf"/subscriptions/[\w-]+/resourceGroups/[\w.()-]+/providers/Microsoft.Compute/galleries/[\w.]+/images/[\w.-]+/versions/[\w.]+|{_SKYPILOT}",
        "PUBLISHER:OFFER:SKU:VERSION",
    ),
}  # fmt: skip


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def find(cloud: str, image_id: str) -> Image | None:
    """The row of an image, by its id; None where the table does not know it.

    >>> find("azure", "microsoft-dsvm:ubuntu-hpc:2204:22.04.2024102301").driver
    '560.35.03'
    """
    named = image_id.lower()
    found = None
    for image in IMAGES:
        if image.cloud != cloud:
            continue
        if not image.since and named in (image.id.lower(), *(other.lower() for other in image.ids)):
            return image
        version = named.removeprefix(image.id)
        if (
            image.since
            and version != named
            and (found is None or version == "latest" or _numbers(version) >= _numbers(image.since))
        ):
            found = image  # the releases of a series stand in order; one before the first has no newer driver than that
    return found


def driver(cloud: str, image_id: str) -> str | None:
    """The NVIDIA driver of an image: empty if it has none, None if the table does not know the image."""
    found = find(cloud, image_id)
    return None if found is None else found.driver


def _choice(cloud: str, accelerator: str | None) -> str:
    """The row of SKYPILOTS that a machine falls under."""
    return (accelerator if accelerator in SKYPILOTS[cloud] else "*") if accelerator else ""


def skypilots(cloud: str, accelerator: str | None) -> str:
    """The image that SkyPilot takes for a machine with this GPU (None: without one) where nothing is asked for."""
    return SKYPILOTS[cloud][_choice(cloud, accelerator)]


def default(cloud: str, accelerator: str | None) -> Image:
    """The image that mistralctl takes where the user names none: SkyPilot's own, or the newer one in its place."""
    wanted = INSTEAD.get((cloud, _choice(cloud, accelerator)), skypilots(cloud, accelerator))
    found = find(cloud, wanted)
    if found is None:
        raise KeyError(wanted)
    return found


def asked_for(cloud: str, accelerator: str | None, named: str | None) -> str | None:
    """What stands as `image_id` in the task: the image that the user named, or the one in place of SkyPilot's; None: SkyPilot's own."""
    return named or INSTEAD.get((cloud, _choice(cloud, accelerator)))


def misspelt(cloud: str, image_id: str) -> str | None:
    """What is wrong with an image's id, by its form alone."""
    form, example = FORMS[cloud]
    if image_id.startswith("docker:"):
        return "is a container; mistralctl prepares the machine itself and needs the image of a machine"
    return None if re.fullmatch(form, image_id, re.IGNORECASE) else f"is not an image of {cloud}'s; write for example {example}"


def refusal(cloud: str, accelerator: str, named: str | None) -> str | None:
    """Why the table says that a machine with this GPU cannot serve with its image; None where it can, or nothing is known."""
    image = find(cloud, named) if named else default(cloud, accelerator)
    if image is None:
        return None
    whose = f"the image {named}" if named else f"{cloud}'s image for it"
    instead = "name another --image" if named else f"name one with --image {cloud}=ID"
    if not image.driver:
        return f"{whose} has no NVIDIA driver; {instead}"
    kind = "GRID driver" if image.grid else "driver"
    if drivers.too_old(image.driver):
        return f"{whose} has the {kind} {image.driver}, vLLM's CUDA 13 needs {drivers.OLDEST} or newer; {instead}"
    if image.grid != ((cloud, accelerator) in VGPU):
        needs = "is for a vGPU, which this GPU is not" if image.grid else "is no GRID driver, which this vGPU needs"
        return f"{whose} has the {kind} {image.driver}, which {needs}; {instead}"
    return None
