"""GCP: GPUs and vCPUs, in a region and in the whole project, on demand and preemptible (which spot machines are) apart.

What counts where: https://cloud.google.com/compute/resource-usage; the names: the enum `metric` of a Quota in
https://cloud.google.com/compute/docs/reference/rest/v1/regions. Machines that carry GPUs and have no metric of their own there (g2, a3) are
judged by their GPUs alone, spot machines too: without a preemptible quota of vCPUs they count against the ordinary one. The H100's
is not in every project's list: then it is unknown.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from mistralctl import state
from mistralctl.clouds.gcp import CLOUD
from mistralctl.quotas import Found, Need, Unknown, Wanted

SECONDS = 4
ENDPOINT = "https://compute.googleapis.com/compute/v1"
GPUS = {
    "T4": "NVIDIA_T4_GPUS",
    "V100": "NVIDIA_V100_GPUS",
    "L4": "NVIDIA_L4_GPUS",
    "A100": "NVIDIA_A100_GPUS",
    "A100-80GB": "NVIDIA_A100_80GB_GPUS",
    "H100": "NVIDIA_H100_GPUS",
}
CPUS = {"n1": "CPUS", "n2": "N2_CPUS", "a2": "A2_CPUS"}
ALL_GPUS, ALL_CPUS = "GPUS_ALL_REGIONS", "CPUS_ALL_REGIONS"  # the project's, whatever the region
_SIGNING_IN = threading.Lock()


def needs(wanted: Wanted) -> Sequence[Need]:
    """GPUs of the region and of the project, vCPUs of the family and of the project; of a spot machine its GPUs alone."""
    found = []
    gpu = GPUS.get(wanted.accelerator or "")
    if gpu:
        found.append(Need(f"PREEMPTIBLE_{gpu}" if wanted.spot else gpu, "", wanted.count, "GPUs"))
    if wanted.spot:
        return found
    if gpu:
        found.append(Need(ALL_GPUS, "", wanted.count, "GPUs"))
    cpus = CPUS.get(wanted.instance_type.partition("-")[0])
    if cpus:
        found.append(Need(cpus, "", wanted.vcpus, "vCPUs"))
    return [*found, Need(ALL_CPUS, "", wanted.vcpus, "vCPUs")]


def page(region: str, code: str) -> str:
    """The list of Compute Engine's quotas; its filter takes the name."""
    return "https://console.cloud.google.com/iam-admin/quotas?service=compute.googleapis.com"


@cache
@state.secrets_hidden()  # from gcloud, which is asked for the project
def _signed_in() -> tuple[Any, str]:
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
        from google.auth.transport.requests import AuthorizedSession
    except ImportError as error:
        raise Unknown("Google's SDK is not installed") from error
    try:
        credentials, project = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    except DefaultCredentialsError as error:
        raise Unknown("no credentials (gcloud auth application-default login)") from error
    if not project:
        raise Unknown("no project (gcloud config set project NAME)")
    session: Any = AuthorizedSession
    return session(credentials), str(project)


def _quotas(path: str) -> dict[str, tuple[float, float | None]]:
    """Limit and use of each metric of a resource; `Unknown` if Google does not say."""
    with _SIGNING_IN:
        session, project = _signed_in()
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    try:
        answer = session.get(f"{ENDPOINT}/projects/{project}{path}", params={"fields": "quotas"}, timeout=SECONDS)
    except GoogleAuthError as error:
        raise Unknown(f"the credentials are refused ({type(error).__name__})") from error
    except RequestException as error:
        raise Unknown(f"Google does not answer ({type(error).__name__})") from error
    if answer.status_code != 200:
        right = "compute.regions.get" if path else "compute.projects.get"
        raise Unknown(f"Google refused {right} ({answer.status_code})")
    return {row["metric"]: (float(row["limit"]), float(row["usage"])) for row in answer.json().get("quotas", [])}


def ask(region: str, needs: Sequence[Need]) -> Found:
    """By the region's own list and the project's; `Unknown` if Google does not say."""
    found = _quotas(f"/regions/{region}")
    if {ALL_GPUS, ALL_CPUS} & {need.code for need in needs}:
        found = _quotas("") | found
    return found


def regions() -> Sequence[str]:
    """Those of the table: every project has all of them."""
    return sorted(CLOUD.regions)
