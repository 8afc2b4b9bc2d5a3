# shellcheck shell=bash
# Sourced by setup.sh and finetune.sh (which sets gpus, how many it needs): whether the NVIDIA GPUs of this machine can serve.

# vLLM 0.32 comes with CUDA 13, which wants a driver of the 580 series or newer (NVIDIA, CUDA Toolkit release notes, table of drivers).
OLDEST_DRIVER=580
ANSWER_SECONDS=60
# How long the GPUs behind an NVSwitch may take to join its fabric, once this set-up runs.
FABRIC_SECONDS=120

ask_gpus() { # FIELD,...: a line for each GPU
  timeout "$ANSWER_SECONDS" nvidia-smi --query-gpu="$1" --format=csv,noheader 2>&1 | tr -d '\r'
}

check_driver() { # that each GPU is there, with a driver that is new enough
  local said code=0 versions other oldest count wanted=${gpus:-${MISTRALCTL_TENSOR_PARALLEL:-1}}
  command -v nvidia-smi > /dev/null || {
    echo "this machine shows no NVIDIA GPU (nvidia-smi); use a machine type with one, or an image with its driver (--image CLOUD=ID)" >&2
    return 1
  }
  said=$(ask_gpus driver_version) || code=$?
  versions=$(grep -E '^[0-9]+(\.[0-9]+)+$' <<< "$said" | sort -V) || true
  other=$(grep -vE '^([0-9]+(\.[0-9]+)+|WARNING: .*|[[:space:]]*)$' <<< "$said" | head -n 1 | cut -c 1-300) || true
  case $code in
    0 | 14) ;; # 14: the GPU's infoROM is damaged, which is a warning (nvidia-smi(1), RETURN VALUE)
    124) other=${other:-nvidia-smi did not answer within $ANSWER_SECONDS s} ;;
    *) other=${other:-nvidia-smi ended with code $code} ;;
  esac
  if [ -n "$other" ] || [ -z "$versions" ]; then
    echo "the driver does not reach the GPU: ${other:-nvidia-smi says nothing}; take another machine, or an image with a driver that fits it (--image CLOUD=ID)" >&2
    return 1
  fi
  oldest=${versions%%$'\n'*}
  if [ "${oldest%%.*}" -lt "$OLDEST_DRIVER" ]; then
    echo "the NVIDIA driver of this image is $oldest and vLLM's CUDA 13 needs $OLDEST_DRIVER or newer; name an image with one (--image CLOUD=ID)" >&2
    return 1
  fi
  count=$(wc -l <<< "$versions")
  if [ "$count" -lt "$wanted" ]; then
    echo "this machine shows $((count)) NVIDIA GPUs and $wanted shall share the model; take another machine, or a smaller --tensor-parallel" >&2
    return 1
  fi
}

check_fabric() { # that GPUs behind an NVSwitch have joined its fabric: CUDA ends with error 802 (system not yet initialized) before
  local deadline=$((SECONDS + FABRIC_SECONDS)) waits
  while waits=$(ask_gpus fabric.state,fabric.status | grep -E '^(Not Started|In Progress|Completed)' | grep -vx 'Completed, Success'); do
    if [ "$SECONDS" -ge "$deadline" ]; then
      echo "the GPUs' NVLink fabric is not ready after $FABRIC_SECONDS s (state, status: ${waits%%$'\n'*}); nvidia-fabricmanager, of the driver's version, has to run in the image: name another (--image CLOUD=ID)" >&2
      return 1
    fi
    sleep 1
  done
}

check_compiler() { # that Triton can build its launcher, a file of C, when vLLM starts (docs/gpu.md): with gcc, or else clang
  local compiler
  compiler=$(command -v gcc || command -v clang) || true
  "${compiler:-false}" -fsyntax-only -x c - <<< '#include <stdlib.h>' > /dev/null 2>&1 || {
    echo "this machine has no C compiler with its headers, which vLLM needs on a GPU; install gcc and libc6-dev, or name an image with them (--image CLOUD=ID)" >&2
    return 1
  }
}
