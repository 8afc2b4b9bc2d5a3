"""What clouds/azure.py is made of: Azure Resource Manager as far as SkyPilot, the Azure CLI and mistralctl use it."""
