# shellcheck shell=bash disable=SC2154 # the script that sources this sets here, node_dir, run_dir, model_dir, uv, and maybe limit
# Sourced by the scripts beside it, after once.sh: the tool that moves weights, in a small environment of its own.
# Sets weights_env.

phase() { # PHASE EVENT [MESSAGE]
  local message=${3:-}
  message=${message//\\/\\\\}
  message=$(printf '%s' "${message//\"/\\\"}" | tr -d '\000-\037')
  printf 'mistralctl-phase {"phase": "%s", "event": "%s", "at": %s%s}\n' "$1" "$2" "${EPOCHREALTIME:-$(date +%s)}" \
    "${message:+, \"message\": \"$message\"}"
}

ready_for_cloud() { # what a node of this cloud needs first: clouds/CLOUD.sh, if there is one. SkyPilot says which cloud it is
  local cloud
  cloud=$(sed -n 's/.*"cloud": *"\([A-Za-z]*\)".*/\1/p' <<< "${SKYPILOT_CLUSTER_INFO:-}" | tr '[:upper:]' '[:lower:]')
  [ ! -e "$here/clouds/$cloud.sh" ] || bash "$here/clouds/$cloud.sh"
}

install_uv() {
  python3 -m venv "$node_dir/envs/uv" && "$node_dir/envs/uv/bin/pip" install --quiet --require-hashes --requirement "$here/uv.txt"
}

find_uv() {
  local candidate
  for candidate in uv "$HOME/.local/bin/uv"; do
    if command -v "$candidate" > /dev/null; then command -v "$candidate"; return; fi
  done
  mkdir -p "$node_dir/envs"
  once "$node_dir/envs/uv" install_uv 1>&2 || return # another set-up may be installing it
  echo "$node_dir/envs/uv/bin/uv"
}

install_weights_tool() { # SCHEME...
  "$uv" venv --quiet --python "$MISTRALCTL_PYTHON" "$weights_env" || return
  local scheme options=()
  for scheme in "$@"; do options+=(--extra "$scheme"); done
  attempts "$uv" pip install --quiet --verify-hashes --python "$weights_env/bin/python" \
    --requirement "$model_dir/weights/pyproject.toml" --constraints "$model_dir/weights/constraints.txt" \
    ${options[@]+"${options[@]}"}
}

weights_tool() { # URI...: makes the environment that reads and writes all of these, once for each set of schemes
  local schemes
  schemes=$(printf '%s\n' "$@" | sed -n 's#://.*##p' | { grep -v '^file$' || true; } | sort -u)
  weights_env=$node_dir/envs/weights-$(cat "$model_dir/weights/pyproject.toml" "$model_dir/weights/constraints.txt" - <<< "$MISTRALCTL_PYTHON $schemes" | cksum | tr ' ' -)
  # shellcheck disable=SC2086 # one argument for each scheme
  once "$weights_env" install_weights_tool $schemes || {
    echo "what reads ${schemes//$'\n'/, } could not be installed; check the network, then run this again" >&2
    return 1
  }
}

mistral_weights() { # VERB ARGUMENT...: with the secrets that the laptop sent; `limit` may hold a command that runs it
  PYTHONPATH=$model_dir/weights:$model_dir/contract ${limit[@]+"${limit[@]}"} "$weights_env/bin/python" -m mistral_weights "$@" \
    --secrets "$run_dir/secrets.json"
}
