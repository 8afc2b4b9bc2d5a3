"""What shall go wrong, and what happened: the same for every cloud; a cloud knows its own codes for a kind."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

REFUSALS = ("capacity", "quota", "permission", "throttle", "credentials", "price")
ON_BOOT = ("slow_boot", "node_dies", "no_ssh", "no_driver", "small_disk")
# Those that one cloud knows: an API that is not enabled (GCP); a deletion that is refused, or accepted and then not done, a
# resource provider (its name is the `action`) that the subscription has not registered (Azure).
OWN = ("no_api", "locked", "late_failure", "unregistered")
KINDS = (*REFUSALS, *ON_BOOT, *OWN)


@dataclass
class Fault:
    """`None` means any; names may hold `*`. `action`: the API call that is refused (a launch if not given). `count`: how
    often at most. `seconds`: how long a slow boot takes, or after what time a node dies. `mib`: what can be written on a small disk."""

    kind: str
    region: str | None = None
    zone: str | None = None
    instance_type: str | None = None
    spot: bool | None = None
    action: str | None = None
    count: int | None = None
    seconds: float | None = None
    mib: int | None = None
    tokens: set[str] = field(default_factory=set)

    def matches(self, where: dict[str, Any]) -> bool:
        for name in ("region", "zone", "instance_type", "action"):
            wanted = getattr(self, name)
            if wanted is not None and not fnmatchcase(str(where.get(name) or ""), wanted):
                return False
        return self.spot is None or self.spot == where.get("spot")


class Faults:
    """Those that are set now."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, **fault: Any) -> None:
        with self._lock:
            self._faults.append(Fault(**fault))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def find(self, kinds: tuple[str, ...], token: str | None = None, **where: Any) -> Fault | None:
        """The first fault that applies, counted. A client that tries the same call again (same token) counts once."""
        with self._lock:
            for fault in self._faults:
                if fault.kind not in kinds or not fault.matches(where):
                    continue
                if token is not None and token in fault.tokens:
                    return fault
                if fault.count == 0:
                    continue
                if fault.count is not None:
                    fault.count -= 1
                    if token is not None:
                        fault.tokens.add(token)
                return fault
        return None


class Journal:
    """A file of events, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def write(self, event: str, **what: Any) -> None:
        line = json.dumps({"at": round(time.time(), 3), "event": event} | what, default=str)
        with self._lock, self.path.open("a") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
