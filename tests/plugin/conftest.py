"""What every test beside vLLM needs: its environment before it is imported, and a table of measured differences at the end."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One thread: the tiny models of these tests spend more time waiting for a second one, most of all on a busy machine.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "mistral_swa",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_measured: list[tuple[str, float, float]] = []


@pytest.fixture
def measured() -> Callable[[str, float, float], None]:
    """Asserts that a difference is within its limit, and puts it into the table at the end of the run."""

    def note(case: str, difference: float, limit: float) -> None:
        _measured.append((case, difference, limit))
        assert difference <= limit, f"{case}: {difference:.2e} is more than {limit:.0e}"

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("largest differences of log-probabilities")
        for case, difference, limit in _measured:
            terminalreporter.write_line(f"{difference:9.2e}  (limit {limit:.0e})  {case}")
