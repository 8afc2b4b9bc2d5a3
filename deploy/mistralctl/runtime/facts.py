"""What a deployment's machine is: the node's own script for that (model/node/machine.py), run there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mistral_contract import files
from mistral_contract.envs import variable

from mistralctl import reported, state
from mistralctl.errors import Exit, UserError
from mistralctl.runtime import ssh
from mistralctl.state import Record

SECONDS = 60.0


def read(record: Record) -> dict[str, Any]:
    """Return what the machine of a deployment says of itself; UserError if it cannot be asked."""
    script = f"{files.MODEL.of(record.name)}/node/machine.py"
    if record.cluster:
        words = f'exec python3 "{ssh.NODE_DIR}/{script}" {shlex.quote(record.cloud)} {shlex.quote(record.name)}'
        said = ssh.run(record.name, words, seconds=SECONDS)
    else:
        command = [sys.executable, str(Path(record.node_dir) / script), "", record.name]
        environ = state.without_secrets(os.environ) | {variable("node_dir"): record.node_dir}
        try:
            said = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(
                f"{record.name}: its folder cannot be looked at ({error}); run {record.again} again", Exit.NOT_FOUND
            ) from None
    found = reported.machine(said)
    if found is None:
        raise UserError(f"{record.name}: its machine said {said[:100]!r} of itself; run {record.again} again", Exit.SERVER)
    return found
