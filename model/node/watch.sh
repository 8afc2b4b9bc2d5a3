#!/usr/bin/env bash
# watch.sh start setup|run [PID]: watches from outside of all that may hang, and ends a set-up and a server (PID) that outlive their time.
# setup.sh, mirror.sh and run.sh call it first, and it returns at once; the newest watch of a deployment is the only one. Whatever becomes of
# its job it watches on, and ends the machine, too: SkyPilot's autostop waits for a job, however long its set-up hangs.
# On a machine that is not rented it starts nothing.
# watch.sh setup|run [PID] watches in the foreground.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
node_dir=${MISTRALCTL_NODE_DIR/#\~/$HOME}
run_dir=$node_dir/run/$MISTRALCTL_NAME
rented=${SKYPILOT_CLUSTER_INFO:-} # SkyPilot says so to the jobs of its machines
# The launcher ends by itself at its lifetime; so many seconds later it is told to, and so many after that it is killed.
grace=60 last=30
look=5 # seconds between two looks
# Autostop takes a machine five minutes after its job has ended. So many seconds after that it is ended here.
forgotten=1200

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$1"; }

paid_from() { # since when the machine is paid for, seconds since the epoch: the start of its first process. Kept over its stops, so they count, too
  local age
  [ -s "$run_dir/paid_from" ] || {
    age=$(ps -o etimes= -p 1 2> /dev/null) || age=0
    echo "$(($(date +%s) - ${age:-0}))" > "$run_dir/paid_from"
  }
  cat "$run_dir/paid_from"
}

budget_end() { # when the price by time has reached the budget; nothing without one
  [ -n "${MISTRALCTL_BUDGET:-}" ] || return 0
  awk -v from="$(paid_from)" -v budget="$MISTRALCTL_BUDGET" -v price="$MISTRALCTL_PRICE" \
    'BEGIN { printf "%d\n", from + budget / price * 3600 }'
}

passed() { # END [SECONDS]: whether it is that long after an end; never if that is no number
  case $1 in '' | *[!0-9]*) return 1 ;; esac
  [ "$(date +%s)" -ge "$(($1 + ${2:-0}))" ]
}

ours() { # PID: whether it is a process of this deployment, by its environment; where that cannot be read, it is
  [ -e /proc/self/environ ] || return 0
  grep -qzxF "MISTRALCTL_NAME=$MISTRALCTL_NAME" "/proc/$1/environ" 2> /dev/null &&
    grep -qzxF -e "MISTRALCTL_NODE_DIR=$MISTRALCTL_NODE_DIR" -e "MISTRALCTL_NODE_DIR=$node_dir" "/proc/$1/environ" 2> /dev/null
}

alive() { # PID
  kill -0 "$1" 2> /dev/null && ours "$1"
}

kill_group() { # PID: it and its group, while one of them is ours: then no other process can have the number
  local pid
  for pid in $(ps -e -o pid=,pgid= 2> /dev/null | awk -v group="$1" '$2 == group { print $1 }'); do
    if ours "$pid"; then
      kill -KILL -- -"$1" 2> /dev/null
      return
    fi
  done
  ! alive "$1" || kill -KILL "$1" 2> /dev/null
}

end_all() { # all that the deployment started on this machine, but this
  local signal pid
  for signal in TERM KILL; do
    for pid in /proc/[0-9]*; do
      pid=${pid#/proc/}
      [ "$pid" = "$$" ] || [ "$pid" = "$BASHPID" ] || ! ours "$pid" || kill -"$signal" "$pid" 2> /dev/null
    done
    [ "$signal" = KILL ] || sleep 10
  done
}

autostop_now() { # SkyPilot's own end of a machine, on every cloud: without waiting for a job, with disk and all
  local python
  python=$(cat "$HOME/.sky/python_path" 2> /dev/null) || python=$HOME/skypilot-runtime/bin/python
  cd "$HOME" || return
  env -u PYTHONPATH timeout 120 "$python" -c 'from sky.skylet import autostop_lib as autostop
autostop.set_autostop(0, "cloudvmray", autostop.AutostopWaitFor.NONE, True)' || return
  env -u PYTHONPATH timeout 120 "$python" -m sky.skylet.attempt_skylet # it may have been killed
}

end_machine() {
  local cloud
  cloud=$(sed -n 's/.*"cloud": *"\([A-Za-z]*\)".*/\1/p' <<< "$rented" | tr '[:upper:]' '[:lower:]')
  while :; do
    say "ends this machine through SkyPilot's autostop"
    [ ! -e "$here/clouds/$cloud.sh" ] || timeout 180 bash "$here/clouds/$cloud.sh"
    autostop_now || say "SkyPilot's runtime does not take it (code $?)"
    sleep 300
    say "it is still there and is powered off"
    sudo -n shutdown -h now || sudo -n poweroff
    sleep 300
  done
}

watch_setup() {
  local waited=0
  while only_one; do
    waited=$((waited + look)) # not by the clock, which may be set while a machine is young
    if [ "$waited" -ge "$((MISTRALCTL_SETUP_MINUTES * 60))" ]; then
      say "after $MISTRALCTL_SETUP_MINUTES minutes no server was started; all is ended"
    elif passed "$(budget_end)"; then
      say "the budget of $MISTRALCTL_BUDGET USD is spent before a server was started; all is ended"
    else
      continue
    fi
    end_all
    end_machine
  done
}

watch_run() { # PID: `mistralctl extend` writes a later end into the file
  local gone=0
  while only_one; do
    if alive "$1"; then
      passed "$(cat "$run_dir/ends_at" 2> /dev/null)" "$grace" || passed "$(budget_end)" "$grace" || continue
      say "the launcher outlived its lifetime; it is ended from outside"
      kill -TERM "$1" 2> /dev/null
      sleep "$last"
      kill_group "$1"
    elif [ -z "$rented" ]; then
      return
    elif gone=$((gone + look)) && { [ "$gone" -ge "$forgotten" ] || passed "$(budget_end)"; }; then
      say "its server has ended and the machine is still there"
      end_machine
    fi
  done
}

only_one() { # waits a while; whether no later watch was started and the deployment is still there
  sleep "$look"
  case $(cat "$run_dir/watch" 2> /dev/null) in
    '' | "$$") [ -d "$run_dir" ] ;;
    *) return 1 ;;
  esac
}

case $1 in
  start)
    mkdir -p "$run_dir"
    [ "$2" = setup ] || {
      rm -f "$run_dir/ends_at"
      [ -z "${MISTRALCTL_TTL_MINUTES:-}" ] || echo "$(($(date +%s) + MISTRALCTL_TTL_MINUTES * 60))" > "$run_dir/ends_at"
    }
    [ -n "$rented" ] || exit 0
    # No child of the job that SkyPilot may cancel, nor in its session; nothing of it holds the job's log open.
    (setsid bash "$0" "${@:2}" < /dev/null > "$run_dir/watch.log" 2>&1 &)
    ;;
  *)
    echo "$$" > "$run_dir/watch"
    [ -z "$rented" ] || paid_from > /dev/null
    if [ "$1" = setup ]; then watch_setup; else watch_run "$2"; fi
    ;;
esac
exit # the file may be replaced while this runs
