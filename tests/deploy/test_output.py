"""What a result looks like, where a command of its own would be needed to see it."""

from __future__ import annotations

import pytest
from mistralctl import output
from mistralctl.commands.up import UpResult


@pytest.mark.parametrize(
    ("cloud", "idle", "ttl", "line"),
    [
        ("local", "30m", "12h", "ends by itself after 30m without a request (--idle), and after 12h in any case (--ttl)"),
        ("aws", "30m", "never", "ends by itself after 30m without a request (--idle); its machine goes five minutes later"),
        ("aws", "never", "2d", "ends by itself after 2d in any case (--ttl); its machine goes five minutes later"),
        ("gcp", "never", "never", "never ends by itself (--idle never, --ttl never)"),
    ],
)
def test_up_says_when_it_ends_by_itself(cloud: str, idle: str, ttl: str, line: str) -> None:
    fields = dict.fromkeys(UpResult.__dataclass_fields__, "") | {"action": "started", "phases": (), "chat": True}
    result = UpResult(**fields | {"cloud": cloud, "idle": idle, "ttl": ttl})  # type: ignore[arg-type]
    assert line in output.up_text(result).splitlines()


def test_up_says_that_a_budget_ends_it() -> None:
    fields = dict.fromkeys(UpResult.__dataclass_fields__, "") | {"idle": "never", "ttl": "never", "cloud": "aws", "budget": 5.0}
    line = "ends by itself when its machine has cost 5.00 USD (--budget); its machine goes five minutes later"
    assert output.ends(UpResult(**fields)) == line  # type: ignore[arg-type]
