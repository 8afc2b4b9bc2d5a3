#!/usr/bin/env bash
# finetune.sh setup|run: trains on chats, proves the result in vLLM, publishes it. Repeatable: it goes on from the last checkpoint.
# shellcheck disable=SC2329 # `heard` calls what set_up does
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ "$1,${MISTRALCTL_SETUP_MINUTES:-}" = setup, ] || bash "$here/watch.sh" start "$1" "$$"
model_dir=$(dirname "$here")
node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
run_dir=$node_dir/run/$MISTRALCTL_NAME
env_dir=$node_dir/envs/$MISTRALCTL_ENV_ID       # vLLM's
tune_dir=$node_dir/envs/$MISTRALCTL_TUNE_ENV_ID # what trains, beside it
umask 022
# shellcheck source=model/node/once.sh
. "$here/once.sh"
# shellcheck source=model/node/weights.sh
. "$here/weights.sh"
# shellcheck disable=SC2034 # gpu.sh reads it
gpus=$MISTRALCTL_GPUS
# shellcheck source=model/node/gpu.sh
. "$here/gpu.sh"
errors=$run_dir/errors
mkdir -p "$node_dir/envs" "$node_dir/weights" "$run_dir/data" "$errors"
export MISTRALCTL_NODE_DIR=$node_dir
export UV_BUILD_CONSTRAINT=$here/build-constraints.txt

data_file() { # VALUE KIND: where the chats are that a value of the contract names
  case $1 in
    '') ;;
    *://*) echo "$run_dir/data/fetched-$2" ;;
    *) echo "$run_dir/data/$1" ;;
  esac
}
chats=$(data_file "$MISTRALCTL_DATA" chats.jsonl)
held_out=$(data_file "${MISTRALCTL_EVAL_DATA:-}" held-out.jsonl)

install_ours() { # [--offline]
  "$uv" pip install --quiet "$@" --python "$env_dir/bin/python" --no-deps --target "$run_dir/site.new" \
    "$model_dir/contract" "$model_dir/plugin" "$model_dir/node" "$model_dir/weights" "$model_dir/chats" "$model_dir/tune"
}

make_environment() {
  phase environment start
  if [ "$MISTRALCTL_DEVICE" = cuda ]; then
    { check_driver && check_fabric && check_compiler; } || return
  fi
  bash "$here/environment.sh" "$MISTRALCTL_DEVICE" "$MISTRALCTL_PYTHON" "$env_dir" "$uv" || return
  bash "$model_dir/tune/environment.sh" "$env_dir" "$tune_dir" "$uv" || return
  rm -rf "$run_dir/site.new"
  mkdir "$run_dir/site.new"
  install_ours --offline 2> /dev/null || install_ours || return
  rm -rf "$run_dir/site"
  mv "$run_dir/site.new" "$run_dir/site" || return
  phase environment end
}

fetch() { # URI FILE: chats that the machine's role reads
  case $1 in
    *://*) PYTHONPATH=$model_dir/weights:$model_dir/contract "$weights_env/bin/python" -m mistral_weights.fetch "$1" "$2" ;;
  esac
}

bring_data() {
  local n revision=${MISTRALCTL_REVISION:-}
  phase weights start
  weights_tool "$MISTRALCTL_WEIGHTS" "$MISTRALCTL_OUT" "$MISTRALCTL_DATA" ${MISTRALCTL_EVAL_DATA:+"$MISTRALCTL_EVAL_DATA"} || return
  ln -sfn "$weights_env" "$run_dir/weights-tool" || return
  PYTHONPATH=$model_dir/weights:$model_dir/contract "$weights_env/bin/python" -m mistral_weights.writable "$MISTRALCTL_OUT" || return
  fetch "$MISTRALCTL_DATA" "$chats" || return
  fetch "${MISTRALCTL_EVAL_DATA:-}" "$held_out" || return
  case $MISTRALCTL_WEIGHTS,${MISTRALCTL_SECRETS:-} in
    hf://*,*hf_token*) # the laptop sends it as soon as it sees this set-up run
      for ((n = 0; n < 240; n++)); do
        [ -e "$run_dir/secrets.json" ] && break
        sleep 0.25
      done ;;
  esac
  mistral_weights pull "$MISTRALCTL_WEIGHTS" "$node_dir/weights/$MISTRALCTL_WEIGHTS_ID" ${revision:+--revision "$revision"} || return
  phase weights end
}

set_up_failed() { # PHASE FILE CODE OTHERWISE
  local why
  why=$(last_error "$2")
  phase "$1" fail "${why:-$4}"
  exit "$3"
}

