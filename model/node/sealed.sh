#!/usr/bin/env bash
# Runs vLLM as a user of its own who sees little of this machine. For root.
#   sealed.sh prepare USER GROUP SHARED            makes the user and the folder that it shares with the launcher (of GROUP), shuts the
#                                                  metadata service to it; says what it could not do. Loads what CUDA needs
#   sealed.sh run USER HOME SHARED PATH... -- COMMAND...
#                                                  of everything below HOME the command sees only SHARED and, not to write, each PATH
set -euo pipefail

verb=$1 user=$2
shift 2
# Where a machine of AWS, GCP or Azure gets its credentials from, Azure's second address, AWS's over IPv6.
metadata=(169.254.169.254 168.63.129.16) metadata6=(fd00:ec2::254)
state=/var/lib/$user view=/run/$user

shut() { # PROGRAM ADDRESS
  local rule=(OUTPUT -d "$2" -m owner --uid-owner "$user" -j REJECT)
  "$1" -w -C "${rule[@]}" 2> /dev/null || "$1" -w -I "${rule[@]}"
}

load_uvm() { # CUDA needs /dev/nvidia-uvm. nvidia-smi does not make it, and below setpriv's --no-new-privs the setuid nvidia-modprobe cannot
  { command -v nvidia-modprobe && nvidia-modprobe -c 0 -u; } || modprobe nvidia-uvm || true
}

prepare() { # GROUP SHARED
  local address
  load_uvm > /dev/null 2>&1
  id "$user" > /dev/null 2>&1 || useradd --system --create-home --home-dir "$state" --shell /usr/sbin/nologin "$user"
  rm -rf "$2"
  install -d -o "$user" -g "$1" -m 2770 "$2"
  install -d -o "$user" -m 700 "$state/tmp"
  command -v iptables > /dev/null || { apt-get update -qq && apt-get install -y -qq iptables; } > /dev/null 2>&1 || true
  for address in "${metadata[@]}"; do shut iptables "$address" || return; done
  if [ -e /proc/net/if_inet6 ]; then
    for address in "${metadata6[@]}"; do shut ip6tables "$address" || return; done
  fi
}

show() { # PATH OPTIONS: at the same place of the view, if it would be hidden; others may read it, as HOME itself lets nobody through
  case $1 in "$home"/*) ;; *) return 0 ;; esac
  [ -e "$1" ] || return 0
  [ -z "$2" ] || find "$1" \( -type f ! -perm -o=r -o -type d ! -perm -o=rx \) -exec chmod o+rX {} +
  mkdir -p "$view${1#"$home"}"
  mount --bind "$1" "$view${1#"$home"}"
  mount -o "remount,bind,nosuid,nodev$2" "$view${1#"$home"}"
}

inside() { # HOME SHARED PATH... -- COMMAND...: in a mount namespace of its own
  home=$1
  mkdir -p "$view"
  mount -t tmpfs -o mode=755,size=1m tmpfs "$view"
  show "$2" ""
  shift 2
  while [ "$1" != -- ]; do
    show "$1" ,ro
    shift
  done
  shift
  mount -o remount,ro "$view"
  mount --rbind "$view" "$home"
  mount --bind "$state/tmp" /tmp
  cd /
  exec setpriv --reuid "$(id -u "$user")" --regid "$(id -g "$user")" --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
}

case $verb in
  prepare) prepare "$@" ;;
  run) exec unshare --mount --propagation private bash "$0" inside "$user" "$@" ;;
  inside) inside "$@" ;;
esac
