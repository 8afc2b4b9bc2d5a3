#!/usr/bin/env bash
# Signs this node in to Azure with its own identity: no credentials are copied to a node, and SkyPilot, which takes the machine away
# from the node itself when it is idle, knows no other way on Azure than the Azure CLI. Repeatable.
set -euo pipefail

az=$(command -v az || echo "$HOME/skypilot-runtime/bin/az") # SkyPilot has installed it there
for pause in 5 15 30 0; do # an identity that was made a minute ago is not known everywhere in Azure yet
  # What the identity may do is not asked here: a role that was just given takes its time, too.
  if "$az" login --identity --allow-no-subscriptions --output none; then exit 0; fi
  sleep "$pause"
done
echo "this machine cannot sign in to Azure with its identity (az login --identity), so it could not be taken away when it is idle; run down" >&2
exit 1
