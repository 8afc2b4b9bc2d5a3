#!/usr/bin/env bash
# Makes a node ready to serve: pulls the weights while it installs vLLM, then waits for both.
# Repeatable: what is there already is not made again. The envs and folders are those of docs/contract.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
model_dir=$(dirname "$here")
node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
run_dir=$node_dir/run/$MISTRALCTL_NAME
env_dir=$node_dir/envs/$MISTRALCTL_ENV_ID
umask 022
# shellcheck source=model/node/once.sh
. "$here/once.sh"
mkdir -p "$node_dir/envs" "$node_dir/weights" "$run_dir"

phase() { # PHASE EVENT [MESSAGE]
  local message=${3:-}
  message=${message//\\/\\\\}
  message=$(printf '%s' "${message//\"/\\\"}" | tr -d '\000-\037')
  printf 'mistralctl-phase {"phase": "%s", "event": "%s", "at": %s%s}\n' "$1" "$2" "${EPOCHREALTIME:-$(date +%s)}" \
    "${message:+, \"message\": \"$message\"}"
}

find_uv() {
  local candidate
  for candidate in uv "$HOME/.local/bin/uv" "$node_dir/envs/uv/bin/uv"; do
    if command -v "$candidate" > /dev/null; then command -v "$candidate"; return; fi
  done
  { python3 -m venv "$node_dir/envs/uv" && "$node_dir/envs/uv/bin/pip" install --quiet uv; } 1>&2
  echo "$node_dir/envs/uv/bin/uv"
}

install_ours() { # [--offline]: what builds our packages is in uv's cache after the first time
  "$uv" pip install --quiet "$@" --python "$env_dir/bin/python" --no-deps --target "$run_dir/site" \
    "$model_dir/plugin" "$model_dir/weights"
}

make_environment() {
  phase environment start
  bash "$here/environment.sh" "$MISTRALCTL_ENGINE" "$MISTRALCTL_PYTHON" "$env_dir" "$uv" || return
  rm -rf "$run_dir/site"
  install_ours --offline 2> /dev/null || install_ours || return
  phase environment end
}

# What vLLM imports has no byte code yet: its first start would spend some ten seconds on that. Here they cost nothing, while the
# weights are still on their way.
make_byte_code() {
  [ -e "$env_dir/.byte-code" ] && return
  PYTHONPATH=$run_dir/site HF_HUB_OFFLINE=1 "$env_dir/bin/python" -c 'import vllm.entrypoints.cli.serve, \
    vllm.entrypoints.launchers.api_server.entry, vllm.v1.engine.core, vllm.v1.worker.'"${MISTRALCTL_ENGINE/cuda/gpu}"'_worker, vllm_mistral.model' &&
    touch "$env_dir/.byte-code"
}

install_weights_tool() { # SCHEME...
  "$uv" venv --quiet --python "$MISTRALCTL_PYTHON" "$weights_env" || return
  local scheme options=()
  for scheme in "$@"; do options+=(--extra "$scheme"); done
  attempts "$uv" pip install --quiet --python "$weights_env/bin/python" --requirement "$model_dir/weights/pyproject.toml" \
    ${options[@]+"${options[@]}"}
}

pull() { # URI FOLDER [REVISION]
  PYTHONPATH=$model_dir/weights "$weights_env/bin/python" -m mistral_weights pull "$1" "$2" ${3:+--revision "$3"} \
    --secrets "$run_dir/secrets.json"
}

pull_weights() {
  local uri=${MISTRALCTL_WEIGHTS/#file:\/\/\~/file://$HOME} adapters schemes adapter source
  phase weights start
  adapters=$(printf '%s' "${MISTRALCTL_LORA:-}" | tr -d '{}" ' | tr ',' '\n')  # names and URIs hold none of these
  schemes=$(printf '%s\n%s\n' "$uri" "$(printf '%s' "$adapters" | sed 's/^[^:]*://')" | sed -n 's#://.*##p' | { grep -v '^file$' || true; } | sort -u)
  weights_env=$node_dir/envs/weights-$(cat "$model_dir/weights/pyproject.toml" - <<< "$MISTRALCTL_PYTHON $schemes" | cksum | tr ' ' -)
  # shellcheck disable=SC2086 # one argument for each scheme
  once "$weights_env" install_weights_tool $schemes || {
    echo "what reads ${schemes//$'\n'/, } could not be installed; check the network, then run up again" >&2
    return 1
  }
  pull "$uri" "$node_dir/weights/$MISTRALCTL_WEIGHTS_ID" "${MISTRALCTL_REVISION:-}" || return
  while IFS=: read -r adapter source; do
    [ -z "$adapter" ] || pull "$source" "$run_dir/lora/$adapter" || return
  done <<< "$adapters"
  phase weights end
}

uv=$(find_uv) || { phase environment fail "uv cannot be installed; install it from PyPI and run this again"; exit 1; }

errors=$(mktemp -d)
trap 'rm -rf "$errors"' EXIT
# A job of its own for each, so that the one that fails can end the other with all its children.
set -m
(pull_weights) 2> >(tee "$errors/weights" >&2) &
weights_job=$!
(make_environment) 2> >(tee "$errors/environment" >&2) &
environment_job=$!
set +m
trap 'kill -- -"$weights_job" -"$environment_job" 2> /dev/null || true; exit 130' INT TERM

last_error() { # PHASE: the last line that it wrote to standard error
  sleep 0.2 # until tee has written it
  grep -v '^ *$' "$errors/$1" | tail -n 1
}

wait "$environment_job" || {
  status=$?
  kill -- -"$weights_job" 2> /dev/null || true
  wait "$weights_job" 2> /dev/null || true
  phase environment fail "the environment of vLLM could not be installed ($(last_error environment)); check the network and the free disk space, then run up again"
  exit "$status"
}
set -m
(make_byte_code) > /dev/null 2>&1 &
byte_code_job=$!
set +m
trap 'kill -- -"$weights_job" -"$byte_code_job" 2> /dev/null || true; exit 130' INT TERM
wait "$weights_job" || {
  status=$?
  kill -- -"$byte_code_job" 2> /dev/null || true
  phase weights fail "$(last_error weights)"
  exit "$status"
}
kill -- -"$byte_code_job" 2> /dev/null || true
wait "$byte_code_job" 2> /dev/null || true
