"""Microsoft Azure."""

from mistralctl.clouds import Cloud

CLOUD = Cloud(
    name="azure",
    regions=frozenset(
        "eastus eastus2 centralus northcentralus southcentralus westcentralus westus westus2 westus3 "
        "canadacentral canadaeast brazilsouth northeurope westeurope francecentral germanywestcentral "
        "italynorth norwayeast polandcentral spaincentral swedencentral switzerlandnorth uksouth ukwest "
        "australiaeast centralindia southindia eastasia southeastasia japaneast japanwest koreacentral "
        "israelcentral qatarcentral southafricanorth uaenorth".split()
    ),
    zone=None,
    sign_in="az login",
    page="https://learn.microsoft.com/cli/azure/authenticate-azure-cli",
    title="Azure",
    package="mistralctl[azure]",
    order=3,
    files=(".azure/msal_token_cache.json", ".azure/azureProfile.json"),
    roles=("azure.json",),
    # No disk_tier: high is the performance tier P50 here, which is billed as a disk of 4 TiB (sky/clouds/azure.py, disk_performance_tier).
    disk_price=0.154,  # premium SSD, East US, P10 (128 GiB at 19.71; https://azure.microsoft.com/pricing/details/managed-disks)
)
