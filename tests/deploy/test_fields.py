"""One field, one place: an option touches spec.py alone; flags, variable, file, schema and page follow from its field."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import pytest
import typer
from mistralctl import config, fields, flags, package_dir
from mistralctl.config import Sourced
from mistralctl.errors import UserError
from mistralctl.fields import About
from mistralctl.spec import DeploymentSpec
from pydantic import Field
from typer.testing import CliRunner


class WithReplicas(DeploymentSpec):
    """The spec with options of every kind added."""

    replicas: Annotated[int | None, About("Fleet", "3", "N")] = Field(
        None, ge=1, le=64, description="servers that share the load"
    )
    colour: Annotated[Literal["red", "green"], About("Fleet", "green", known=lambda: ("red", "green"))] = Field(
        "red", description="what it looks like: {}"
    )
    quick: Annotated[bool, About("Fleet", "true")] = Field(False, description="start without a look")
    peers: Annotated[tuple[str, ...], About("Fleet", "[a, b]", "PEER", flag="--peer")] = Field((), description="another server")
    weight_of: Annotated[dict[str, str], About("Fleet", "{a: '1'}", "NAME=SHARE", noun="server")] = Field(
        {}, description="its share"
    )


GIVEN = {"replicas": 3, "colour": "green", "quick": True, "peers": ("a", "b"), "weight_of": {"a": "1"}}
WORDS = ["--replicas", "3", "--colour", "green", "--quick", "--peer", "a", "--peer", "b", "--weight-of", "a=1"]


def taken(sourced: Sourced) -> dict[str, object]:
    return {name: getattr(sourced.spec, name) for name in GIVEN}


def command(seen: list[Sourced]) -> typer.Typer:
    def show(sourced: Sourced) -> None:
        """Show what is given."""
        seen.append(sourced)

    app = typer.Typer(rich_markup_mode=None)
    app.command()(flags.with_spec(show, WithReplicas))
    return app


def test_a_new_field_is_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Sourced] = []
    done = CliRunner().invoke(command(seen), WORDS, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert taken(seen[0]) == GIVEN
    shown = " ".join(CliRunner().invoke(command(seen), ["--help"], env={"COLUMNS": "120"}).output.split())
    assert "--replicas N servers that share the load" in shown
    assert "--colour <str> what it looks like: red or green [default: red]" in shown
    assert "--quick / --no-quick start without a look" in shown
    assert "--peer PEER another server (repeatable)" in shown
    with pytest.raises(UserError, match="--replicas: '99' is out of range; it must be at most 64"):
        CliRunner().invoke(command(seen), ["--replicas", "99"], catch_exceptions=False)


def test_a_new_field_is_completed() -> None:
    found = fields.fields(WithReplicas)["colour"]
    option = flags.parameter(found).annotation.__metadata__[0]
    assert option.autocompletion("g") == ["green"]


def test_a_new_field_is_a_variable_and_a_key_of_the_file(tmp_path: Path) -> None:
    variables = {"REPLICAS": "3", "COLOUR": "green", "QUICK": "yes", "PEERS": "a, b", "WEIGHT_OF": "a=1"}
    environ = {f"MISTRALCTL_{name}": value for name, value in variables.items()}
    assert taken(config.load({}, environ, None, tmp_path, WithReplicas)) == GIVEN
    text = "replicas: 3\ncolour: green\nquick: true\npeers: [a, b]\nweight_of: {a: '1'}\n"
    (tmp_path / "mistralctl.yaml").write_text(text)
    sourced = config.load({}, {}, None, tmp_path, WithReplicas)
    assert taken(sourced) == GIVEN
    assert sourced.place("colour") == f"{tmp_path / 'mistralctl.yaml'}:2: colour"
    jsonschema.validate({"replicas": 3, "peers": "a, b", "quick": "on"}, fields.json_schema(WithReplicas))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"replicas": 99}, fields.json_schema(WithReplicas))
    (tmp_path / "mistralctl.yaml").write_text("replica: 3")
    with pytest.raises(UserError, match="unknown key 'replica'; did you mean replicas"):
        config.load({}, {}, None, tmp_path, WithReplicas)


def test_a_new_field_is_on_the_page_of_options() -> None:
    lines = fields.docs(WithReplicas).splitlines()
    assert lines.index("## Fleet") > 0
    assert (
        "| `--replicas` | `MISTRALCTL_REPLICAS` | `replicas: 3` | servers that share the load | whole number, at least 1, at most 64 | - |"
        in lines
    )


def words_of(tree: ast.AST) -> set[str]:
    """Every parameter and every text in Python code."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(str(node.arg))
    return found


def test_an_option_touches_one_file() -> None:
    """The modules between an option and its use name no field, so a new one is added in spec.py alone."""
    package = package_dir("model").parent / "deploy" / "mistralctl"
    for module in ("flags.py", "fields.py", "config.py"):
        words = words_of(ast.parse((package / module).read_text("utf-8"))) - {"kind", "name", "key", "model"}
        words -= set(config.ELSEWHERE.values())  # what other programs call our options
        words -= {word for keys, _ in config.OTHERS for word in keys}  # whose files are recognised
        found = {name for name, one in fields.fields(DeploymentSpec).items() if {name, one.flag} & words}
        assert not found, module
    commands = [
        node for node in ast.walk(ast.parse((package / "cli.py").read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and any(isinstance(one, ast.Name) and one.id == "with_spec" for one in node.decorator_list)
    ]  # fmt: skip
    assert {node.name for node in commands} == {"up", "plan"}
    for node in commands:
        assert not {one.flag for one in fields.fields(DeploymentSpec).values()} & words_of(node)


@pytest.mark.parametrize("name", fields.fields(WithReplicas))
def test_the_command_line_of_a_spec_makes_the_spec_again(name: str, tmp_path: Path) -> None:
    one = fields.fields(WithReplicas)[name]
    (tmp_path / "mistralctl.yaml").write_text(f"{name}: {one.about.example}\n")
    given = config.load({}, {}, None, tmp_path, WithReplicas).spec
    seen: list[Sourced] = []
    words = fields.words(given)
    assert words, "the example is the default"
    CliRunner().invoke(command(seen), words, catch_exceptions=False)
    assert seen[0].spec == given


def test_a_field_that_says_nothing_of_itself_is_named() -> None:
    class Silent(DeploymentSpec):
        quiet: bool = False

    with pytest.raises(TypeError, match=r"Silent\.quiet has no About"):
        fields.fields(Silent)


def test_every_field_says_what_it_is() -> None:
    for one in fields.fields(DeploymentSpec).values():
        assert one.info.description, one.name
        assert one.about.panel, one.name
        assert one.variable not in ("MISTRALCTL_HOME", "MISTRALCTL_OWNER", "MISTRALCTL_DEBUG", "MISTRALCTL_NODE_DIR")
