"""kill -9 at random points, a hundred times in all; a full disk; a limit on the size of files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sets
from mistral_weights import manifest as manifests
from mistral_weights.errors import WeightsError
from mistral_weights.mirror import Mirror, mirror
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from places import Place
from test_pull import contents

HERE = Path(__file__).parent
KILLS = 100


def _kill(uri: str, folder: Path, kills: int, seed: int) -> dict[str, int]:
    command = [sys.executable, str(HERE / "killer.py"), uri, str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kind", ["hf", "s3"])
def test_a_pull_that_is_killed_again_and_again(kind: str, stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    """Half of the kills on a source without a manifest (hub), half on a mirror with one (S3)."""
    files, place = sets.a_set(), stores[kind]
    uri = stores["hf"].new()
    stores["hf"].put(uri, files)
    if kind == "s3":
        target = place.new()
        mirror(Mirror(uri, target, patience=patience))
        uri = target
    place.proxy.delay = 0.05
    kills = rounds = 0
    while kills < KILLS // 2:
        folder = tmp_path / f"round{rounds}" / "set"
        told = _kill(uri, folder, KILLS // 2 - kills, seed=rounds)
        assert contents(folder) == files
        if told["kept"] is not None:
            assert told["resumed"] >= told["kept"], "all that was right is kept"
        assert [path.name for path in folder.parent.iterdir()] == ["set"]
        kills += told["kills"]
        rounds += 1
        assert rounds < 40
    assert kills == KILLS // 2


def test_no_damage_of_a_journal_is_believed(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    """Every line of it spoilt in turn, the digits of hashes and sizes among them: the manifest is right all the same."""
    files, uri, dice = sets.a_set(shard=100 * sets.KIB), stores["hf"].new(), random.Random(5)
    stores["hf"].put(uri, files)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    request = Pull(
        uri,
        tmp_path / "set",
        range_bytes=32 * sets.KIB,
        connections=1,
        patience=replace(patience, connect=300.0, stall=300.0, tries=1),
    )
    stores["hf"].proxy.plan("500", after=8)
    with pytest.raises(WeightsError, match="500"):
        pull(request)
    partial = tmp_path / ".set.partial"
    lines = (partial / "journal.jsonl").read_bytes().splitlines(keepends=True)
    stores["hf"].proxy.plan("")
    assert any(b'"whole"' in line for line in lines)
    for number in range(len(lines)):
        spoilt = bytearray(lines[number])
        spoilt[dice.randrange(len(spoilt))] ^= 1
        copy = tmp_path / f"copy{number}"
        shutil.copytree(partial, tmp_path / f".{copy.name}.partial", copy_function=shutil.copy2)
        (tmp_path / f".{copy.name}.partial" / "journal.jsonl").write_bytes(
            b"".join([*lines[:number], bytes(spoilt), *lines[number + 1 :]])
        )
        pull(replace(request, folder=copy))
        assert contents(copy) == files
        manifest = manifests.read((copy / "mistral-weights.json").read_bytes(), "here")
        assert {file.name: file.sha256 for file in manifest.files} == hashes


_PULL = """
import resource, sys
from pathlib import Path
from mistral_weights.cli import main
filler = sys.argv[3]
if filler == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
elif filler:
    from mistral_weights import arrival
    keep = arrival.Arrival.keep
    def filling(self, *rest):
        if not Path(filler).exists():
            with open(filler, "wb") as sink:
                try:
                    while True:
                        sink.write(bytes(65536))
                        sink.flush()
                except OSError:
                    pass
        keep(self, *rest)
    arrival.Arrival.keep = filling
sys.exit(main(["pull", sys.argv[1], sys.argv[2]]))
"""


def test_a_limit_on_the_size_of_files_is_said_and_survived(stores: dict[str, Place], tmp_path: Path) -> None:
    files, uri = sets.a_set(), stores["s3"].new()
    stores["s3"].put(uri, files)
    command = [sys.executable, "-c", _PULL, uri, str(tmp_path / "set")]
    done = subprocess.run([*command, "limit"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 8
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mistral_weights: the file is larger than allowed here (")
    assert "Traceback" not in done.stderr
    assert subprocess.run([*command, ""], capture_output=True, check=False, timeout=600).returncode == 0
    assert contents(tmp_path / "set") == files


@pytest.mark.parametrize("case", ["too-small", "fills-up"])
def test_a_full_disk_is_said_and_survived(case: str, stores: dict[str, Place], tmp_path: Path) -> None:
    """A real file system of a few MB, in a mount namespace of its own."""
    files, uri = sets.a_set(), stores["s3"].new()
    stores["s3"].put(uri, files)
    disk = tmp_path / "disk"
    disk.mkdir()
    filler = str(disk / "filler") if case == "fills-up" else ""
    size = "6m" if case == "fills-up" else "2m"
    script = f"""
mount -t tmpfs -o size={size} none {disk}
"$0" -c "$1" {uri} {disk}/set "{filler}"; echo code $?
rm -f {disk}/filler; mount -o remount,size=12m {disk}
"$0" -c "$1" {uri} {disk}/set ""; echo code $?
cp -r {disk}/set {tmp_path}/copy
"""
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is everywhere"
    command = [unshare, "--user", "--map-root-user", "--mount", "bash", "-c", script, sys.executable, _PULL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=os.environ)
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 8", "code 0"], done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("mistral_weights: ")]
    assert len(said) == 1
    assert ("free some space" in said[0]) and ("GB free" in said[0] or "the disk is full" in said[0])
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "copy") == files
