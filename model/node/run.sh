#!/usr/bin/env bash
# Runs the launcher, and outside of it the watch that ends even a hung one soon after the end of the deployment's lifetime.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
export MISTRALCTL_NODE_DIR=$node_dir
export PYTHONPATH=$node_dir/run/$MISTRALCTL_NAME/site
launcher=("$node_dir/envs/$MISTRALCTL_ENV_ID/bin/python" -m mistral_node.serve)

# A process group of its own, so that the launcher is ended with vLLM, as a whole.
set -m
"${launcher[@]}" &
server=$!
bash "$here/watch.sh" start run "$server"
watcher=
if [ -z "${SKYPILOT_CLUSTER_INFO:-}" ]; then # this machine stays, and so would a watch
  bash "$here/watch.sh" run "$server" &
  watcher=$!
fi
set +m
trap 'kill -TERM "$server" 2> /dev/null || true' TERM INT
while kill -0 "$server" 2> /dev/null; do wait "$server" || true; done
[ -z "$watcher" ] || kill -- -"$watcher" 2> /dev/null || true
wait "$server"
