"""azure_by_hand.py GROUP REGION SIZE [spot] [labelled] [LABEL=VALUE]...: makes a machine with Azure's own libraries.

In a `labelled` group, if that is said; prints the code of a refusal.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGhhbmQ= hand"


def make(group: str, region: str, size: str, words: list[str], labels: dict[str, str]) -> None:
    """A group, a network, a machine in it and its disk."""
    from azure.identity import AzureCliCredential
    from azure.mgmt.compute import ComputeManagementClient
    from azure.mgmt.network import NetworkManagementClient
    from azure.mgmt.resource import ResourceManagementClient
    from mistralctl.clouds.azure.quotas import subscription

    credential, account = AzureCliCredential(process_timeout=300), subscription()

    def body(properties: dict[str, Any], **more: Any) -> io.BytesIO:
        return io.BytesIO(json.dumps({"location": region, "properties": properties} | more).encode())

    ResourceManagementClient(credential, account).resource_groups.create_or_update(
        group, body({}, tags=labels if "labelled" in words else {})
    )
    network = NetworkManagementClient(credential, account)
    subnets = [{"name": "subnet", "properties": {"addressPrefix": "10.0.0.0/24"}}]
    space = body({"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]}, "subnets": subnets})
    inside = {"subnet": {"id": network.virtual_networks.begin_create_or_update(group, "sky-vnet", space).result().subnets[0].id}}
    interface = body({"ipConfigurations": [{"name": "ip", "properties": inside}]})
    connected = [{"id": network.network_interfaces.begin_create_or_update(group, "sky-nic", interface).result().id}]
    keys = [{"path": "/home/azureuser/.ssh/authorized_keys", "keyData": KEY}]
    machine = body({
        "hardwareProfile": {"vmSize": size}, "networkProfile": {"networkInterfaces": connected}, "priority": "Spot" if "spot" in words else "Regular",
        "storageProfile": {"osDisk": {"createOption": "FromImage", "deleteOption": "Delete", "diskSizeGB": 64}},
        "osProfile": {"adminUsername": "azureuser", "computerName": "hand", "linuxConfiguration": {"ssh": {"publicKeys": keys}}},
    }, tags=labels)  # fmt: skip
    ComputeManagementClient(credential, account).virtual_machines.begin_create_or_update(group, f"{group}-vm", machine).result()


def main() -> None:
    from azure.core.exceptions import HttpResponseError

    group, region, size, *rest = sys.argv[1:]
    labels = dict(one.split("=", 1) for one in rest if "=" in one)
    try:
        make(group, region, size, rest, labels)
    except HttpResponseError as error:
        sys.exit(f"refused: {getattr(error.error, 'code', None) or str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
