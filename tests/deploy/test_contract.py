"""The contract is in one place: laptop, node, templates, scripts and docs say what `mistral_contract` says."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mistral_contract import envs, exits, files, phases
from mistral_contract.envs import Env, Serve, of
from mistralctl import package_dir
from mistralctl.phases import WORDS
from test_task import CASES, rendered

ROOT = package_dir("model").parent
SCRIPTS = ROOT / "docs" / "write_contract.py"
NODE = ROOT / "model" / "node"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPTS))


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text("utf-8"))


def strings(tree: ast.Module) -> set[str]:
    return {one.value for one in ast.walk(tree) if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def test_the_page_and_the_templates_are_what_the_contract_says(script: dict[str, Any]) -> None:
    for path, text in script["written"]():
        assert path.read_text("utf-8") == text, f"{path}: run make docs-contract"


@pytest.mark.parametrize("name", CASES)
def test_the_node_reads_what_the_laptop_writes(name: str) -> None:
    written = rendered(name)["envs"]
    read = envs.read(Serve, written)
    assert {env.name: env.write(getattr(read, env.field)) for env in of(Serve) if env.field != "node_dir"} == {
        key: value for key, value in written.items() if key.startswith(envs.PREFIX) and key != envs.variable("node_dir")
    }
    assert str(read.node_dir) == str(Path(written[envs.variable("node_dir")]).expanduser())


def test_the_laptop_refuses_to_write_what_the_node_would_not_read() -> None:
    good = envs.read(Serve, rendered("public")["envs"])
    for env, value, says in (
        ("port", 0, "MISTRALCTL_PORT should be a whole number from 1 to 65535"),
        ("dtype", "int8", "MISTRALCTL_DTYPE should be one of auto, bfloat16, float16, float32"),
        ("served_name", "", "MISTRALCTL_SERVED_NAME is missing"),
        ("vllm_args", ("--headless",), "MISTRALCTL_VLLM_ARGS --headless is closed in a deployment"),
    ):
        row = next(one for one in of(Serve) if one.field == env)
        with pytest.raises(ValueError, match=re.escape(says)):
            row.write(value)
    values = {env.field: getattr(good, env.field) for env in of(Serve)}
    with pytest.raises(ValueError, match=r"MISTRALCTL_HOST 0\.0\.0\.0 is reached from elsewhere and needs MISTRALCTL_TLS"):
        Serve(**values | {"tls": None})


def test_one_row_is_known_to_reader_writer_docs_and_template(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(Serve):
        colour: str | None = envs._env(envs._one_of("red", "blue"), "what it looks like", "red", "launcher", default=None)

    plain = rendered("aws")["envs"]
    assert envs.read(More, plain).colour is None
    with pytest.raises(ValueError, match="MISTRALCTL_COLOUR should be one of red, blue"):
        envs.read(More, plain | {"MISTRALCTL_COLOUR": "green"})
    blue = envs.read(More, plain | {"MISTRALCTL_COLOUR": "blue"})
    assert envs.write(blue) | {"MISTRALCTL_NODE_DIR": ""} == plain | {"MISTRALCTL_COLOUR": "blue", "MISTRALCTL_NODE_DIR": ""}
    monkeypatch.setitem(script["TEMPLATES"], "serve", More)
    assert (
        "| `MISTRALCTL_COLOUR` | `red`, `blue` | not set | what it looks like | launcher | `red` |" in script["tables"]()["serve"]
    )
    text = (ROOT / "task_templates" / "serve.yaml").read_text("utf-8")
    assert "  MISTRALCTL_COLOUR: red\n\nfile_mounts:" in script["template"](text, More)


def places(word: str) -> set[str]:
    """The files of code that have a word, without those that `make docs-contract` writes."""
    found = (path for part in ("deploy", "model") for kind in ("*.py", "*.sh") for path in (ROOT / part).rglob(kind))
    return {str(path.relative_to(ROOT)) for path in found if re.search(rf"\b{word}\b", path.read_text("utf-8"))}


def test_an_env_is_its_row_who_writes_it_and_who_reads_it() -> None:
    contract, laptop, node = (
        "model/contract/mistral_contract/envs.py",
        "deploy/mistralctl/tasks/serve.py",
        "model/node/mistral_node/",
    )
    assert places("serve_user") == {contract, laptop, f"{node}serve.py", f"{node}isolation.py"}
    assert places("mirror_target|MISTRALCTL_MIRROR_TARGET") == {
        contract,
        "deploy/mistralctl/tasks/mirror.py",
        "model/node/mirror.sh",
    }


def test_an_exit_code_is_its_row_and_where_the_launcher_ends_with_it() -> None:
    assert places(r"Code\.CLASS|CLASS = \d+") == {
        "model/contract/mistral_contract/exits.py",
        "model/node/mistral_node/engines/__init__.py",
    }
    assert [int(code) for code in exits.Code] == [0, *range(10, 10 + len(exits.Code) - 1)]
    assert all(code.meaning for code in exits.Code)


SHELL = {
    "set-up": ("setup.sh", "gpu.sh"), "run": ("run.sh",), "watch": ("watch.sh",), "mirror": ("mirror.sh",), "finetune": ("finetune.sh",),
}  # fmt: skip
KINDS = {"mirror": envs.Mirror, "finetune": envs.Finetune}
BOTH = ("weights.sh",)  # sourced by the set-up, by a mirror and by a run of training


def test_the_scripts_read_the_envs_that_the_contract_says_and_no_others() -> None:
    def named(*scripts: str) -> set[str]:
        return {word for one in scripts for word in re.findall(r"MISTRALCTL_[A-Z_]+", (NODE / one).read_text("utf-8"))}

    shared = named(*BOTH)
    for reader, scripts in SHELL.items():
        task: Any = KINDS.get(reader, Serve)
        said = {env.name for env in of(task) if reader in env.readers}
        assert named(*scripts) | (shared if reader not in ("run", "watch") else set()) == said, reader
    every = {path.name: named(str(path.relative_to(NODE))) for path in NODE.rglob("*.sh")}
    assert {name for names in every.values() for name in names} <= set(envs.names())
    for template in ("serve", "mirror", "finetune"):
        text = (ROOT / "task_templates" / f"{template}.yaml").read_text("utf-8")
        assert set(re.findall(r"MISTRALCTL_[A-Z_]+", text)) <= set(envs.names())


def test_every_env_has_a_reader_and_the_launcher_reads_what_it_is_said_to() -> None:
    text = "".join(path.read_text("utf-8") for path in (NODE / "mistral_node").rglob("*.py"))
    assert {env.readers for env in of(envs.Mirror)} == {("mirror",)}
    tune = "".join(path.read_text("utf-8") for path in (ROOT / "model" / "tune" / "mistral_tune").rglob("*.py"))
    for env in of(envs.Finetune):
        assert env.readers
        assert set(env.readers) <= {"finetune", "tune", "watch", "laptop"}
        assert bool(re.search(rf"\bwanted\.{env.field}\b", tune)) == ("tune" in env.readers), env.name
    for env in of(Serve):
        assert env.readers
        assert set(env.readers) <= {*SHELL, "launcher", "guard", "laptop"}
        read = re.search(rf"\b(wanted|contract|found|self)\.{env.field}\b", text)
        assert bool(read) == ("launcher" in env.readers), env.name
        assert (f'(Serve, "{env.field}", ' in text) == ("guard" in env.readers), env.name


SIDES = ("deploy/mistralctl", "model/node/mistral_node", "model/plugin/vllm_mistral")


def test_no_name_of_an_env_is_copied_by_hand() -> None:
    known = {*envs.names(), envs.RUN_DIR}
    for path, tree in sources(*SIDES):
        own = {"MISTRALCTL_NODE_DIR"} if path.name == "config.py" else set()  # which a shell on this machine may have as well
        assert not strings(tree) & known - own, path


def test_no_name_of_a_file_is_copied_by_hand() -> None:
    names = {entry.name for entry in files.ENTRIES if "." in entry.name}
    for path, tree in sources(*SIDES):
        copied = {text for text in strings(tree) for name in names if text == name or text.endswith(f"/{name}")}
        assert not copied, path


def test_the_scripts_use_the_folders_of_the_contract() -> None:
    known = {entry.path.rstrip("/").removeprefix("run/NAME/") for entry in files.ENTRIES} | {"run"}
    text = "".join(path.read_text("utf-8") for path in NODE.rglob("*.sh"))
    used = {word.removesuffix(".new") for word in re.findall(r"\$(?:run|node)_dir/([A-Za-z_]+(?:\.[a-z]+)?)", text)}
    assert used == {
        "data", "ends_at", "envs", "errors", "lora", "paid_from", "pulled.json", "run", "secrets.json", "setup.lock", "site", "status.json",
        "watch", "watch.log", "weights",
    }  # fmt: skip
    assert used <= known


def test_the_weights_tool_has_the_same_name_for_a_manifest() -> None:
    path = ROOT / "model" / "weights" / "mistral_weights" / "names.py"
    assert f'MANIFEST = "{files.MANIFEST.name}"' in path.read_text("utf-8")


def test_every_phase_that_a_node_says_has_a_name_in_the_contract_and_a_word_on_the_laptop() -> None:
    shell = {
        said[1] or said[2]
        for path in NODE.rglob("*.sh")
        for said in re.finditer(r"\b(?:phase (\w+) (?:start|end|fail)|step (\w+) \")", path.read_text("utf-8"))
    }
    launcher = {
        call.args[0].value
        for _, tree in sources("model/node/mistral_node")
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)
        and getattr(call.func, "attr", getattr(call.func, "id", "")) in ("say", "during")
    }  # fmt: skip
    assert shell | launcher == set(phases.PHASES) - {"outside"}  # which the laptop says
    assert set(phases.PHASES) <= set(WORDS)


def test_a_line_is_read_as_it_was_written() -> None:
    for event in (phases.PhaseEvent("engine", "fail", 1.5, 'a "b" \\'), phases.PhaseEvent("weights", "start", 2.0)):
        assert phases.parse(f"(task, pid=1) {event.line()}\n") == event


def test_an_env_names_itself_in_its_errors() -> None:
    row: Env = of(Serve)[0]
    with pytest.raises(ValueError, match=r"^MISTRALCTL_NAME is missing$"):
        row.read({})


def test_a_run_of_training_reads_what_was_written_and_refuses_what_contradicts() -> None:
    example = {env.name: env.example for env in of(envs.Finetune)}
    run = envs.read(envs.Finetune, example)
    assert (run.merge, run.learning_rate, run.gpus, run.method) == (True, 0.0002, 1, "lora")
    assert envs.write(run) | {"MISTRALCTL_NODE_DIR": ""} == example | {"MISTRALCTL_NODE_DIR": ""}
    bare = envs.read(envs.Finetune, {**example, "MISTRALCTL_MERGE": "", "MISTRALCTL_RANK": "", "MISTRALCTL_SLIDING_WINDOW": ""})
    assert (bare.merge, bare.rank, bare.sliding_window) == (False, 16, None)
    for name, text, says in (
        ("LEARNING_RATE", "2", "MISTRALCTL_LEARNING_RATE should be above 0 and at most 1"),
        ("MERGE", "1", "MISTRALCTL_MERGE should be yes, or empty"),
        ("RANK", "513", "MISTRALCTL_RANK should be a whole number from 1 to 512"),
        ("PRICE", "", "MISTRALCTL_BUDGET needs MISTRALCTL_PRICE"),
    ):
        with pytest.raises(ValueError, match=says):
            envs.read(envs.Finetune, example | {f"MISTRALCTL_{name}": text})
    with pytest.raises(ValueError, match="MISTRALCTL_GPUS 2 needs MISTRALCTL_DEVICE cuda"):
        envs.read(envs.Finetune, example | {"MISTRALCTL_DEVICE": "cpu", "MISTRALCTL_GPUS": "2"})
