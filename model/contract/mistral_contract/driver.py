"""The NVIDIA driver that a node needs: the laptop rents nothing with an older one, the node's set-up checks what it finds."""

from __future__ import annotations

# vLLM 0.32 comes with CUDA 13.0, which needs a driver of the 580 series or newer
# (https://docs.nvidia.com/cuda/cuda-toolkit-release-notes, "CUDA Toolkit and Minimum Required NVIDIA Driver Versions").
OLDEST = 580


def too_old(version: str) -> bool:
    """Whether CUDA 13 does not run on this driver, given as nvidia-smi prints it.

    >>> too_old("535.216.01"), too_old("580.126.16"), too_old("580")
    (True, False, False)
    """
    return int(version.partition(".")[0]) < OLDEST
