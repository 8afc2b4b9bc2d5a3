"""`python -m mistral_tune VERB`: if a step fails, one line on standard error and an exit code.

0: done, or done before. 1: failed. 75: asked to end; the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mistral_tune import job as jobs
from mistral_tune import processes
from mistral_tune.errors import Interrupted, TuneError
from mistral_tune.job import Job

FAILED, GOES_ON = 1, 75  # the second is EX_TEMPFAIL of sysexits.h


def main(arguments: list[str] | None = None) -> int:
    """Run a step; the libraries that it needs are imported by it alone."""
    parser = argparse.ArgumentParser(prog="mistral_tune", description="Fine-tuning on chats, by the envs of docs/contract.md.")
    parser.add_argument("verb", choices=tuple(STEPS))
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the chats")
    parser.add_argument("--eval-data", type=Path, metavar="FILE", help="chats that are held out; left out: a share is")
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes.bound(os.environ)
    try:
        STEPS[options.verb](jobs.read(options.data, options.eval_data))
    except TuneError as error:
        sys.stdout.flush()
        sys.stderr.write(f"{error}\n")
        return GOES_ON if isinstance(error, Interrupted) else FAILED
    return 0


def _train(job: Job) -> None:
    from mistral_tune import figures, log, publish

    if publish.brought(job):
        log.line(f"{job.wanted.out} holds the result of this run: nothing is trained")
        return
    if job.wanted.gpus > 1:
        files = ["--data", str(job.chats), *(["--eval-data", str(job.held_out)] if job.held_out else [])]
        code = processes.run(job.wanted.gpus, files)
        if code == GOES_ON:
            raise Interrupted("asked to end; the same command goes on from the last checkpoint")
        if code:
            raise TuneError(f"a process of the training ended with code {code}; see mistralctl logs")
    else:
        _worker(job)
    figures.compute(job)


def _worker(job: Job) -> None:
    from mistral_tune.training import train

    train(job)


def _prove(job: Job) -> None:
    from mistral_tune.prove import prove
    from mistral_tune.publish import brought

    if brought(job):
        return
    prove(job)


def _publish(job: Job) -> None:
    from mistral_tune.publish import publish

    publish(job)


STEPS: Mapping[str, Callable[[Job], None]] = {"train": _train, "worker": _worker, "prove": _prove, "publish": _publish}

if __name__ == "__main__":
    raise SystemExit(main())
