"""The gate on the node: before it opens its server, the launcher asks for every route that the application has, as three callers."""

from __future__ import annotations

import http.client
from pathlib import Path

from mistral_contract import files, routes, untrusted
from mistral_node import disk, log
from mistral_node.client import Client
from mistral_node.contract import Code, LaunchError


def pass_through(client: Client, run_dir: Path, shared: Path) -> routes.Report:
    """Walks the server that `client` asks and keeps what was found in the run folder; LaunchError unless the walk was clean."""
    report = _walk(client, shared / files.ROUTES.name)
    if not disk.replaced(run_dir / files.GATE.name, report.text()):
        log.line(f"{run_dir / files.GATE.name} cannot be written; is the disk full?")
    if fault := report.fault():
        log.line(report.table())
        raise LaunchError(Code.GATE, fault)
    return report


def _walk(client: Client, file: Path) -> routes.Report:
    try:
        found = untrusted.read_any(untrusted.contents(file, untrusted.MOST_BYTES))
        asked = list(routes.ways(found))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(Code.GATE, f"the server did not say which routes it has ({error}); see mistralctl logs") from error
    if not set(routes.SHORT_LIST) & set(asked):
        raise LaunchError(Code.GATE, "none of the routes that the server names is one of ours; see mistralctl logs")
    try:
        return routes.Report(len(found), routes.walk(client.connect, asked, client.key, client.probe))
    except (OSError, http.client.HTTPException) as error:
        raise LaunchError(Code.GATE, f"the server stopped answering the gate's probe ({error}); see mistralctl logs") from error
