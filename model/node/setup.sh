#!/usr/bin/env bash
# Makes a node ready to serve: pulls the weights while it installs vLLM, then waits for both.
# Repeatable: what is there already is not made again. The envs and folders are those of docs/contract.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -z "${MISTRALCTL_SETUP_MINUTES:-}" ] || bash "$here/watch.sh" start setup
model_dir=$(dirname "$here")
node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
run_dir=$node_dir/run/$MISTRALCTL_NAME
env_dir=$node_dir/envs/$MISTRALCTL_ENV_ID
umask 022
# shellcheck source=model/node/once.sh
. "$here/once.sh"
# shellcheck source=model/node/weights.sh
. "$here/weights.sh"
# shellcheck source=model/node/gpu.sh
. "$here/gpu.sh"
mkdir -p "$node_dir/envs" "$node_dir/weights" "$run_dir"
if command -v flock > /dev/null; then # an earlier set-up of this deployment that nobody ended: two would take away each other's folders
  exec 8> "$run_dir/setup.lock"
  flock --nonblock 8 || { echo "waits for another set-up of $MISTRALCTL_NAME"; flock 8; }
fi

export UV_BUILD_CONSTRAINT=$here/build-constraints.txt

install_ours() { # [--offline]: what builds our packages is in uv's cache after the first time
  "$uv" pip install --quiet "$@" --python "$env_dir/bin/python" --no-deps --target "$run_dir/site.new" \
    "$model_dir/contract" "$model_dir/plugin" "$model_dir/node" "$model_dir/weights"
}

NO_GPU=3 # the code of make_environment where this machine's GPUs cannot serve

make_environment() {
  phase environment start
  if [ "$MISTRALCTL_DEVICE" = cuda ]; then
    { check_driver && check_fabric && check_compiler; } || return "$NO_GPU"
  fi
  bash "$here/environment.sh" "$MISTRALCTL_DEVICE" "$MISTRALCTL_PYTHON" "$env_dir" "$uv" || return
  rm -rf "$run_dir/site.new"
  mkdir "$run_dir/site.new"
  install_ours --offline 2> /dev/null || install_ours || return
  rm -rf "$run_dir/site" # of a server that may still run: it has read what it needs
  mv "$run_dir/site.new" "$run_dir/site" || return
  phase environment end
}

pull() { # URI FOLDER [REVISION [RESULT [OPTION...]]]: vLLM reads it next, so it is kept in the page cache
  local n
  case $1,${MISTRALCTL_SECRETS:-} in
    hf://*,*hf_token*) # the laptop sends it as soon as it sees this set-up run; by hand it may come later, or never
      for ((n = 0; n < 240; n++)); do
        [ -e "$run_dir/secrets.json" ] && break
        sleep 0.25
      done ;;
  esac
  mistral_weights pull "$1" "$2" --keep-cached ${3:+--revision "$3"} ${4:+--result "$4"} "${@:5}"
}

pull_adapter() { # NAME URI: as the store has it now, and judged. A server that runs keeps what it read of the one before
  pull "$2" "$run_dir/lora/$1" "" "" --fresh || return
  PYTHONPATH=$model_dir/contract "$weights_env/bin/python" -m mistral_contract.adapters \
    "$node_dir/weights/$MISTRALCTL_WEIGHTS_ID" "$1" "$run_dir/lora/$1"
}

list_adapters() { # a line for each: its name, a tab, its URI. Neither holds a control character
  "$uv" run --quiet --no-project --python "$MISTRALCTL_PYTHON" python -c 'import json, os
for adapter in json.loads(os.environ.get("MISTRALCTL_LORA") or "{}").items():
    print(*adapter, sep="\t")'
}

pull_weights() {
  local uri=${MISTRALCTL_WEIGHTS/#file:\/\/\~/file://$HOME} adapters adapter source sources=()
  phase weights start
  adapters=$(list_adapters) || return
  while IFS=$'\t' read -r adapter source; do
    [ -z "$adapter" ] || sources+=("${source/#file:\/\/\~/file://$HOME}")
  done <<< "$adapters"
  weights_tool "$uri" ${sources[@]+"${sources[@]}"} ${MISTRALCTL_KEYS_URI:+"$MISTRALCTL_KEYS_URI"} || return
  ln -sfn "$weights_env" "$run_dir/weights-tool" || return
  pull "$uri" "$node_dir/weights/$MISTRALCTL_WEIGHTS_ID" "${MISTRALCTL_REVISION:-}" "$run_dir/pulled.json" \
    ${MISTRALCTL_WEIGHTS_DIGEST:+--digest "$MISTRALCTL_WEIGHTS_DIGEST"} || return
  while IFS=$'\t' read -r adapter source; do
    [ -z "$adapter" ] || pull_adapter "$adapter" "${source/#file:\/\/\~/file://$HOME}" || return
  done <<< "$adapters"
  phase weights end
}

uv=$(find_uv) || { phase environment fail "uv cannot be installed; install it from PyPI and run this again"; exit 1; }

errors=$run_dir/errors
rm -rf "$errors"
mkdir "$errors"
end_jobs() { # those that still run: the number of another may be somebody else's by now
  local job
  for job; do
    case $'\n'$(jobs -rp)$'\n' in *$'\n'"$job"$'\n'*) kill -- -"$job" 2> /dev/null || true ;; esac
  done
}

# A job of its own for each, so that the one that fails can end the other with all its children.
set -m
(heard "$errors/weights" pull_weights) &
weights_job=$!
(heard "$errors/environment" make_environment) &
environment_job=$!
set +m
(heard "$errors/cloud" ready_for_cloud) &
cloud_job=$!
trap 'end_jobs "$weights_job" "$environment_job"; exit 130' INT TERM

wait "$environment_job" || {
  status=$?
  end_jobs "$weights_job"
  wait "$weights_job" 2> /dev/null || true
  why=$(last_error "$errors/environment")
  case $status in
    "$NO_GPU") phase environment fail "$why" ;;
    *) phase environment fail "the environment of vLLM could not be installed (${why:-code $status}); check the network and the free disk space, then run up again" ;;
  esac
  exit "$status"
}
set -m
bash "$here/byte_code.sh" "$MISTRALCTL_DEVICE" "$env_dir" "$run_dir/site" > /dev/null 2>&1 &
byte_code_job=$!
set +m
trap 'end_jobs "$weights_job" "$byte_code_job"; exit 130' INT TERM
wait "$weights_job" || {
  status=$?
  end_jobs "$byte_code_job"
  why=$(last_error "$errors/weights")
  phase weights fail "${why:-the weights could not be pulled (code $status); see mistralctl logs}"
  exit "$status"
}
end_jobs "$byte_code_job"
wait "$byte_code_job" 2> /dev/null || true
wait "$cloud_job" || {
  why=$(last_error "$errors/cloud")
  phase environment fail "${why:-this machine could not be made ready for its cloud; see mistralctl logs}"
  exit 1
}
