"""Pulls that are killed: a program that imports the library once, then forks a pull, kills it, looks, and forks the next.

    python killer.py URI FOLDER KILLS SEED -> one line of JSON: kills, resumed and fetched bytes of the last run

Between the kills it flips bits in what lies half done, now and then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from blake3 import blake3
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from mistral_weights.stores import STORES

RANGE = 32 * 1024
QUICK = Patience(connect=2.0, stall=2.0, tries=4, first_wait=0.01, longest_wait=0.05)


def kept(folder: Path) -> int:
    """Bytes that lie half done and are right, counted without the library: by the journal's own promises."""
    partial = folder.with_name(f".{folder.name}.partial")
    journal = partial / "journal.jsonl"
    ranges: dict[tuple[str, int], str] = {}
    whole: dict[str, int] = {}
    for line in journal.read_bytes().split(b"\n") if journal.exists() else ():
        text, _, checksum = line.rpartition(b"\t")
        if blake3(text).hexdigest()[:16].encode() != checksum:
            continue
        entry = json.loads(text)
        if "range" in entry:
            ranges[entry["name"], entry["range"]] = entry["blake3"]
        elif "whole" in entry:
            path = partial / entry["whole"]["name"]
            if path.exists() and blake3(path.read_bytes()).hexdigest() == entry["whole"]["blake3"]:
                whole[entry["whole"]["name"]] = entry["whole"]["size"]
    total = sum(whole.values())
    for (name, index), promised in ranges.items():
        path = partial / f"{name}.partial"
        if name not in whole and path.exists():
            data = path.read_bytes()[index * RANGE : (index + 1) * RANGE]
            if blake3(data).hexdigest() == promised:
                total += len(data)
    return total


def flip(folder: Path, dice: random.Random) -> None:
    """One bit of one file that lies half done."""
    partial = folder.with_name(f".{folder.name}.partial")
    files = [path for path in partial.rglob("*") if path.is_file() and path.stat().st_size] if partial.exists() else []
    if files:
        path = dice.choice(files)
        at = dice.randrange(path.stat().st_size)
        with path.open("r+b") as handle:
            handle.seek(at)
            byte = handle.read(1)[0] ^ 1 << dice.randrange(8)
            handle.seek(at)
            handle.write(bytes([byte]))


def main(uri: str, folder: Path, kills: int, seed: int) -> None:
    for module in (STORES[uri.partition(":")[0]],):
        __import__(f"mistral_weights.stores.{module}")
    dice = random.Random(seed)
    request = Pull(uri, folder, range_bytes=RANGE, connections=3, patience=QUICK)
    done = flips = 0
    while done < kills and not folder.exists():
        child = os.fork()
        if not child:
            pull(request)
            os._exit(0)
        time.sleep(dice.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        done += os.WIFSIGNALED(status)
        if dice.random() < 0.25:
            flip(folder, dice)
            flips += 1
    expected = kept(folder) if not folder.exists() else None
    last = pull(request)
    result = {"kills": done, "flips": flips, "kept": expected, "resumed": last.resumed, "fetched": last.fetched}
    sys.stdout.write(json.dumps({**result, "there": last.already_there, "bytes": last.bytes}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
