"""What a node reported of itself, of the types that a launcher and a guard write.

Files of a node may be damaged, of another version, or written by whoever took its server over. What is of another type than it should be is None
here, unknown fields stay, and no text holds what a terminal would obey. Nothing in them stops a command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_contract import untrusted

LATEST = 1e11  # seconds since the epoch: the year 5138, which every calendar still knows
MOST_COUNT = 1 << 63
MOST_BYTES = 16 << 20

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_COUNT


def is_moment(value: Any) -> bool:
    """Return whether a value is a time in seconds since the epoch."""
    return untrusted.finite(value) and 0 <= value <= LATEST


def _are(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _named(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_names(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(_is_text, value))


@dataclass(frozen=True)
class Shape:
    """An object: what is known of its fields; without one that is `needed` it is None as a whole."""

    fields: Mapping[str, Check | Shape]
    needed: tuple[str, ...] = ()
    others: Check | Shape | None = None

    def of(self, value: Any) -> dict[str, Any] | None:
        """Return the object, with None for each field that is of another type; None if it is no object."""
        if not isinstance(value, dict):
            return None
        found = {}
        for name, one in value.items():
            known = self.fields.get(name, self.others)
            found[name] = known.of(one) if isinstance(known, Shape) else one if known is None or known(one) else None
        return None if any(found.get(name) is None for name in self.needed) else found


_WHY = Shape({"why": _is_text, "message": _is_text})
_CANARY = Shape({
    "state": _is_text, "against": _is_text, "weights": _is_text, "max_difference": untrusted.finite, "tolerance": untrusted.finite,
})  # fmt: skip
_STATUS = Shape({
    "state": _is_text, "serving_id": _is_text, "ended_because": _is_text,
    "started_at": is_moment, "ready_at": is_moment, "ends_at": is_moment,
    "flags": _are(_is_text), "error": _WHY, "isolation": _WHY,
    "engine": Shape({"vllm": _is_text, "torch": _is_text}),
    "canary": _CANARY,
    "requests": Shape({"last_at": is_moment}),
    "restarts": Shape({"count": _is_count, "of": _is_count, "why": _is_text}, ("count", "of")),
    "keys": Shape({"problem": _is_text, "since": is_moment}),
    "budget": Shape({"usd": untrusted.finite, "ends_at": is_moment}, ("usd", "ends_at")),
    "progress": Shape({"step": _is_count, "steps": _is_count, "loss": untrusted.finite, "left_seconds": untrusted.finite}, ("step", "steps", "loss")),
})  # fmt: skip
_USAGE = Shape({
    "serial": _is_count, "keys": Shape({}, others=Shape({"requests": _is_count, "tokens": _is_count, "refused": _is_count})),
})  # fmt: skip
_PULL = Shape({
    "fetched": _is_count, "seconds": untrusted.finite, "uri": _is_text, "disk_written": _is_count, "disk_seconds": untrusted.finite,
})  # fmt: skip
_MACHINE = Shape({
    "image": _is_text, "system": _is_text, "kernel": _is_text, "cpus": _is_count, "memory_bytes": _is_count,
    "memory_available_bytes": _is_count, "disk_bytes": _is_count, "disk_free_bytes": _is_count, "gpus": _are(_named(_is_text)),
    "gpu_problem": _is_text, "cuda": _is_text, "devices": _are(_is_text), "programs": Shape({}, others=_is_text), "pull": _PULL,
})  # fmt: skip


_GATE = Shape({"routes": _is_count, "requests": _is_count, "let_in": _is_names}, ("routes", "requests", "let_in"))


def _sound(value: Any) -> Any:
    """Return plain data with texts that a terminal can show, and None for numbers that are none."""
    if isinstance(value, str):
        return untrusted.printable(value)
    if isinstance(value, dict):
        return {untrusted.printable(name): _sound(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_sound(one) for one in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and not untrusted.finite(value) else value


def _read(text: str, shape: Shape) -> dict[str, Any] | None:
    try:
        return shape.of(_sound(untrusted.read(text, MOST_BYTES, judged=True)))
    except untrusted.NotRead:
        return None


def status(text: str) -> dict[str, Any] | None:
    """Return a launcher's status.json; None where it is none."""
    return _read(text, _STATUS)


def usage(text: str) -> dict[str, Any]:
    """Return what a guard has counted; empty where nothing can be read."""
    return {name: value for name, value in (_read(text, _USAGE) or {}).items() if value is not None}


def training(text: str) -> dict[str, Any]:
    """Return the receipt.json that a run of training published; empty where nothing can be read."""
    return _read(text, Shape({"loss": Shape({}), "proof": Shape({}), "libraries": Shape({}, others=_is_text)})) or {}


def listed(text: str) -> list[Any]:
    """Return the files that a manifest names; empty where nothing can be read."""
    found = (_read(text, Shape({})) or {}).get("files")
    return found if isinstance(found, list) else []


def machine(value: Any) -> dict[str, Any] | None:
    """Return what machine.py printed, as text or read already; None if it is anything else."""
    found = _read(value, _MACHINE) if isinstance(value, str) else _MACHINE.of(_sound(value))
    return None if found is None else dict.fromkeys(_MACHINE.fields) | found


def gate(value: Any) -> dict[str, Any] | None:
    """Return what a gate's report sums up; None if it is anything else."""
    return _GATE.of(_sound(value))


def canary(value: Any) -> dict[str, Any] | None:
    """Return what a canary found; None if it is anything else."""
    return _CANARY.of(_sound(value))
