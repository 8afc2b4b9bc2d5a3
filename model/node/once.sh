# shellcheck shell=bash
# Sourced by the scripts beside it.

# No script beside this one has an EXIT trap: bash also runs it in a background job that is ended before it has become a program of its own.
# The trap itself cannot tell: a comparison of $BASHPID with $$ was true there in 21 of 36 runs.

heard() { # FILE COMMAND...: runs it. When this returns, FILE has all that it wrote to standard error
  { "${@:2}" 2>&1 1>&3 3>&- | { tee "$1" || true; } >&2 3>&-; } 3>&1
}

last_error() { # FILE: the last line that `heard` put there; where that is uv's last cause, its error and that
  [ -e "$1" ] || return 0
  awk '/[^ ]/ { last = $0 }
    /^error: / { error = substr($0, 8); cause = "" }
    /^ +(cause|Caused by): / { cause = $0; sub(/^ +(cause|Caused by)/, "", cause) }
    END { print last ~ /^error: |^ +(cause|Caused by): / ? error cause : last }' "$1"
}

attempts() { # COMMAND...: three times, with a pause between them
  local n
  for n in 1 2 3; do
    if "$@"; then return; fi
    [ "$n" = 3 ] || { echo "attempt $n of 3 failed; once more in $((n * 5)) s" >&2; sleep $((n * 5)); }
  done
  return 1
}

once() { # FOLDER COMMAND...: runs the command unless FOLDER was completed before; one process at a time
  local folder=$1
  shift
  (
    if command -v flock > /dev/null; then flock 9; fi
    [ -e "$folder/.complete" ] && exit 0
    rm -rf "$folder"
    "$@" && touch "$folder/.complete"
  ) 9> "$folder.lock"
}
