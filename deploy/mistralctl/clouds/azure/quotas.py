"""Azure: vCPUs of a family of sizes and of all together in a region; spot machines count against one of their own for all families.

What counts where: https://learn.microsoft.com/azure/virtual-machines/quotas; the names: those of
https://learn.microsoft.com/rest/api/compute/usage/list, which spells one family with capitals or spaces in one place and without in another.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mistralctl import state
from mistralctl.clouds.azure import CLOUD
from mistralctl.quotas import Found, Need, Unknown, Wanted

SECONDS = 4
ENDPOINT = "https://management.azure.com"
API_VERSION = "2024-07-01"
# The pattern of a size, the family's name there and in the portal.
FAMILIES = (
    (r"Standard_D\d+s_v5", "standardDSv5Family", "Standard DSv5 Family vCPUs"),
    (r"Standard_NC\d+as_T4_v3", "Standard NCASv3_T4 Family", "Standard NCASv3_T4 Family vCPUs"),
    (r"Standard_NV\d+ads_A10_v5", "StandardNVADSA10v5Family", "Standard NVADSA10v5 Family vCPUs"),
    (r"Standard_NC\d+ads_A100_v4", "StandardNCADSA100v4Family", "Standard NCADS_A100_v4 Family vCPUs"),
    (r"Standard_NC\d+(ads|adis)_H100_v5", "StandardNCadsH100v5Family", "Standard NCadsH100v5 Family vCPUs"),
    (r"Standard_ND96asr_v4", "Standard NDASv4_A100 Family", "Standard NDASv4_A100 Family vCPUs"),
    (r"Standard_ND96amsr_A100_v4", "standard NDAMSv4_A100Family", "Standard NDAMSv4_A100Family vCPUs"),
)
_SIGNING_IN = threading.Lock()


def needs(wanted: Wanted) -> Sequence[Need]:
    """vCPUs of the family and of the region; of a spot machine those of all spot machines."""
    if wanted.spot:
        return [Need("lowPriorityCores", "Total Regional Low-priority vCPUs", wanted.vcpus, "vCPUs")]
    total = Need("cores", "Total Regional vCPUs", wanted.vcpus, "vCPUs")
    return [
        need
        for size, code, name in FAMILIES
        if re.fullmatch(size, wanted.instance_type)
        for need in (Need(code, name, wanted.vcpus, "vCPUs"), total)
    ]


def page(region: str, code: str) -> str:
    """The list of quotas in the portal."""
    return "https://portal.azure.com/#view/Microsoft_Azure_Capacity/QuotaMenuBlade/~/myQuotas"


def _plain(name: str) -> str:
    return re.sub(r"[ _]", "", name).lower()


def subscription() -> str:
    """The subscription that `az` works in, as SkyPilot takes it; `Unknown` if nobody is signed in."""
    profile = Path(os.environ.get("AZURE_CONFIG_DIR") or Path.home() / ".azure") / "azureProfile.json"
    try:
        known = json.loads(profile.read_text("utf-8-sig"))["subscriptions"]
        return str(next(one["id"] for one in known if one.get("isDefault")))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise Unknown("not signed in (az login)") from error


@cache
@state.secrets_hidden()  # from az, which is asked for it
def _token() -> str:
    try:
        from azure.core.exceptions import ClientAuthenticationError
        from azure.identity import AzureCliCredential, CredentialUnavailableError
    except ImportError as error:
        raise Unknown("Azure's SDK is not installed") from error
    try:
        return str(AzureCliCredential().get_token("https://management.azure.com/.default").token)
    except (ClientAuthenticationError, CredentialUnavailableError) as error:
        raise Unknown("not signed in (az login)") from error


def ask(region: str, needs: Sequence[Need]) -> Found:
    """By the region's list of usages; `Unknown` if Azure does not say."""
    import httpx

    account = subscription()
    with _SIGNING_IN:
        token = _token()
    url = f"{ENDPOINT}/subscriptions/{account}/providers/Microsoft.Compute/locations/{region}/usages?api-version={API_VERSION}"
    every: dict[str, tuple[float, float | None]] = {}
    while url:
        try:
            answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=SECONDS)
        except httpx.HTTPError as error:
            raise Unknown(f"Azure does not answer ({type(error).__name__})") from error
        if "MissingSubscriptionRegistration" in answer.text:
            raise Unknown("the subscription has not registered it; run az provider register -n Microsoft.Compute --wait")
        if answer.status_code != 200:
            raise Unknown(f"Azure refused Microsoft.Compute/locations/usages/read ({answer.status_code})")
        said = answer.json()
        every |= {_plain(row["name"]["value"]): (float(row["limit"]), float(row["currentValue"])) for row in said["value"]}
        url = said.get("nextLink")
    return {need.code: every[_plain(need.code)] for need in needs if _plain(need.code) in every}


def regions() -> Sequence[str]:
    """Those of the table: every subscription lists all of them."""
    return sorted(CLOUD.regions)
