"""When the deployment's life ends: a time in a file that run.sh makes, `mistralctl extend` replaces, and launcher and wrapper read."""

from __future__ import annotations

from pathlib import Path

from mistral_contract import files


def ends_at(run_dir: Path, started: float, ttl_minutes: float | None) -> float | None:
    """The end in seconds since the epoch, None for never; without the file (a launcher started by hand) `started` and the ttl."""
    if ttl_minutes is None:
        return None
    try:
        return float(int((run_dir / files.ENDS_AT.name).read_text("utf-8")))
    except (OSError, ValueError):
        return started + ttl_minutes * 60
