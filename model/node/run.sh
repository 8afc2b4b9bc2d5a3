#!/usr/bin/env bash
# Runs the launcher, and outside of it a watch that ends even a hung one soon after the end of the deployment's lifetime.
set -euo pipefail

node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
run_dir=$node_dir/run/$MISTRALCTL_NAME
export MISTRALCTL_NODE_DIR=$node_dir
export PYTHONPATH=$run_dir/site
launcher=("$node_dir/envs/$MISTRALCTL_ENV_ID/bin/python" -m mistral_node.serve)
# The launcher ends by itself at its lifetime; so many seconds later it is told to, and so many after that it is killed.
grace=60 last=30

rm -f "$run_dir/ends_at"
if [ -n "${MISTRALCTL_TTL_MINUTES:-}" ]; then
  echo "$(($(date +%s) + MISTRALCTL_TTL_MINUTES * 60))" > "$run_dir/ends_at"
fi

watch() { # `mistralctl extend` writes a later end into the file
  local end
  while sleep 5; do
    end=$(cat "$run_dir/ends_at" 2> /dev/null) || continue
    case $end in '' | *[!0-9]*) continue ;; esac
    [ "$(date +%s)" -ge "$((end + grace))" ] || continue
    echo "the launcher outlived its lifetime; it is ended from outside"
    kill -TERM "$server" 2> /dev/null || return
    sleep "$last"
    kill -KILL -- -"$server" 2> /dev/null || true
    return
  done
}

# Process groups of their own: the watch ends the launcher's, with vLLM, as a whole.
set -m
"${launcher[@]}" &
server=$!
watch &
watcher=$!
set +m
trap 'kill -TERM "$server" 2> /dev/null || true' TERM INT
while kill -0 "$server" 2> /dev/null; do wait "$server" || true; done
kill -- -"$watcher" 2> /dev/null || true
wait "$server"
