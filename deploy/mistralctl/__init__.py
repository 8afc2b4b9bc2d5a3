"""Mistral 7B on AWS, GCP, Azure or this machine, in one command."""

import sys
from pathlib import Path

__version__ = "0.1.0"


def package_dir(part: str) -> Path:
    """Return the folder `task_templates` or `model`: inside an installed package, or beside `deploy/` in a checkout."""
    package = Path(__file__).parent
    inside = package / part
    return inside if inside.is_dir() else package.parent.parent / part


# `mistral_contract` lies in the folder that travels to nodes, so that both sides import the very same file.
sys.path.append(str(package_dir("model") / "contract"))
