from __future__ import annotations

from mistralctl.phases import Milestones, PhaseEvent

LOG = [
    "Considered resources (1 node):",
    "⚙︎ Launching on AWS us-east-1 (us-east-1a).",
    "⚙︎ Launching on AWS us-east-1 (us-east-1b).",
    "└── Instance is up.",
    "⚙︎ Syncing files.",
    '(setup pid=1) mistralctl-phase {"phase": "weights", "event": "start", "at": 100.5}',
    '(setup pid=1) mistralctl-phase {"phase": "weights", "event": "end", "at": 101.5}',
]


def heard(lines: list[str]) -> list[tuple[str, str, float]]:
    milestones, found = Milestones(), list[PhaseEvent]()
    found += milestones.begin(0)
    for at, line in enumerate(lines, 1):
        found += milestones.read(line, at)
    found += milestones.finish(99)
    return [(event.phase, event.event, event.at) for event in found]


def test_skypilots_log_becomes_phases_and_failover_is_one_of_them() -> None:
    assert heard(LOG) == [
        ("optimize", "start", 0), ("optimize", "end", 2), ("provision", "start", 2), ("provision", "end", 4),
        ("node", "start", 4), ("node", "end", 5), ("files", "start", 5), ("files", "end", 6),
        ("weights", "start", 100.5), ("weights", "end", 101.5),
    ]  # fmt: skip


def test_words_that_changed_make_one_long_phase() -> None:
    assert heard(["something new", "and newer"]) == [("optimize", "start", 0), ("optimize", "end", 99)]
