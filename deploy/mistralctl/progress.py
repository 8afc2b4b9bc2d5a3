"""How far a command is, on standard error: live lines on a terminal, plain lines when piped, nothing with JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mistralctl.phases import WORDS, PhaseEvent

if TYPE_CHECKING:
    from mistralctl.commands.eval import Ahead, Progress
    from mistralctl.weights import Report

EVERY_SECONDS = 5.0  # at most one line of an evaluation in so long


def _seconds(began: dict[str, float], event: PhaseEvent) -> str:
    return f" {event.at - began[event.phase]:.1f} s" if event.phase in began else ""


@contextmanager
def of_bytes(form: str) -> Iterator[Report]:
    """A function to pass the weights tool's events to: a bar or lines; with json, one JSON object a line on standard output."""
    if form == "yaml":
        yield lambda event: None
        return
    from mistralctl import weights

    with weights.progress(form) as report:
        yield report


def of_requests(*, quiet: bool) -> tuple[Callable[[Ahead], None], Callable[[Progress], None]]:
    """Functions to pass the plan of an evaluation and its progress to, of which the last one is always told."""
    said = [0.0]

    def line(text: str) -> None:
        if not quiet:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def on_plan(ahead: Ahead) -> None:
        from mistralctl.output import ahead_text

        line(ahead_text(ahead))

    def on_progress(progress: Progress) -> None:
        if time.monotonic() - said[0] < EVERY_SECONDS and progress.done < progress.of:
            return
        said[0] = time.monotonic()
        from mistralctl.output import progress_text

        line(progress_text(progress))

    return on_plan, on_progress


@contextmanager
def shown(*, quiet: bool) -> Iterator[Callable[[PhaseEvent], None]]:
    """A function to pass events to, in the form that standard error can show."""
    began: dict[str, float] = {}
    if quiet:
        yield lambda event: None
    elif not sys.stderr.isatty():

        def line(event: PhaseEvent) -> None:
            word = WORDS.get(event.phase, event.phase)
            text = {"start": f"{word} ...", "end": f"{word}: done{_seconds(began, event)}", "fail": f"{word}: failed"}
            began.setdefault(event.phase, event.at)
            if event.phase == "ready":
                text["end"] = "ready"
            sys.stderr.write(text[event.event] + "\n")
            sys.stderr.flush()

        yield line
    else:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        rows: dict[str, TaskID] = {}
        with Progress(
            SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), TimeElapsedColumn(), console=console,
            transient=True,
        ) as live:  # fmt: skip

            def row(event: PhaseEvent) -> None:
                word = WORDS.get(event.phase, event.phase)
                if event.event == "start":
                    began[event.phase] = event.at
                    rows[event.phase] = live.add_task(word, total=None)
                    return
                if event.phase in rows:
                    live.remove_task(rows.pop(event.phase))
                mark = "[green]ok[/]" if event.event == "end" else "[red]--[/]"
                live.console.print(f"{mark} {word}{_seconds(began, event)}", highlight=False)

            yield row
