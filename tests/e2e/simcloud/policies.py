"""Whether a policy of Amazon's IAM allows a request: the part of its logic that the role files use, and an error for any other.

By the IAM User Guide: policy evaluation logic (an explicit deny wins, nothing is allowed by default), condition operators (string, ARN, Null,
...IfExists; a missing key fails an operator but for a negated one), multivalued context keys (ForAllValues holds for none), variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """One thing that has to be allowed: an action on a resource, with its context keys; several values where a key has several."""

    action: str
    resource: str
    context: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    def values(self, key: str) -> list[str]:
        """The values of a context key, whose name does not depend on case."""
        found = next((value for name, value in self.context.items() if name.lower() == key.lower()), None)
        return [] if found is None else [found] if isinstance(found, str) else list(found)


def allows(policy: Policy, request: Request) -> bool:
    """Return whether a policy allows it."""
    effects = [statement["Effect"] for statement in policy["Statement"] if _holds(statement, request)]
    return "Allow" in effects and "Deny" not in effects


def _holds(statement: Mapping[str, Any], request: Request) -> bool:
    if unknown := set(statement) - {"Sid", "Effect", "Action", "Resource", "Condition"}:
        raise ValueError(f"not imitated: {sorted(unknown)}")
    if not any(_like(request.action.lower(), action.lower()) for action in _every(statement["Action"])):
        return False
    resources = (_filled(resource, request) for resource in _every(statement["Resource"]))
    if not any(resource is not None and _like(request.resource, resource) for resource in resources):
        return False
    return all(
        _condition(operator, request, key, _every(values))
        for operator, keys in statement.get("Condition", {}).items()
        for key, values in keys.items()
    )


def _every(found: str | Sequence[str]) -> list[str]:
    return [found] if isinstance(found, str) else list(found)


def _like(text: str, pattern: str) -> bool:
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def _filled(pattern: str, request: Request) -> str | None:
    """A pattern with the request's values in place of its variables; None where one has none: then it matches nothing."""
    for name in re.findall(r"\$\{([^}]+)\}", pattern):
        values = request.values(name)
        if len(values) != 1:
            return None
        pattern = pattern.replace(f"${{{name}}}", values[0])
    return pattern


def _arn_like(text: str, pattern: str) -> bool:
    """Each of the six parts by itself."""
    parts, patterns = text.split(":", 5), pattern.split(":", 5)
    return len(parts) == len(patterns) == 6 and all(map(_like, parts, patterns))


COMPARED = {"StringEquals": str.__eq__, "StringLike": _like, "ArnLike": _arn_like, "ArnEquals": _arn_like}


def _condition(operator: str, request: Request, key: str, wanted: Sequence[str]) -> bool:
    if operator == "Null":
        return [str(not request.values(key)).lower()] == list(wanted)
    quantifier, _, name = operator.rpartition(":")
    name, exists, _ = name.partition("IfExists")
    if name not in COMPARED or quantifier not in ("", "ForAllValues", "ForAnyValue"):
        raise ValueError(f"not imitated: {operator}")
    found = request.values(key)
    if not found:
        return bool(exists) or quantifier == "ForAllValues"
    patterns = [pattern for one in wanted if (pattern := _filled(one, request)) is not None]
    held = [any(COMPARED[name](value, pattern) for pattern in patterns) for value in found]
    if not quantifier and len(found) > 1:
        raise ValueError(f"{key} has several values: ForAllValues or ForAnyValue is missing")
    return any(held) if quantifier == "ForAnyValue" else all(held)
