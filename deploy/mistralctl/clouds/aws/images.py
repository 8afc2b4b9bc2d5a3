"""Images of AWS's machines: which NVIDIA driver each has."""

from mistralctl.clouds import Image, Images

IMAGES = Images(
    rows=(
        Image("aws", "skypilot:custom-gpu-ubuntu-cuda13", "580", "13.0", "skypilot-org/skypilot#9639, #9789", "2026-06-03"),
        Image("aws", "skypilot:custom-gpu-ubuntu", "535.216.01", "12.4", "skypilot-org/skypilot#9406, #9639", "2026-05-20"),
        Image("aws", "skypilot:custom-cpu-ubuntu", "", "", "SkyPilot 0.14.1, sky/clouds/aws.py", "2026-06-03"),
    ),
    skypilots={"": "skypilot:custom-cpu-ubuntu", "V100": "skypilot:custom-gpu-ubuntu", "*": "skypilot:custom-gpu-ubuntu-cuda13"},
    form=r"ami-[0-9a-f]{8,17}|skypilot:[a-z0-9-]+",
    example="ami-0123456789abcdef0",
    regional="ami-.*",
)  # fmt: skip
