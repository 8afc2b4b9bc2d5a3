"""Where the node's things are on this machine: one folder, and in it the environment with vLLM."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from mistral_contract import files

from mistralctl import state
from mistralctl.tasks import environment_id

OLDEST, NEWEST = (3, 11), (3, 13)  # the Pythons that vLLM 0.32 (3.11 to 3.14) and SkyPilot 0.14 (to 3.13) both name


def local_python_version() -> str:
    """The version of Python for the node's environment on this machine: this one's, if vLLM supports it."""
    major, minor = min(max(sys.version_info[:2], OLDEST), NEWEST)
    return f"{major}.{minor}"


def local_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The node's folder for `--cloud local`."""
    return state.home(environ) / "node"


def local_python(device: str) -> Path:
    """The Python of the node's environment on this machine, whether or not it was made already."""
    return local_dir() / files.ENVIRONMENTS.name / environment_id(device, local_python_version()) / "bin" / "python"
