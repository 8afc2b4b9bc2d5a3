#!/usr/bin/env bash
# Runs the launcher. The wrapper around it ends even a hung launcher at the end of the deployment's lifetime.
set -euo pipefail

node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
run_dir=$node_dir/run/$MISTRALCTL_NAME
export MISTRALCTL_NODE_DIR=$node_dir
export PYTHONPATH=$run_dir/site
launcher=("$node_dir/envs/$MISTRALCTL_ENV_ID/bin/python" -m vllm_mistral.serve)

if [ -n "${MISTRALCTL_TTL_MINUTES:-}" ] && command -v timeout > /dev/null; then
  # The launcher ends by itself at its lifetime; two minutes later this does it.
  exec timeout --signal=TERM --kill-after=60s "$((MISTRALCTL_TTL_MINUTES * 60 + 120))s" "${launcher[@]}"
fi
exec "${launcher[@]}"
