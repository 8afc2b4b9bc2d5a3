"""The canary's figures of a set, computed by vllm_mistral's reference beside this package, as one more file of the set."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from . import names
from .digests import blake3_of
from .disk import explained, write_whole
from .errors import Kind, WeightsError
from .installed import find, write_state
from .manifest import ManifestFile, render

FILE = "mistralctl-canary.json"
COMPUTED = "computed"  # how its bytes were checked: nobody promised them
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD")  # variables that computing needs nothing of
_SOURCES = Path(__file__).parents[2]  # model/, where the reference lies beside this


def add(folder: Path, python: Path) -> int:
    """Computes the figures with a Python that has torch, in the memory of one layer, and names them in the manifest; once.

    Their bytes, 0 where the set had them already.
    """
    installed = find(folder)
    if installed is None or installed.manifest.file(FILE) is not None:
        return 0
    path = os.pathsep.join(str(_SOURCES / part) for part in ("plugin", "contract"))
    environ = {name: os.environ[name] for name in os.environ if not _SECRET.search(name)} | {"PYTHONPATH": path}
    command = [str(python), "-m", "vllm_mistral.reference", str(folder), "--canary", "--stream"]
    try:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise WeightsError(
            Kind.MISSING, f"{python} cannot be run ({error.strerror}); it should be a Python with torch"
        ) from error
    said = ""
    with process:
        assert process.stderr is not None  # noqa: S101 - a pipe was asked for
        for said in process.stderr:
            sys.stderr.write(said)
    if process.returncode:
        why = said.strip()
        if process.returncode < 0:
            why = f"its process was ended by signal {-process.returncode}" + (
                ", most likely because the memory was full" if process.returncode == -9 else ""
            )
        raise WeightsError(
            Kind.REFUSED,
            f"the canary's figures could not be computed: {why or f'code {process.returncode}'}; leave --canary out to mirror without",
        )
    with explained(folder):
        data = (folder / FILE).read_bytes()
        size = installed.manifest.range_bytes
        ranges = tuple(blake3_of(data[at : at + size]) for at in range(0, len(data), size))
        facts = ManifestFile(FILE, len(data), hashlib.sha256(data).hexdigest(), blake3_of(data), ranges, COMPUTED)
        files = tuple(sorted((*installed.manifest.files, facts), key=lambda file: file.name))
        grown = replace(installed, manifest=replace(installed.manifest, files=files))
        write_whole(folder / names.MANIFEST, render(grown.manifest))
        write_state(grown)
    return len(data)
