"""How many files a new thing touches, counted on a copy of the source. A cloud: test_clouds.py; an option: test_fields.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mistralctl import package_dir

ROOT = package_dir("model").parent


class Copy:
    """A copy of the checkout's source; `touched` are the files that were added or changed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.touched = folder, set[str]()
        skipped = shutil.ignore_patterns("__pycache__")
        for part in ("deploy", "docs", "model", "task_templates"):
            shutil.copytree(ROOT / part, folder / part, ignore=skipped)

    def add(self, path: str, text: str) -> None:
        assert not (self.folder / path).exists()
        (self.folder / path).write_text(text, "utf-8")
        self.touched.add(path)

    def change(self, path: str, before: str, new: str) -> None:
        """Put `new` before the only place where `before` stands."""
        text = (self.folder / path).read_text("utf-8")
        assert text.count(before) == 1, f"{path}: {before!r}"
        (self.folder / path).write_text(text.replace(before, new + before), "utf-8")
        self.touched.add(path)

    def python(self, *arguments: str) -> str:
        """Return what the interpreter prints in the copy, whose packages come first."""
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([f"{self.folder}/deploy", f"{self.folder}/model/contract"]),
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=600, check=True).stdout

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the copy's `mistralctl ARGUMENT...`."""
        (self.folder / "home").mkdir(exist_ok=True)
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(self.folder / "deploy"),
            "COLUMNS": "120",
        }
        command = [sys.executable, "-m", "mistralctl", *arguments]
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


ROW = """        Model("mistral-new", "hf://someone/new", "0123456789abcdef0123456789abcdef01234567", V03, "apache-2.0", True, "mistral"),
"""


def test_a_model_is_a_row(copy: Copy) -> None:
    copy.change("deploy/mistralctl/models.py", '        Model(\n            "smollm2-135m-instruct"', ROW)
    assert "mistral-new " in copy.run("models").stdout
    planned = copy.run("plan", "mistral-new", "--cloud", "aws", "-o", "json")
    assert json.loads(planned.stdout)["model"]["name"] == "mistral-new", planned.stderr
    task = copy.run("up", "mistral-new", "--cloud", "aws", "--dry-run").stdout
    assert "MISTRALCTL_WEIGHTS: hf://someone/new\n" in task
    assert len(copy.touched) == 1


FIELD = """    colour: str = _env(_one_of("red", "green"), "what it looks like", "green", "launcher", default="red")
"""
READS = """
import sys, yaml
from mistral_contract import envs
written = yaml.safe_load(open(sys.argv[1]))["envs"]
print(envs.read(envs.Serve, written).colour)
"""


def test_a_value_for_the_node_is_a_field_and_where_it_is_set(copy: Copy) -> None:
    copy.change("model/contract/mistral_contract/envs.py", "    serving_id: str = _env(", FIELD)
    copy.change("deploy/mistralctl/tasks/serve.py", "        ttl_minutes=plan.ttl_minutes,\n", '        colour="green",\n')
    by_hand = len(copy.touched)
    copy.python("docs/write_contract.py")  # make docs-contract
    (copy.folder / "task.yaml").write_text(copy.run("up", "--cloud", "aws", "--dry-run").stdout)
    assert copy.python("-c", READS, "task.yaml") == "green\n"
    assert copy.python("-c", READS, "task_templates/serve.yaml") == "green\n"
    assert (
        "| `MISTRALCTL_COLOUR` | `red`, `green` | `red` | what it looks like |" in (copy.folder / "docs/contract.md").read_text()
    )
    assert by_hand == 2


COMMAND = '''
"""`mistralctl greet`: a command that is not there yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Greeting:
    """Who is greeted, and how."""

    name: str
    words: str


def run(name: str) -> Greeting:
    return Greeting(name, f"hello, {name}")
'''
REGISTRATION = '''
@app.command()
def greet(name: Annotated[str, typer.Argument()], output: Output = Form.text) -> None:
    """Greet somebody."""
    from mistralctl.commands import greet as greet_command

    say(greet_command.run(name), output)


'''


def test_a_command_is_a_file_and_its_options(copy: Copy) -> None:
    copy.add("deploy/mistralctl/commands/greet.py", COMMAND)
    copy.change("deploy/mistralctl/cli.py", "def main() -> NoReturn:", REGISTRATION)
    assert copy.run("greet", "you").stdout == "name        you\nwords       hello, you\n"
    found = json.loads(copy.run("greet", "you", "-o", "json").stdout)
    assert (found["name"], found["words"]) == ("you", "hello, you")
    assert "Greet somebody." in copy.run("--help").stdout
    assert len(copy.touched) == 2
