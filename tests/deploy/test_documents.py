"""The documents of `-o json` are a contract: docs/json.md has every key of each, and this holds both together.

`python -m pytest tests/deploy/test_documents.py --golden` writes the keys of the page anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import typer
import yaml
from conftest import Run
from mistralctl import cli, documents, evaluation, weights
from mistralctl.commands import doctor, down, env, extend, finetune, reap, receipt, status, tables, up
from mistralctl.commands import eval as eval_command
from mistralctl.commands import keys as keys_command
from mistralctl.commands import weights as weights_command
from mistralctl.models import Model
from mistralctl.plan import Plan
from pydantic import BaseModel

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
# What each command's document is made of; a list is in an envelope.
DOCUMENTS: dict[str, Any] = {
    "up": up.UpResult, "plan": Plan, "down": list[down.DownResult], "status": list[status.Status], "reap": reap.Reaped,
    "extend": extend.Extended, "receipt": receipt.Receipt, "env, connect": env.Client, "models": list[Model], "gpus": tables.GpuTable,
    "keys list": keys_command.KeyList, "keys add, keys revoke, keys rotate": keys_command.KeyChange,
    "doctor": doctor.Doctor, "weights mirror": weights_command.Mirrored, "weights mirror --here": weights.Mirrored,
    "eval": evaluation.Evaluated, "eval --compare": eval_command.Compared,
    "finetune": finetune.Finetuned, "weights pull": weights.Pulled, "weights verify": weights.Verified, "weights ls": weights.Listed,
}  # fmt: skip
LINES = ("weights mirror --here", "weights pull", "weights verify")


def keys(kind: Any) -> str:
    """The keys of what a type becomes in JSON, those of its parts in brackets."""
    origin, inside = get_origin(kind), [one for one in get_args(kind) if one not in (type(None), ...)]
    if origin in (Union, types.UnionType):
        return next((found for one in inside if (found := keys(one))), "")
    if origin in (tuple, list):
        return f"[{keys(inside[0])}]" if keys(inside[0]) else "[]"
    if origin in (dict, Mapping) or kind is dict:
        return "{...}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "{...}"  # the options, of which docs/options.md is the page
    if dataclasses.is_dataclass(kind):
        every = get_type_hints(kind)
        hints: dict[str, Any] = {field.name: every[field.name] for field in dataclasses.fields(kind)}
    else:
        return ""
    parts = [f"{name}: {found}" if (found := keys(hint)) else name for name, hint in hints.items()]
    return "{" + ", ".join(parts) + "}"


def described() -> str:
    """The lines of the page: a command, and the keys of its document."""
    lines = []
    for command, kind in DOCUMENTS.items():
        found = keys(kind)
        first = "{version, " + ("event, " if command in LINES else "")
        lines.append(f"{command}\n    {first}{f'items: {found}}}' if found.startswith('[') else found[1:]}\n")
    return "\n".join(lines)


def test_the_page_has_the_keys_of_every_document(request: pytest.FixtureRequest) -> None:
    page = PAGE.read_text("utf-8")
    before, fence, after = re.split(r"(?s)(?<=```text\n)(.*?)(?=```)", page)
    if request.config.getoption("--golden"):
        PAGE.write_text(before + described() + after, "utf-8")
    else:
        assert fence == described()


def commands(group: Any, before: str = "") -> Iterator[str]:
    """The words of every command that takes --output."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{word} ")
        elif any("--output" in option.opts for option in command.params):
            yield before + word


def test_every_command_with_an_output_has_its_document() -> None:
    documented = {one.removesuffix(" --here").removesuffix(" --compare") for line in DOCUMENTS for one in line.split(", ")}
    assert set(commands(typer.main.get_command(cli.app))) == documented


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("plan",), "plan"), (("models",), "models"), (("gpus",), "gpus"), (("doctor",), "doctor"), (("status",), "status"),
        (("down", "--all"), "down"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_document_has_its_version_first_and_its_keys(command: tuple[str, ...], kind: str, form: str, mistralctl: Run) -> None:
    done = mistralctl(*command, "-o", form)
    found = json.loads(done.stdout) if form == "json" else yaml.safe_load(done.stdout)
    assert (next(iter(found)), found.pop("version"), done.stderr) == ("version", 1, "")
    listed = keys(DOCUMENTS[kind]).startswith("[")
    assert list(found) == (["items"] if listed else [field.name for field in dataclasses.fields(DOCUMENTS[kind])])


def test_a_task_has_a_version_in_json_and_stands_alone_in_yaml(mistralctl: Run) -> None:
    up, mirror = ("up", "--cloud", "aws", "--dry-run"), ("weights", "mirror", "mistral-7b-v0.1", "s3://bucket/v01", "--dry-run")
    for command, more in ((up, ["steps"]), (mirror, [])):
        found, task = json.loads(mistralctl(*command, "-o", "json").stdout), yaml.safe_load(mistralctl(*command).stdout)
        assert list(found) == ["version", *task, *more]
        assert {key: found[key] for key in task} == task == yaml.safe_load(mistralctl(*command, "-o", "yaml").stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("status", "ghost", "-o", "json"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
        (("plan", "--output=json", "--port", "80"), 2, "--port: '80' is out of range; it must be at least 1024"),
        (("plan", "--nmae", "x", "-ojson"), 2, "No such option: --nmae (Possible options: --image, --name, --zone) (mistralctl --help)"),
        (("weights", "pull", "nowhere", "set", "-o", "json"), 2, "'nowhere' is not a place for weights; it must start with one of"),
    ],
)  # fmt: skip
def test_an_error_is_a_document_on_standard_error(arguments: tuple[str, ...], code: int, message: str, mistralctl: Run) -> None:
    done = mistralctl(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    found = json.loads(done.stderr)
    assert list(found) == ["version", "error"]
    assert found["version"] == 1
    assert found["error"] == {"code": code, "message": found["error"]["message"], "details": None}
    assert found["error"]["message"].startswith(message)


def test_a_note_is_a_document_on_standard_error(mistralctl: Run) -> None:
    arguments = ("up", "--cloud", "gcp", "--weights", "s3://bucket/v01", "--dry-run")
    text = mistralctl(*arguments).stderr
    assert text.startswith("note: ")
    assert json.loads(mistralctl(*arguments, "-o", "json").stderr) == {
        "version": 1, "note": {"message": text.removeprefix("note: ").rstrip("\n")},
    }  # fmt: skip


def test_details_of_an_error_are_lines() -> None:
    found = json.loads(documents.error("no cloud gave a machine", 8, "  us-east-1a  capacity"))
    assert found == {
        "version": 1,
        "error": {"code": 8, "message": "no cloud gave a machine", "details": "  us-east-1a  capacity"},
    }


def test_env_prints_its_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    client = env.Client("mine", "http://127.0.0.1:8000/v1", "key", "tiny", chat=True)
    monkeypatch.setattr(env, "run", lambda name: client)
    typer.main.get_command(cli.app).main(["env", "mine", "-o", "json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"version": 1, **dataclasses.asdict(client)}
