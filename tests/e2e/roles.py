"""Whether the role files under docs/roles allow the calls that a simulated cloud's journal holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROLES = Path(__file__).parent.parent.parent / "docs" / "roles"
PREFIXES = {"service-quotas": "servicequotas"}  # where IAM's prefix is not the service's name


def forbidden(journal: list[dict[str, Any]], by: str, role: str) -> set[str]:
    """The actions of AWS that `by` (`laptop` or `node`) called and that the policy in `role`.json does not name."""
    statements = json.loads((ROLES / f"{role}.json").read_text())["Statement"]
    allowed = {action for statement in statements for action in statement["Action"]}
    calls = [call for call in journal if call["event"] == "call" and call["by"] == by]
    return {f"{PREFIXES.get(call['service'], call['service'])}:{call['action']}" for call in calls} - allowed
