# shellcheck shell=bash
# Sourced by the scripts beside it.

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
