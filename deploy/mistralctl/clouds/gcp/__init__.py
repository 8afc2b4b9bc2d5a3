"""Google Cloud."""

from mistralctl.clouds import Cloud

CLOUD = Cloud(
    "gcp",
    frozenset(
        "us-central1 us-east1 us-east4 us-east5 us-south1 us-west1 us-west2 us-west3 us-west4 "
        "northamerica-northeast1 northamerica-northeast2 southamerica-east1 europe-central2 "
        "europe-north1 europe-southwest1 europe-west1 europe-west2 europe-west3 europe-west4 "
        "europe-west6 europe-west8 europe-west9 europe-west12 asia-east1 asia-east2 asia-northeast1 "
        "asia-northeast2 asia-northeast3 asia-south1 asia-south2 asia-southeast1 asia-southeast2 "
        "australia-southeast1 australia-southeast2 me-central1 me-west1 africa-south1".split()
    ),
    r"{region}-[a-f]",
    "gcloud auth application-default login",
    "https://cloud.google.com/docs/authentication/provide-credentials-adc",
    order=2,
)
