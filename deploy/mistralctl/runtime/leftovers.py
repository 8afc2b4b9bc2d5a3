"""What is left of a deployment whose record cannot be read: its processes here and its machine, by the names that a deployment's name gives them."""

from __future__ import annotations

import importlib.util
import re
import time
from dataclasses import replace

from mistralctl import clouds, node, own_files, state
from mistralctl.errors import UserError
from mistralctl.runtime import sky
from mistralctl.runtime.local import Local
from mistralctl.runtime.rented import Rented
from mistralctl.state import Record

HEAD = 1 << 20


def _said(name: str, field: str) -> str:
    """A text of a record that cannot be read as a whole: those wanted come early in it."""
    path = state.folder(name) / "record.json"
    try:
        head = own_files.head(path, HEAD).decode("utf-8", "replace")
    except (OSError, UserError):
        return ""
    found = re.search(rf'"{field}":\s*"([a-z0-9_-]+)"', head)
    return found[1] if found else ""


def take_down(name: str, error: UserError) -> Record:
    """End the processes and the machine of a deployment; its record from now on.

    The error itself, with more in it, if its machine cannot be asked for.
    """
    here = Record(name, clouds.LOCAL, "starting", "", "", 1, str(node.local_dir()), "", time.time())
    _here(here)
    cloud = _said(name, "cloud")
    if cloud != clouds.LOCAL and importlib.util.find_spec("sky") is not None:
        labels = {"mistralctl-owner": owner} if (owner := _said(name, "mistralctl-owner")) else {}
        task = {"resources": {"labels": labels}}
        rented = replace(here, cloud=cloud, cluster=f"{state.CLUSTER}{name}", region=_said(name, "region"), task=task)
        _rented(rented)
    elif cloud in clouds.names():
        raise UserError(f"{error}; SkyPilot is not installed, so its machine on {cloud} may still be there", error.code)
    return replace(here, state="down")


def _here(record: Record) -> None:
    where = Local()
    where.stop(record)
    where.forget(record)


def _rented(record: Record) -> None:
    found = sky.clusters([record.cluster], refresh=False).get(record.cluster)
    if found is not None:
        record = replace(record, cloud=found.cloud or record.cloud, region=found.region or record.region)
    if record.cloud not in clouds.names():  # nobody knows of a machine
        return
    where = Rented()
    there = where.remove(record)
    where.sweep(record, promised=there)
    where.forget(record)
