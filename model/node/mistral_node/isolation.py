"""vLLM as a user of its own, where the machine allows that: without the launcher's files, and without the cloud's metadata service."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_contract import files
from mistral_node.contract import Contract

PREPARE_SECONDS = 300
# Of the launcher's variables that user gets those with these beginnings.
KEPT = (
    "PATH", "LANG", "LC_", "TZ", "CUDA", "NVIDIA_", "NCCL_", "VLLM_", "OMP_", "GOMP_", "MKL_", "TORCH", "HF_HUB_", "MISTRALCTL_",
    "PYTHONPATH", "TOKENIZERS_", "DO_NOT_TRACK", "FORWARDED_ALLOW_IPS",
)  # fmt: skip


@dataclass(frozen=True)
class Isolation:
    """`user` is whom vLLM runs as, empty for the launcher's own; `why` is what could not be done; `front` begins the command."""

    user: str = ""
    why: str = ""
    front: tuple[str, ...] = ()

    def prefix(self, *shown: Path) -> tuple[str, ...]:
        """The command that runs another one so; of our home folder it sees `shown`, too."""
        return (*self.front, *(str(path) for path in shown), "--") if self.front else ()

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What of these variables that user gets."""
        if not self.user:
            return dict(environ)
        kept = {name: value for name, value in environ.items() if name.startswith(KEPT)}
        return kept | {"HOME": f"/var/lib/{self.user}", "USER": self.user, "LOGNAME": self.user}


def _sealed(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sudo", "-n", "bash", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=PREPARE_SECONDS,
        stdin=subprocess.DEVNULL,
    )


def prepare(wanted: Contract) -> Isolation:
    """Makes the user that the contract asks for, and the folder that it shares with us, empty.

    Where this machine does not allow it, vLLM runs as before and `why` says so.
    """
    if wanted.serve_user is None:
        return Isolation()
    script = str(wanted.run_dir / files.MODEL.name / "node" / "sealed.sh")
    try:
        done = _sealed(script, "prepare", wanted.serve_user, str(os.getgid()), str(wanted.shared_dir))
    except (OSError, subprocess.TimeoutExpired) as error:
        return Isolation(why=f"sudo did not work: {error}")
    said = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
    if done.returncode and not (wanted.shared_dir.is_dir() and wanted.shared_dir.stat().st_uid != os.getuid()):
        return Isolation(why=f"no user of its own: {said}")
    python = Path(sys.base_prefix).parent  # of uv's own, in our home folder: links to versions lie beside each other there
    shown = (files.SITE, files.LORA, files.KEYS)
    paths = [str(path) for path in (Path(sys.prefix), python, *(wanted.run_dir / entry.name for entry in shown))]
    front = ("sudo", "-n", "bash", script, "run", wanted.serve_user, str(Path.home()), str(wanted.shared_dir), *paths)
    return Isolation(wanted.serve_user, f"the metadata service is not shut to it: {said}" if done.returncode else "", front)
