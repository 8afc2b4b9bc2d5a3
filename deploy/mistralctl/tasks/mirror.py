"""A mirror as a task of its own: a cheap machine without a GPU in the cloud of the target's bucket."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from mistral_contract import envs, files
from mistral_contract.envs import Mirror

from mistralctl import package_dir
from mistralctl.clouds import buckets, facts
from mistralctl.errors import UserError
from mistralctl.models import MODELS
from mistralctl.plan import SMALLEST_CPU_NODE
from mistralctl.rights import Right, right
from mistralctl.spec import check_uri
from mistralctl.tasks import NODE_DIR, NODE_PYTHON, SETUP_MINUTES, Kind, Task, digest, environment_id

KIND = Kind("mirror", "a mirror job", serves=False)
LIFETIME_MINUTES = 240
DISK_GIB = 128  # the system, and one set of weights on its way; 7B in bf16 is 14.5 GB
# CPUs and GiB for the canary's figures: of 7B they take 4 GiB (benchmarks/streamed_canary.py), and the weights lie in the page cache.
CANARY_NODE = (8, 16)


@dataclass(frozen=True)
class MirrorSpec:
    """What is brought from where to where. `revision` pins a source that knows commits; `region` is the target's.

    `endpoints` are the clouds' own variables for those buckets that another server than the cloud's answers for. With `canary` the
    figures that a start is checked by are computed for the set and stored with it.
    """

    source: str
    target: str
    revision: str = ""
    region: str | None = None
    endpoints: Mapping[str, str] = field(default_factory=dict)
    canary: bool = False

    @property
    def command(self) -> str:
        """The command line that makes the same mirror again."""
        options = {"--revision": self.revision, "--region": self.region or ""}
        given = [word for flag, value in options.items() if value for word in (flag, value)]
        return shlex.join(
            ["mistralctl", "weights", "mirror", self.source, self.target, *given, *(["--canary"] if self.canary else [])]
        )

    @property
    def name(self) -> str:
        """`mirror-` and a hash of what it does, so that the same mirror is the same machine."""
        extra = ["canary"] if self.canary else []
        return f"mirror-{digest([self.source, self.revision, self.target, *self.endpoints.values(), *extra], 8)}"

    @property
    def terms(self) -> str:
        """The terms that the licence of these weights asks for, of a row of the table of models; empty if none are known."""
        found = (model for model in MODELS.values() if model.terms and self.source.rstrip("/") == model.weights)
        return next((f"terms of {model.name}: {model.terms}" for model in found), "")

    @property
    def cloud(self) -> str | None:
        """The cloud of the target's bucket; None for a folder."""
        bucket = buckets().get(self.target.partition("://")[0])
        return bucket.cloud if bucket else None


def _checked(uri: str, place: str) -> str:
    try:
        return check_uri(uri)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def checked(asked: MirrorSpec) -> MirrorSpec:
    """Return the checked mirror. A row of the table of models stands for its weights, at the commit that the table pins."""
    row = MODELS.get(asked.source)
    if row is not None:
        asked = replace(asked, source=row.weights, revision=asked.revision or row.revision)
    spec = replace(asked, source=_checked(asked.source, "SOURCE"), target=_checked(asked.target, "TARGET"))
    target, revision, region = spec.target, spec.revision, spec.region
    scheme = target.partition("://")[0]
    if scheme not in buckets() and scheme != "file":
        raise UserError(f"TARGET: weights cannot be written to {scheme}://; name a bucket or a folder")
    if revision and spec.source.partition("://")[0] not in ("hf", "pypi"):
        raise UserError(f"--revision: {spec.source} has no revisions; leave it out")
    if region is not None:
        if spec.cloud is None:
            raise UserError("--region: a folder is in no region; leave it out")
        known = facts(spec.cloud).regions
        if region not in known:
            raise UserError(f"--region: {spec.cloud} has no region {region!r}; one of {', '.join(sorted(known))}")
    return spec


def rights(spec: MirrorSpec) -> tuple[Right, ...]:
    """What the machine's role needs: to write the target, and to read the source where that is a bucket."""
    if spec.cloud is None:
        return ()
    write = right(spec.target, spec.cloud, write=True, endpoints=spec.endpoints)
    read = right(spec.source, spec.cloud, endpoints=spec.endpoints)
    if read is not None and read.has == "no":
        read = replace(read, mend="add --here: this machine's own credentials are used")
    return tuple(one for one in (write, read) if one is not None)


def render(spec: MirrorSpec, *, owner: str) -> Task:
    """The task of a mirror: plain data that SkyPilot accepts whole; no secret is in it."""
    for place, uri in (("SOURCE", spec.source), ("TARGET", spec.target)):
        if uri.startswith("file://"):
            raise UserError(f"{place}: {uri} is a folder of this machine; add --here to mirror on this machine")
    task: Task = yaml.safe_load((package_dir("task_templates") / "mirror.yaml").read_text("utf-8"))
    cpus, memory = CANARY_NODE if spec.canary else SMALLEST_CPU_NODE
    wanted: dict[str, Any] = {
        "infra": "/".join(part for part in (spec.cloud, spec.region) if part),
        "cpus": f"{cpus}+",
        "memory": f"{memory}+",
        "disk_size": DISK_GIB,
        "autostop": task["resources"]["autostop"],
    }
    labels = {
        "mistralctl-name": spec.name,
        "mistralctl-owner": owner,
        "mistralctl-resources": digest(wanted),
        "mistralctl-ttl": str(LIFETIME_MINUTES),
    }
    task["name"] = spec.name
    task["resources"] = wanted | {"labels": labels}
    mirror = Mirror(
        name=spec.name,
        node_dir=Path(NODE_DIR),
        python=NODE_PYTHON,
        env_id=environment_id("cpu", NODE_PYTHON) if spec.canary else "",
        mirror_source=spec.source,
        mirror_target=spec.target,
        revision=spec.revision,
        ttl_minutes=LIFETIME_MINUTES,
        setup_minutes=SETUP_MINUTES,
    )
    task["envs"] = {**envs.write(mirror), **spec.endpoints}
    task["file_mounts"] = {f"{NODE_DIR}/{files.MODEL.of(spec.name)}": str(package_dir("model"))}
    return task
