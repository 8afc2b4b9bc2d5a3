"""Files that a server writes while it serves, which a full disk does not end."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path


def replaced(file: Path, text: str) -> bool:
    """Whether a file was replaced as a whole; where there is no room for it, it stays as it was, and no pieces stay."""
    # Of its own: a launcher that is ending may write beside the one that takes its place.
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True
