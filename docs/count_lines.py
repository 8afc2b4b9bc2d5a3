"""Print the lines of code of every package at two commits, as a Markdown table (`make lines`).

A line of code is a line that is not blank and not a comment; docstrings count. By default the commit before the redesign and HEAD.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "fd74faf"
COUNTED = (".py", ".sh", ".yaml")
# A path's first folders, and the name under which its lines are counted.
PARTS = (
    ("deploy/mistralctl/", "mistralctl (laptop)"),
    ("model/contract/", "mistral_contract"),
    ("model/weights/", "mistral_weights"),
    ("model/chats/", "mistral_chats"),
    ("model/tune/", "mistral_tune"),
    ("model/evaluate/", "mistral_evaluate"),
    ("model/plugin/", "vllm_mistral (plugin)"),
    ("model/node/", "mistral_node and the set-up"),
    ("task_templates/", "task templates"),
    ("tests/deploy/", "tests/deploy"),
    ("tests/plugin/", "tests/plugin"),
    ("tests/node/", "tests/node"),
    ("tests/weights/", "tests/weights"),
    ("tests/tune/", "tests/tune"),
    ("tests/evaluate/", "tests/evaluate"),
    ("tests/e2e/", "tests/e2e"),
    ("benchmarks/", "benchmarks"),
)
PRODUCT = [name for folder, name in PARTS if not folder.startswith(("tests/", "benchmarks/"))]


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


def count(text: str) -> int:
    """Return how many lines are neither blank nor a comment."""
    return sum(1 for line in text.splitlines() if (bare := line.strip()) and not bare.startswith("#"))


def lines(commit: str) -> Counter[str]:
    """Return the lines of code of every part at a commit."""
    found: Counter[str] = Counter()
    for path in git("ls-tree", "-r", "--name-only", commit).splitlines():
        part = next((name for folder, name in PARTS if path.startswith(folder)), None)
        if part and path.endswith(COUNTED) and "/golden/" not in path:
            found[part] += count(git("show", f"{commit}:{path}"))
    return found


def main(before: str = BEFORE, after: str = "HEAD") -> None:
    old, new = lines(before), lines(after)
    rows = [(name, old[name], new[name]) for _, name in PARTS if old[name] or new[name]]
    rows.insert(
        len([name for name in PRODUCT if old[name] or new[name]]),
        ("**together, without tests**", sum(old[name] for name in PRODUCT), sum(new[name] for name in PRODUCT)),
    )
    print(
        f"| lines of code | before ({before[:7]}) | after ({git('rev-parse', '--short=7', after).strip()}) | |\n|---|--:|--:|--:|"
    )
    for name, was, now in rows:
        print(f"| {name} | {was} | {now} | {now - was:+d} |")


if __name__ == "__main__":
    main(*sys.argv[1:3])
