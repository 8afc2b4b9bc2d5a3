#!/usr/bin/env bash
# environment.sh ENGINE PYTHON FOLDER [UV]: installs vLLM for `cuda` or `cpu` into FOLDER, once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
engine=$1 python=$2 folder=$3 uv=${4:-uv}
# shellcheck source=model/node/once.sh
. "$here/once.sh"

export UV_BUILD_CONSTRAINT=$here/build-constraints.txt # what builds the shim, by its hashes, too

install_vllm() {
  local options=(--verify-hashes --python "$folder/bin/python" --requirement requirements.txt --constraints constraints.txt)
  if [ "$engine" = cpu ]; then
    options+=(--overrides overrides.txt)
    # torch's CPU build comes from the folder that the user named, or else from PyTorch's own index.
    [ -n "${UV_FIND_LINKS:-}" ] || options+=(--torch-backend cpu)
  fi
  "$uv" venv --quiet --python "$python" "$folder" || return
  (cd "$here/vllm-$engine" && attempts "$uv" pip install "${options[@]}")
}

mkdir -p "$(dirname "$folder")"
once "$folder" install_vllm
