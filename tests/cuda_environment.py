"""Install vLLM's environment of a GPU machine on this one and check what needs no GPU (make cuda-environment).

8 GB from the package index; what it was is written to cuda_environment.json beside this file, which tests/deploy/test_node.py holds
against the pins. Run in the laptop's environment; the stages run in the one that it installed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).with_suffix(".json")
PYTHON = "3.11"  # of a node in a cloud
# Both wheels carry the helper that builds them; nothing imports it.
BUILD_HELPER = {"build_backend.py": ["flashinfer-python", "torch-c-dlpack-ext"]}


def plans(folder: Path) -> list[dict[str, str]]:
    """The variables of a node's task for each row of the table of models on each GPU and count that it fits on."""
    from mistralctl import checkpoints, plan
    from mistralctl.config import load
    from mistralctl.errors import UserError
    from mistralctl.gpus import GPUS
    from mistralctl.models import MODELS
    from mistralctl.tasks import serve

    found = []
    for model, gpu, count in itertools.product(MODELS, GPUS, (1, 2, 4, 8)):
        try:
            sourced = load({"model": model, "accelerators": f"{gpu}:{count}"}, {}, None, folder)
            found.append(serve.render(plan.make(sourced, checkpoints.resolve(sourced), None), owner="x")["envs"])
        except UserError:
            continue  # it does not fit, or no cloud sells it
    return found


def outside() -> None:
    from mistralctl.tasks import environment_id

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistralctl"
    folder, site = cache / environment_id("cuda", PYTHON), cache / "cuda-site"
    uv = str(Path(sys.executable).parent / "uv")
    environ = {key: value for key, value in os.environ.items() if key not in ("UV_FIND_LINKS", "UV_TORCH_BACKEND", "PYTHONPATH")}
    started = time.monotonic()
    subprocess.run(["bash", ROOT / "model" / "node" / "environment.sh", "cuda", PYTHON, folder, uv], env=environ, check=True)
    seconds = time.monotonic() - started
    python = folder / "bin" / "python"
    ours = [str(ROOT / "model" / name) for name in ("contract", "plugin", "node", "weights")]
    install = [uv, "pip", "install", "--quiet", "--reinstall", "--no-deps", "--python", python, "--target", site, *ours]
    subprocess.run(install, env=environ, check=True)
    (cache / "libcuda.c").touch()
    (cache / "no-driver").mkdir(exist_ok=True)
    # vLLM's libraries name the driver's: an empty one lets everything else that they need be looked for.
    subprocess.run(
        ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", cache / "no-driver" / "libcuda.so.1", cache / "libcuda.c"],
        check=True,
    )
    environ |= {
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "tests" / "plugin")]),
        "VLLM_PLUGINS": "mistral_swa",
        "HF_HUB_OFFLINE": "1",
    }
    found: dict[str, Any] = {"environment": folder.name}
    for stage in (files, model, engine):
        program, said = (
            [python, __file__, stage.__name__],
            environ | ({"LD_LIBRARY_PATH": str(cache / "no-driver")} if stage is engine else {}),
        )
        done = subprocess.run(program, input=json.dumps(plans(cache)), env=said, stdout=subprocess.PIPE, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    RESULT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))
    print(f"installed in {seconds:.0f} s (0 where it was there already); rm -r {folder} {site} removes it")


def owners() -> dict[str, list[str]]:
    """The files that more than one distribution of this environment owns."""
    from importlib.metadata import distributions

    found: dict[str, set[str]] = defaultdict(set)
    for item in distributions(path=[path for path in sys.path if path.startswith(sys.prefix)]):
        for file in item.files or ():
            found[os.path.normpath(file)].add(item.metadata["Name"].lower().replace("_", "-"))
    return {file: sorted(names) for file, names in found.items() if len(names) > 1}


def files() -> dict[str, Any]:
    """The environment is what the pins say, and no file has two owners."""
    import re
    from importlib.metadata import distributions

    constraints = (ROOT / "model" / "node" / "vllm-cuda" / "constraints.txt").read_text("utf-8")
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", constraints, re.MULTILINE))
    own = [path for path in sys.path if path.startswith(sys.prefix)]
    installed = {re.sub(r"[-_.]+", "-", item.metadata["Name"].lower()): item.version for item in distributions(path=own)}
    assert installed == pins, set(installed.items()) ^ set(pins.items())
    assert owners() == BUILD_HELPER, owners()
    size = sum(path.stat().st_size for path in Path(sys.prefix).rglob("*") if path.is_file() and not path.is_symlink())
    return {"packages": len(installed), "gb": round(size / 1e9, 1)}


def model() -> dict[str, Any]:
    """vLLM, PyTorch and FlashInfer are imported, vLLM loads our plugin, and the class can be loaded."""
    import flashinfer
    import torch
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm_mistral import ARCHITECTURE

    found = ModelRegistry.models[ARCHITECTURE].load_model_cls().__name__
    return {"vllm": vllm.__version__, "torch": torch.__version__, "flashinfer": flashinfer.__version__, "class": found}


def engine() -> dict[str, Any]:
    """With an empty libcuda.so.1: each library of vLLM finds all others that it needs, and its parser takes the launcher's flags."""
    import ctypes

    # What the driver's own library has is looked for when it is called, which happens on a GPU alone.
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
    import torch  # noqa: F401 - whose libraries vLLM's are linked to
    import vllm
    from vllm import platforms
    from vllm.platforms.cuda import CudaPlatform

    libraries = sorted(Path(vllm.__file__).parent.rglob("*.so"))
    for library in libraries:
        ctypes.CDLL(str(library), mode=os.RTLD_LAZY)

    platforms._current_platform = CudaPlatform()  # which vLLM chooses where it finds a GPU
    import vllm_options
    from mistral_contract import vllm_options as judge
    from mistral_node import contract
    from mistral_node.engines import vllm as engine
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    names, opened = set(), []
    for options in (vllm_options.options()["options"], judge._data()["options"]):
        names.add(tuple(name for option in options for name in option["names"]))
        opened.append([option for option in options if option["names"][0].removeprefix("--") in judge.OPEN])
    assert len(names) == 1, "the parser has other options than the laptop knows: make vllm-options"
    assert opened[0] == opened[1], "the parser takes other values than the laptop"
    parser: Any = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    wanted = json.load(sys.stdin)
    for envs in wanted:
        meant = contract.read(envs)
        got = parser.parse_args(engine.arguments(meant, Path("/weights/model")))
        validate_parsed_serve_args(got)
        assert (got.max_model_len, got.max_num_seqs, got.dtype) == (meant.max_model_len, meant.max_num_seqs, meant.dtype)
        assert (got.tensor_parallel_size, got.gpu_memory_utilization) == (meant.tensor_parallel, meant.memory_utilization)
    return {"libraries": len(libraries), "plans": len(wanted)}


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps({"files": files, "model": model, "engine": engine}[sys.argv[1]]()))
    else:
        outside()
