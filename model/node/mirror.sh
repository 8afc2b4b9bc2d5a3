#!/usr/bin/env bash
# mirror.sh setup|run: brings weights from one store to another, by way of this machine's disk. Repeatable: it continues.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -z "${MISTRALCTL_SETUP_MINUTES:-}" ] || bash "$here/watch.sh" start "$1" "$$"
model_dir=$(dirname "$here")
node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
run_dir=$node_dir/run/$MISTRALCTL_NAME
env_dir=$node_dir/envs/${MISTRALCTL_ENV_ID:-} # with torch, for the canary's figures; empty: none are wanted
umask 022
# shellcheck source=model/node/once.sh
. "$here/once.sh"
# shellcheck source=model/node/weights.sh
. "$here/weights.sh"
mkdir -p "$node_dir/envs" "$node_dir/weights" "$run_dir"

uv=$(find_uv) || { phase weights fail "uv cannot be installed; install it from PyPI and run this again"; exit 1; }

mirror() { # VERB
  local wanted=("$MISTRALCTL_MIRROR_SOURCE" "$MISTRALCTL_MIRROR_TARGET" --stage "$node_dir/weights/$MISTRALCTL_NAME") limit=()
  weights_tool "$MISTRALCTL_MIRROR_SOURCE" "$MISTRALCTL_MIRROR_TARGET" || return
  [ "$1" = run ] || {
    ready_for_cloud || return
    [ -z "${MISTRALCTL_ENV_ID:-}" ] || bash "$here/environment.sh" cpu "$MISTRALCTL_PYTHON" "$env_dir" "$uv" 1>&2
    return
  }
  [ -z "${MISTRALCTL_REVISION:-}" ] || wanted+=(--revision "$MISTRALCTL_REVISION")
  [ -z "${MISTRALCTL_ENV_ID:-}" ] || wanted+=(--canary "$env_dir/bin/python")
  if [ -n "${MISTRALCTL_TTL_MINUTES:-}" ] && command -v timeout > /dev/null; then
    limit=(timeout --kill-after=60s "$((MISTRALCTL_TTL_MINUTES * 60))s") # even a mirror that hangs ends, and the machine with it
  fi
  phase weights start
  mistral_weights mirror "${wanted[@]}" || return
  phase weights end
}

heard "$run_dir/errors" mirror "$1" || {
  code=$?
  why=$(last_error "$run_dir/errors")
  phase weights fail "${why:-the mirror ended with code $code; see mistralctl logs}"
  exit "$code"
}
