"""The files of a deployment's folder on its node: on this machine, or over SSH."""

from __future__ import annotations

from pathlib import Path

from mistralctl.runtime import ssh
from mistralctl.state import Record


def read(record: Record, file: str) -> str:
    """The text of a file below the node's folder, empty where it is not there; UserError if the node cannot be reached."""
    if record.cluster:
        return ssh.run(record.name, f'cat "$HOME/.mistralctl/{file}" 2> /dev/null || true', seconds=30)
    try:
        return (Path(record.node_dir) / file).read_text("utf-8")
    except FileNotFoundError:
        return ""


def write(record: Record, file: str, text: str) -> None:
    """Replaces a file below the node's folder as a whole."""
    if record.cluster:
        ssh.run(record.name, f'cd "$HOME/.mistralctl" && cat > "{file}.new" && mv "{file}.new" "{file}"', given=text, seconds=30)
        return
    path = Path(record.node_dir) / file
    temporary = path.with_suffix(".new")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
