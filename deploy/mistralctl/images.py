"""Machine images: which NVIDIA driver the machine of each cloud has, and which image mistralctl asks for.

The rows are in each cloud's `images.py`. A driver is given as far as its source gives it. docs/gpu.md shows the same table;
tests/deploy/test_images.py holds the two together, and what SkyPilot takes against the installed SkyPilot.
"""

from __future__ import annotations

import re

from mistral_contract import driver as drivers

from mistralctl import clouds
from mistralctl.clouds import Image


def known() -> dict[str, clouds.Images]:
    """The images of every cloud that has some, by cloud."""
    return {cloud: found for cloud in clouds.names() if (found := clouds.images(cloud))}


def example() -> str:
    """How an image is named with its cloud: `aws=ami-0123456789abcdef0`."""
    return next((f"{cloud}={found.example}" for cloud, found in known().items()), "CLOUD=ID")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def find(cloud: str, image_id: str) -> Image | None:
    """The row of an image, by its id; None where the table does not know it.

    >>> find("azure", "microsoft-dsvm:ubuntu-hpc:2204:22.04.2024102301").driver
    '560.35.03'
    """
    table = clouds.images(cloud)
    named = image_id.lower()
    found = None
    for image in table.rows if table else ():
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


def _choice(table: clouds.Images, accelerator: str | None) -> str:
    """The row of what SkyPilot takes that a machine falls under."""
    return (accelerator if accelerator in table.skypilots else "*") if accelerator else ""


def skypilots(cloud: str, accelerator: str | None) -> str | None:
    """The image that SkyPilot takes for a machine with this GPU (None: without one) where nothing is asked for; None where that is not
    known."""
    table = clouds.images(cloud)
    return table.skypilots[_choice(table, accelerator)] if table else None


def default(cloud: str, accelerator: str | None) -> Image | None:
    """The image that mistralctl takes where the user names none: SkyPilot's own, or the newer one in its place; None where the cloud's
    images are not known."""
    wanted = asked_for(cloud, accelerator, None) or skypilots(cloud, accelerator)
    if wanted is None:
        return None
    found = find(cloud, wanted)
    if found is None:
        raise KeyError(wanted)
    return found


def asked_for(cloud: str, accelerator: str | None, named: str | None) -> str | None:
    """What stands as `image_id` in the task: the image that the user named, or the one in place of SkyPilot's; None: SkyPilot's own."""
    table = clouds.images(cloud)
    return named or (table.instead.get(_choice(table, accelerator)) if table else None)


def misspelt(cloud: str, image_id: str) -> str | None:
    """What is wrong with an image's id, by its form alone."""
    table = clouds.images(cloud)
    if image_id.startswith("docker:"):
        return "is a container; mistralctl prepares the machine itself and needs the image of a machine"
    if table is None or re.fullmatch(table.form, image_id, re.IGNORECASE):
        return None
    return f"is not an image of {cloud}'s; write for example {table.example}"


def is_regional(cloud: str, image_id: str) -> bool:
    """Whether an image is there in one region only."""
    table = clouds.images(cloud)
    return table is not None and table.regional is not None and re.fullmatch(table.regional, image_id, re.IGNORECASE) is not None


def needs_grid(cloud: str, accelerator: str) -> bool:
    """Whether a GPU is a vGPU there, which works with a GRID driver alone."""
    table = clouds.images(cloud)
    return table is not None and accelerator in table.vgpu


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
    if image.grid != needs_grid(cloud, accelerator):
        needs = "is for a vGPU, which this GPU is not" if image.grid else "is no GRID driver, which this vGPU needs"
        return f"{whose} has the {kind} {image.driver}, which {needs}; {instead}"
    return None
