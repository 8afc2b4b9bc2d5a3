"""Puts task files through the real SkyPilot, without a cloud, an account, its server or the network.

`python sky_accepts.py TASK.yaml...` prints one JSON object a task: what the optimizer chose for it, or the error. Run by
test_sky.py in a process with an empty HOME, in which it lays out the catalog that mistralctl plans with.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
PRICES = HERE.parent.parent / "deploy" / "mistralctl" / "clouds"


def lay_out_catalog() -> None:
    """The price snapshot, and the images and accelerator names that SkyPilot wants beside it; taken as they are."""
    target = Path.home() / ".sky" / "catalogs" / "v8"
    for source in (PRICES, HERE / "sky_catalog"):
        for file in source.rglob("*.csv"):
            to = target / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)


def accepted(path: Path) -> dict[str, object]:
    """What the optimizer chose, after parsing, validation of resources and expansion of file mounts."""
    import sky
    from sky import dag as dags
    from sky import optimizer

    task = sky.Task.from_yaml_config(yaml.safe_load(path.read_text("utf-8")))
    task.validate()
    task.expand_and_validate_file_mounts()  # type: ignore[no-untyped-call]
    for resources in task.resources:
        resources.validate()  # type: ignore[no-untyped-call]
    with dags.Dag() as dag:
        dag.add(task)
    optimizer.Optimizer.optimize(dag, quiet=True)
    best = task.best_resources
    if best is None:
        return {"error": "the optimizer chose nothing"}
    return {
        "cloud": str(best.cloud).lower(),
        "region": best.region,
        "instance_type": best.instance_type,
        "accelerators": best.accelerators,
        "image": best.image_id,
        "use_spot": best.use_spot,
        "candidates": len(task.resources),
        "price": round(best.get_cost(3600), 4),
        "mounts": sorted(task.file_mounts or {}),
    }


def main() -> None:
    lay_out_catalog()
    from sky import check, global_user_state
    from sky.clouds import cloud as clouds

    for capability in (clouds.CloudCapability.COMPUTE, clouds.CloudCapability.STORAGE):
        global_user_state.set_enabled_clouds(["aws", "gcp", "azure"], capability, "default")
    # Otherwise SkyPilot checks the credentials once more.
    global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds("default"), "default")
    for name in sys.argv[1:]:
        try:
            result = accepted(Path(name))
        except Exception as error:  # noqa: BLE001 - whatever SkyPilot raises is the answer
            result = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write("accepted " + json.dumps({"task": Path(name).stem, **result}, default=str) + "\n")


if __name__ == "__main__":
    main()
