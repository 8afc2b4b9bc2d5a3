#!/usr/bin/env bash
# byte_code.sh ENGINE ENV_DIR SITE: makes the byte code of what vLLM and our packages in SITE import, once for an environment.
# Its first start would spend some ten seconds on that. Here they cost nothing, while the weights are still on their way.
set -euo pipefail

worker=${1/cuda/gpu} env_dir=$2 site=$3
[ -e "$env_dir/.byte-code" ] && exit
PYTHONPATH=$site HF_HUB_OFFLINE=1 "$env_dir/bin/python" -c "import vllm.entrypoints.cli.serve, \
  vllm.entrypoints.launchers.api_server.entry, vllm.v1.engine.core, vllm.v1.worker.${worker}_worker, vllm_mistral.model"
touch "$env_dir/.byte-code"
