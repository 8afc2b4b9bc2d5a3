"""Images of Azure's machines: which NVIDIA driver each has."""

from mistralctl.clouds import Image, Images

HPC = "microsoft-dsvm:ubuntu-hpc"


def _hpc(since: str, driver: str, cuda: str, commit: str, date: str) -> Image:
    """A release of the image for HPC: its version is a date and a number, its driver is that of the tag of the same name."""
    sku = since[:5].replace(".", "")
    return Image("azure", f"{HPC}:{sku}:", driver, cuda, f"Azure/azhpc-images@{commit}", date, since=since)


IMAGES = Images(
    rows=(
        Image("azure", "skypilot:custom-gpu-ubuntu-v2", "535", "12.4", "skypilot-org/skypilot#9639", "2026-05-20",
              ("/CommunityGalleries/skypilot-fc3311ab-d34c-4589-b2fb-a95b8a84ceb1/Images/skypilot-gpu-gen2",)),
        Image("azure", "skypilot:custom-gpu-ubuntu-v2-grid", "535.161.08", "12.2", "skypilot-org/skypilot#10468", "2026-08-14",
              ("/CommunityGalleries/skypilot-5c783dcb-c1d8-48ca-a5eb-0cee59e165fd/Images/skypilot-gpu-gen2-grid",), grid=True),
        Image("azure", "skypilot:gpu-ubuntu-2204", "535.54.03", "12.2", "Azure/azhpc-images@ffaacc22", "2023-08-01"),
        Image("azure", "skypilot:custom-cpu-ubuntu-v2", "", "", "SkyPilot 0.14.1, sky/clouds/azure.py", "2026-06-03",
              ("/CommunityGalleries/skypilot-fc3311ab-d34c-4589-b2fb-a95b8a84ceb1/Images/skypilot-cpu-gen2",)),
        _hpc("22.04.2023080201", "535.54.03", "12.2", "ffaacc22", "2023-08-01"),
        _hpc("22.04.2024091701", "550.90.07", "12.5", "d1457366", "2024-09-16"),
        _hpc("22.04.2024102301", "560.35.03", "12.6", "ae0cb33d", "2024-10-23"),
        _hpc("22.04.2025051501", "570.133.20", "12.8", "0d8a5669", "2025-05-14"),
        _hpc("22.04.2025102701", "580.95.05", "13.0", "f4c1ad54", "2025-11-12"),
        _hpc("22.04.2026022601", "580.126.16", "13.0", "9360c97d", "2026-02-20"),
        _hpc("24.04.2025100901", "570.172.08", "12.9", "ad95e252", "2025-10-09"),
        _hpc("24.04.2025120501", "570.195.03", "12.8", "b84b07d1", "2025-12-10"),
        _hpc("24.04.2026020201", "580.105.08", "13.0", "64f65bab", "2026-01-24"),
        _hpc("24.04.2026072901", "580.173.02", "13.0", "67a1b094", "2026-07-17"),
    ),
    skypilots={"": "skypilot:custom-cpu-ubuntu-v2", "A10": "skypilot:custom-gpu-ubuntu-v2-grid", "*": "skypilot:custom-gpu-ubuntu-v2"},
    form=(
        r"[\w-]+:[\w.-]+:[\w.-]+:(latest|[0-9.]+)|/CommunityGalleries/[\w.-]+/Images/[\w.-]+|"
        r"/subscriptions/[\w-]+/resourceGroups/[\w.()-]+/providers/Microsoft.Compute/galleries/[\w.]+/images/[\w.-]+/versions/[\w.]+|"
        r"skypilot:[a-z0-9-]+"
    ),
    example="PUBLISHER:OFFER:SKU:VERSION",
    # The newest release, because no public list names the versions that are still there; every release since 22.04.2025102701 serves.
    # It is in every region and needs a disk of 64 GB (Azure/azhpc-images, packer/source.pkr.hcl).
    instead={"*": f"{HPC}:2204:latest"},
    vgpu=frozenset(("A10",)),
)  # fmt: skip