set_up() {
  local code=0 weights_job
  if command -v flock > /dev/null; then
    exec 8> "$run_dir/setup.lock"
    flock --nonblock 8 || { echo "waits for another set-up of $MISTRALCTL_NAME"; flock 8; }
  fi
  uv=$(find_uv) || { phase environment fail "uv cannot be installed; install it from PyPI and run this again"; exit 1; }
  set -m # a group of its own, so that it can be ended with its children
  (heard "$errors/weights" bring_data) &
  weights_job=$!
  set +m
  # shellcheck disable=SC2064 # the number of now
  trap "kill -- -$weights_job 2> /dev/null || true; exit 130" INT TERM
  heard "$errors/environment" make_environment || {
    code=$?
    kill -- -"$weights_job" 2> /dev/null || true
    set_up_failed environment "$errors/environment" "$code" "the environments could not be installed; check the network and the disk, then run this again"
  }
  wait "$weights_job" || set_up_failed weights "$errors/weights" "$?" "weights or chats could not be brought; see mistralctl logs"
  heard "$errors/cloud" ready_for_cloud ||
    set_up_failed environment "$errors/cloud" "$?" "this machine could not be made ready for its cloud; see mistralctl logs"
}

said() { # STATE [MESSAGE]: for `mistralctl status`
  local message=${2:-} error=
  message=${message//\\/\\\\}
  message=$(printf '%s' "${message//\"/\\\"}" | tr -d '\000-\037')
  [ -z "$message" ] || error=", \"error\": {\"message\": \"$message\"}"
  printf '{"state": "%s"%s}\n' "$1" "$error" > "$run_dir/status.json.new"
  mv "$run_dir/status.json.new" "$run_dir/status.json"
}

seconds_left() { # of its life, which `mistralctl extend` makes longer, and of its budget; nothing without an end
  local from ends
  from=$(cat "$run_dir/paid_from" 2> /dev/null) || from=$began
  ends=$(cat "$run_dir/ends_at" 2> /dev/null) || ends=
  awk -v now="$(date +%s)" -v from="$from" -v ends="$ends" -v budget="${MISTRALCTL_BUDGET:-}" -v price="${MISTRALCTL_PRICE:-}" 'BEGIN {
    if (ends != "") left = ends - now
    if (budget != "") { bought = from + budget / price * 3600 - now; if (ends == "" || bought < left) left = bought }
    if (ends != "" || budget != "") printf "%d\n", left
  }'
}

LOOK=5 CHECKPOINT=120 # seconds between two looks at the end; what the last checkpoint is given, of a life of ten minutes and more

ends_in_time() { # PID: tells it when its time is over
  local left spare=0
  left=$(seconds_left)
  [ "${left:-0}" -lt 600 ] || spare=$CHECKPOINT
  while [ -n "$left" ]; do
    [ "$left" -gt "$spare" ] || { kill -USR1 "$1"; return; }
    left=$((left - spare))
    sleep "$((left < LOOK ? left : LOOK))"
    left=$(seconds_left)
  done
}

GOES_ON=75 # of mistral_tune: it was asked to end, and a checkpoint of that step is sealed

step() { # NAME COMMAND...: one phase; ended by a signal to this script, and then its checkpoint is whole
  local name=$1 code=0 why
  shift
  phase "$name" start
  said "$name"
  "$@" 2> >(tee "$errors/$name" >&2) &
  child=$!
  [ -z "$ended" ] || kill -TERM "$child" 2> /dev/null || true
  while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done
  wait "$child" || code=$?
  child=
  [ "$code" != 0 ] || { phase "$name" end; return 0; }
  sleep 0.2 # tee may write still
  why=$(last_error "$errors/$name")
  [ "$code" -le 128 ] || why="it was ended by signal $((code - 128)); of signal 9 a full memory is the usual cause"
  [ -z "$ended" ] || [ "$code" != "$GOES_ON" ] || why="$ended; $why"
  why=${why:-it ended with code $code; see mistralctl logs}
  phase "$name" fail "$why"
  said failed "$why"
  end_timer
  exit "$code"
}

end_timer() {
  [ -z "$timer" ] || kill -- -"$timer" 2> /dev/null || true
}

run() {
  local files=(--data "$chats") began
  [ -z "$held_out" ] || files+=(--eval-data "$held_out")
  export PYTHONPATH=$run_dir/site
  child='' ended=''
  trap 'ended="asked to end"; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true' TERM INT
  trap 'ended="its time or its budget is over"; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true' USR1
  began=$(date +%s)
  set -m # so that it ends with its sleep
  (ends_in_time "$$") > /dev/null 2>&1 &
  timer=$!
  set +m
  step train "$tune_dir/bin/python" -m mistral_tune train "${files[@]}"
  step prove "$tune_dir/bin/python" -m mistral_tune prove "${files[@]}"
  step publish "$tune_dir/bin/python" -m mistral_tune publish "${files[@]}"
  end_timer
  said published
}

case $1 in
  setup) set_up ;;
  run) run ;;
esac
exit # the file may be replaced while this runs
