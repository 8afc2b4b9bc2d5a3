"""Microsoft Azure."""

from mistralctl.clouds import Cloud

CLOUD = Cloud(
    "azure",
    frozenset(
        "eastus eastus2 centralus northcentralus southcentralus westcentralus westus westus2 westus3 "
        "canadacentral canadaeast brazilsouth northeurope westeurope francecentral germanywestcentral "
        "italynorth norwayeast polandcentral spaincentral swedencentral switzerlandnorth uksouth ukwest "
        "australiaeast centralindia southindia eastasia southeastasia japaneast japanwest koreacentral "
        "israelcentral qatarcentral southafricanorth uaenorth".split()
    ),
    None,
    "az login",
    "https://learn.microsoft.com/cli/azure/authenticate-azure-cli",
    order=3,
)
