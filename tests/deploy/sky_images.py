"""Prints what the installed SkyPilot takes for each machine of the catalog: `images` and a JSON object, cloud to machine type (on GCP: GPU)
to the tag of its image; `machines` and one, cloud to GPU and count to machine type.

Run by test_sky.py in a process with an empty HOME, in which sky_accepts.py lays out the catalog that mistralctl plans with.
"""

from __future__ import annotations

import json
import sys

from mistralctl import prices
from sky_accepts import lay_out_catalog


def main() -> None:
    lay_out_catalog()
    from sky import catalog
    from sky.catalog import azure_catalog
    from sky.clouds import AWS, GCP, Azure

    tags: list[str] = []

    def resolved(tag: str, *_: object, **__: object) -> str:
        tags.append(tag)
        return tag

    catalog.get_image_id_from_tag = resolved  # AWS's answer is the id of one region; what is wanted is what it was made from
    found: dict[str, dict[str, str]] = {"aws": {}, "gcp": {}, "azure": {}}
    for cloud, images in found.items():
        for offer in prices.offers(cloud):
            if cloud == "aws":
                images[offer.instance_type] = AWS._get_default_ami(offer.region, offer.instance_type)
            elif cloud == "azure":
                generation = azure_catalog.get_gen_version_from_instance_type(offer.instance_type)
                images[offer.instance_type] = Azure()._get_default_image_tag(generation, offer.instance_type)
            elif offer.accelerator:
                images[offer.accelerator] = GCP._get_gpu_image_id(offer.accelerator)
    sys.stdout.write("images " + json.dumps(found) + "\n")
    machines: dict[str, dict[str, list[str]]] = {"aws": {}, "gcp": {}, "azure": {}}
    for cloud, types in machines.items():
        for offer in prices.offers(cloud):
            if offer.accelerator:
                got, _ = catalog.get_instance_type_for_accelerator(offer.accelerator, offer.count, clouds=cloud)
                types[f"{offer.accelerator}:{offer.count}"] = got or []
    sys.stdout.write("machines " + json.dumps(machines) + "\n")


if __name__ == "__main__":
    main()
