"""When the deployment's life ends: at a time in a file that watch.sh makes and `mistralctl extend` replaces, or when the machine has cost its
budget. Launcher and watch read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mistral_contract import files


@dataclass(frozen=True)
class Budget:
    """What the machine may cost: `usd` at `price` USD an hour since `paid_from`, so until `ends_at` (seconds since the epoch)."""

    usd: float
    price: float
    paid_from: float
    ends_at: float


def _seconds(file: Path, otherwise: float) -> float:
    try:
        return float(int(file.read_text("utf-8")))
    except (OSError, ValueError):
        return otherwise


def ends_at(run_dir: Path, started: float, ttl_minutes: float | None) -> float | None:
    """The end in seconds since the epoch, None for never; without the file (a launcher started by hand) `started` and the ttl."""
    if ttl_minutes is None:
        return None
    return _seconds(run_dir / files.ENDS_AT.name, started + ttl_minutes * 60)


def budget(run_dir: Path, started: float, usd: float | None, price: float | None) -> Budget | None:
    """The budget, None without one; where the watch has not noted since when the machine is paid for, since `started`."""
    if usd is None or price is None:
        return None
    paid_from = _seconds(run_dir / files.PAID_FROM.name, started)
    return Budget(usd, price, paid_from, float(int(paid_from + usd / price * 3600)))
