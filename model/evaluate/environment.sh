#!/usr/bin/env bash
# environment.sh PYTHON FOLDER [UV]: installs what evaluates into FOLDER, once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$1 folder=$2 uv=${3:-uv}
# shellcheck source=model/node/once.sh
. "$here/../node/once.sh"

install_evaluation() {
  "$uv" venv --quiet --python "$python" "$folder" || return
  attempts "$uv" pip install --quiet --require-hashes --no-deps --python "$folder/bin/python" --requirement "$here/requirements.txt"
}

mkdir -p "$(dirname "$folder")"
once "$folder" install_evaluation
