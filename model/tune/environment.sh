#!/usr/bin/env bash
# environment.sh NODE_ENV FOLDER [UV]: installs what trains into FOLDER, once, beside the environment with vLLM, whose packages it sees.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
node_env=$1 folder=$2 uv=${3:-uv}
# shellcheck source=model/node/once.sh
. "$here/../node/once.sh"

install_trainer() {
  "$uv" venv --quiet --python "$node_env/bin/python" "$folder" || return
  "$node_env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/node.pth" || return
  attempts "$uv" pip install --quiet --require-hashes --no-deps --python "$folder/bin/python" --requirement "$here/requirements.txt"
}

mkdir -p "$(dirname "$folder")"
once "$folder" install_trainer
