"""Write what `mistral_contract` says into docs/contract.md and the templates of tasks (`make docs-contract`).

In the page each table stands between `<!-- NAME -->` and `<!-- end -->`; in a template the block `envs:` is replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "model" / "contract"))

from mistral_contract import envs, exits, files, phases  # noqa: E402 - its folder comes first

PAGE = ROOT / "docs" / "contract.md"
TEMPLATES = {"serve": envs.Serve, "mirror": envs.Mirror, "finetune": envs.Finetune}


def _table(head: str, rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    columns = head.split(" | ")
    for cells in (columns, ["---"] * len(columns), *rows):
        yield "| " + " | ".join(map(str, cells)) + " |"


def _env(env: envs.Env) -> tuple[str, ...]:
    unset = "must be set" if env.required else f"`{env.kind.write(env.default)}`" if env.default else "not set"
    return f"`{env.name}`", env.kind.text, unset, env.meaning, ", ".join(env.readers), f"`{env.example}`"


def tables() -> dict[str, str]:
    """Each table of the page, by its name."""
    found = {
        name: _table("name | value | default | meaning | read by | example", map(_env, envs.of(task)))
        for name, task in TEMPLATES.items()
    }
    found["files"] = _table("below NODE_DIR | what", ((f"`{entry.path}`", entry.what) for entry in files.ENTRIES))
    found["phases"] = _table("phase | what", ((f"`{phase}`", what) for phase, what in phases.PHASES.items()))
    found["exits"] = _table("code | meaning", ((int(code), code.meaning) for code in exits.Code))
    return {name: "\n".join(lines) for name, lines in found.items()}


def page(text: str) -> str:
    """The page with every table as the contract has it."""
    for name, table in tables().items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"{PAGE}: the place of the table {name} should be there once, and is {found} times")
    return text


def template(text: str, task: type) -> str:
    """A template with the envs that the contract has for its kind of task."""

    def plain(value: str) -> str:
        quote = "'" if '"' in value else '"'
        return value if value and yaml.safe_load(value) == value else f"{quote}{value}{quote}"

    lines = "".join(f"  {env.name}: {plain(env.template)}\n" for env in envs.of(task))
    text, found = re.subn(r"(?m)^envs:\n(?:  .*\n)+", lambda _: f"envs:\n{lines}", text)
    if found != 1:
        raise ValueError("a template has one block of envs")
    return text


def written() -> Iterator[tuple[Path, str]]:
    """Each file, and its text as the contract would have it."""
    yield PAGE, page(PAGE.read_text("utf-8"))
    for name, task in TEMPLATES.items():
        path = ROOT / "task_templates" / f"{name}.yaml"
        yield path, template(path.read_text("utf-8"), task)


if __name__ == "__main__":
    for path, text in written():
        path.write_text(text, "utf-8")
