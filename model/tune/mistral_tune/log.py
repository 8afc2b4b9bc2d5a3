"""The lines that a run of training writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mistral_contract import files

PROGRESS = "mistralctl-progress "


def line(text: str) -> None:
    """Write one line for eyes."""
    sys.stdout.write(f"mistral_tune: {text}\n")
    sys.stdout.flush()


def progress(run_dir: Path, **values: Any) -> None:
    """Write how far the training is: a line of JSON behind `mistralctl-progress`, and status.json of the run, for `mistralctl status`."""
    sys.stdout.write(PROGRESS + json.dumps(values) + "\n")
    sys.stdout.flush()
    status = run_dir / files.STATUS.name
    new = status.with_name(f"{status.name}.new")
    new.write_text(json.dumps({"state": "train", "progress": values}) + "\n", "utf-8")
    new.replace(status)
