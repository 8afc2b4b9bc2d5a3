#!/usr/bin/env bash
# byte_code.sh ENGINE ENV_DIR SITE: makes the byte code of what vLLM and our packages in SITE import, and lets vLLM look at our model class,
# which it does in a process of its own and remembers; once for an environment.
# Its first start would spend some twenty seconds on that. Here they cost nothing, while the weights are still on their way.
set -euo pipefail

worker=${1/cuda/gpu} env_dir=$2 site=$3
[ -e "$env_dir/.byte-code" ] && exit
PYTHONPATH=$site HF_HUB_OFFLINE=1 "$env_dir/bin/python" -c "import gc; gc.disable(); import vllm.entrypoints.cli.serve, \
  vllm.entrypoints.launchers.api_server.entry, vllm.v1.engine.core, vllm.v1.worker.${worker}_worker, vllm_mistral.model"
PYTHONPATH=$site HF_HUB_OFFLINE=1 VLLM_CACHE_ROOT=$env_dir/vllm-cache "$env_dir/bin/python" -c "import vllm, vllm_mistral
vllm_mistral.register()
vllm.ModelRegistry.models[vllm_mistral.ARCHITECTURE].inspect_model_cls()" || true
touch "$env_dir/.byte-code"
