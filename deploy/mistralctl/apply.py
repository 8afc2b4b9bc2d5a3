"""Runs the steps that `lifecycle` decided, and saves the record after each: the one place that does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from mistralctl import gate, phases, state
from mistralctl.errors import Exit, UserError
from mistralctl.lifecycle import Do, Observed, Step
from mistralctl.runtime.protocol import Attempt, Runtime, Server
from mistralctl.state import Record
from mistralctl.tasks import setup_id

# A step after which something may be left that a failure has to take back.
MAKING = (Do.RENT, Do.SET_UP, Do.START, Do.REPLACE, Do.ADOPT, Do.CONNECT, Do.WALK)


class Up:
    """One run of the steps of `up`. `check` is called for the step of that name, and told all steps."""

    def __init__(self, runtime: Runtime, attempt: Attempt, check: Callable[[Sequence[Step]], None]) -> None:
        self.runtime, self.check = runtime, check
        self.attempt = replace(attempt, keep=self.keep)
        self.answer = ""
        self._server: Server | None = None
        self._steps: Sequence[Step] = ()

    @property
    def record(self) -> Record:
        """The record as the steps so far left it."""
        return self.attempt.record

    def keep(self, record: Record) -> None:
        """Save the record."""
        state.save(record)

    def run(self, steps: Sequence[Step]) -> Record:
        """Run the steps; the record of a server that answers. UserError if one fails, and what it left is taken back as far as can be."""
        self._steps = steps
        try:
            for step in steps:
                try:
                    self._run(step)
                except BaseException as error:
                    if step.do in MAKING:
                        self.runtime.give_up(self.attempt, error)
                    raise
        finally:
            if self._server is not None:
                self._server.close()
        return self.record

    def _run(self, step: Step) -> None:
        record = ACTIONS[step.do](self)
        if record is not None:
            self.keep(record)
            self.attempt = replace(self.attempt, record=record)

    def _check(self) -> None:
        self.runtime.check(self.attempt)
        self.check(self._steps)

    def _end_machine(self) -> None:
        old = self.attempt.old or self.record
        self.runtime.remove(old)
        self.keep(self.runtime.forget(old))
        self.attempt = replace(self.attempt, observed=Observed())

    def _stop(self) -> None:
        self.runtime.stop(self.record)

    def _start(self) -> Record:
        self._server = self.runtime.start(self.attempt)
        return self._server.record

    def _replace(self) -> Record:
        self._server = self.runtime.replace(self.attempt)
        return self._server.record

    def _started(self) -> Server:
        if self._server is None:
            raise ValueError("no step before this one started a server")
        return self._server

    def _connect(self) -> Record:
        return self.runtime.connect(self.attempt, self._started())

    def _walk(self) -> Record:
        server = self._started()
        server.wait("ready")
        record = replace(self.record, setup_id=setup_id(self.record.task))
        self.keep(record)
        with self._stopped_if_refused():
            record, self.answer = gate.pass_through(record, self._hear)
        return replace(record, state="up", phases=tuple(asdict(phase) for phase in phases.durations(server.events)))

    def _hear(self, event: phases.PhaseEvent) -> None:
        self._started().events.append(event)
        self.attempt.on_phase(event)

    @contextlib.contextmanager
    def _stopped_if_refused(self) -> Iterator[None]:
        """A server that does not pass the gate is stopped."""
        try:
            yield
        except UserError as error:
            if error.code == Exit.SERVER:
                with contextlib.suppress(UserError):  # why it was refused is what the user should read
                    self.runtime.stop(self.record)
            raise


ACTIONS: dict[Do, Callable[[Up], Record | None]] = {
    Do.KEEP: lambda up: None,
    Do.LOOK: lambda up: None,
    Do.CANCEL: lambda up: up.runtime.cancel(up.attempt.old or up.record),
    Do.CHECK: Up._check,
    Do.END_MACHINE: Up._end_machine,
    Do.STOP: Up._stop,
    Do.RENT: Up._start,
    Do.SET_UP: Up._start,
    Do.START: Up._replace,
    Do.REPLACE: Up._replace,
    Do.ADOPT: Up._replace,
    Do.CONNECT: Up._connect,
    Do.WALK: Up._walk,
}


def down(steps: Sequence[Step], runtime: Runtime, record: Record) -> bool:
    """Run the steps of `down`; whether there was something to end."""
    there = False
    for step in steps:
        if step.do is Do.STOP:
            runtime.stop(record)
            there = True
        elif step.do is Do.END_MACHINE:
            there = runtime.remove(record)
        elif step.do is Do.SWEEP:
            runtime.sweep(record, promised=there)
        else:
            state.save(runtime.forget(record))
    return there
