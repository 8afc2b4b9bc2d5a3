"""Images of GCP's machines: which NVIDIA driver each has."""

from mistralctl.clouds import Image, Images

IMAGES = Images(
    rows=(
        Image("gcp", "skypilot:custom-gpu-ubuntu-2204-cuda13", "580", "13.0", "skypilot-org/skypilot#9639, #9789", "2026-06-03",
              ("projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-260603",)),
        Image("gcp", "skypilot:custom-gpu-ubuntu-2204", "535.216.01", "12.4", "skypilot-org/skypilot#9406, #9789", "2026-06-03",
              ("projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-241030",)),
        Image("gcp", "skypilot:custom-cpu-ubuntu-2204", "", "", "SkyPilot 0.14.1, sky/clouds/gcp.py", "2026-06-03",
              ("projects/sky-dev-465/global/images/skypilot-gcp-cpu-ubuntu-241030",)),
    ),
    skypilots={
        "": "skypilot:custom-cpu-ubuntu-2204", "V100": "skypilot:custom-gpu-ubuntu-2204", "*": "skypilot:custom-gpu-ubuntu-2204-cuda13",
    },
    form=r"projects/[a-z0-9:.-]+/global/(images|machineImages)/[a-z0-9-]+|skypilot:[a-z0-9-]+",
    example="projects/PROJECT/global/images/NAME",
)  # fmt: skip
