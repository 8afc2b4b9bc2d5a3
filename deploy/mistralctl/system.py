"""What runs on which operating system: the laptop's part on Linux, macOS and WSL2, a server on Linux alone."""

from __future__ import annotations

import sys

from mistralctl import clouds
from mistralctl.errors import Exit, UserError

NAMES = {"darwin": "macOS", "win32": "Windows", "cygwin": "Windows"}
LINUX = "use Linux (on Windows: WSL2, wsl --install)"


def name() -> str:
    """The operating system's name."""
    return "Linux" if serves() else NAMES.get(sys.platform, sys.platform)


def serves() -> bool:
    """Whether this machine could serve: vLLM 0.32 comes for Linux."""
    return sys.platform == "linux"


def rents() -> bool:
    """Whether SkyPilot runs here: its documentation names Linux, macOS and WSL2."""
    return sys.platform not in ("win32", "cygwin")


def require_serving(place: str) -> None:
    """UserError unless this machine could serve."""
    if not serves():
        *others, last = clouds.names()
        cloud = f"--cloud {', '.join(others)} or {last}"
        raise UserError(f"{place}: local needs Linux, and this is {name()}; {LINUX}, or a cloud: {cloud}", Exit.MACHINE)


def require_renting(what: str) -> None:
    """UserError unless SkyPilot and the weights tool run here."""
    if not rents():
        raise UserError(f"{what} does not run on {name()} itself; run mistralctl in WSL2 (wsl --install)", Exit.MACHINE)
