"""Google Cloud."""

from mistralctl.clouds import Cloud

# GPUs are sold apart from the machine that carries them; these are the machines that SkyPilot 0.14 puts below.
HOSTS = {
    ("T4", 1): "n1-standard-4",
    ("T4", 2): "n1-standard-8",
    ("V100", 1): "n1-standard-8",
    ("L4", 1): "g2-standard-4",
    ("L4", 2): "g2-standard-24",
    ("L4", 4): "g2-standard-48",
    ("L4", 8): "g2-standard-96",
    **{("A100", count): f"a2-highgpu-{count}g" for count in (1, 2, 4, 8)},
    **{("A100-80GB", count): f"a2-ultragpu-{count}g" for count in (1, 2, 4, 8)},
    ("H100", 1): "a3-highgpu-1g",
    ("H100", 8): "a3-highgpu-8g",
}

CLOUD = Cloud(
    name="gcp",
    regions=frozenset(
        "us-central1 us-east1 us-east4 us-east5 us-south1 us-west1 us-west2 us-west3 us-west4 "
        "northamerica-northeast1 northamerica-northeast2 southamerica-east1 europe-central2 "
        "europe-north1 europe-southwest1 europe-west1 europe-west2 europe-west3 europe-west4 "
        "europe-west6 europe-west8 europe-west9 europe-west12 asia-east1 asia-east2 asia-northeast1 "
        "asia-northeast2 asia-northeast3 asia-south1 asia-south2 asia-southeast1 asia-southeast2 "
        "australia-southeast1 australia-southeast2 me-central1 me-west1 africa-south1".split()
    ),
    zone=r"{region}-[a-f]",
    sign_in="gcloud auth application-default login",
    page="https://cloud.google.com/docs/authentication/provide-credentials-adc",
    title="GCP",
    package="mistralctl[gcp]",
    order=2,
    variables=("GOOGLE_APPLICATION_CREDENTIALS",),
    files=(".config/gcloud/application_default_credentials.json",),
    roles=("gcp.yaml", "gcp-condition.yaml"),
    # pd-ssd, 283 MiB/s with 90 GiB instead of pd-balanced's 165 (https://cloud.google.com/compute/docs/disks/performance).
    disk_tier="high",
    disk_price=0.10,  # balanced persistent disk, us-central1 (https://cloud.google.com/compute/disks-image-pricing)
    hosts=HOSTS,
    sold_with_gpu=("a2-", "a3-", "g2-"),
    # As spot or flex-start machines, though the API of prices has one on demand: dstackai/gpuhunt#176.
    spot_only=frozenset(("a3-highgpu-1g",)),
)
